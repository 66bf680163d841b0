"""A run's numbers: `metrics.jsonl`, `samples.jsonl` with a readable `samples.txt`, TensorBoard, and a progress line."""

import json
import math
import os
import sys
import time
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

_MAX_ELEMENTS = 4096


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _plain(value: Any, name: str) -> Any:
    """`value` as JSON: numpy and jax scalars are numbers, arrays are lists, NaN and infinities are null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{name}/{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, name) for v in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        array = np.asarray(value)
        if array.size > _MAX_ELEMENTS:
            raise ValueError(
                f"{name} has {array.size} elements; a row of metrics takes arrays of at most {_MAX_ELEMENTS}: "
                "reduce it before writing."
            )
        if array.dtype.kind not in "biuUS":
            array = array.astype(np.float64)  # also bfloat16 and friends; exact
        return _plain(array.tolist(), name)
    raise TypeError(f"{name} is a {type(value).__name__}; a row takes numbers, strings, lists, dicts and small arrays.")


def _line(step: int, row: dict) -> str:
    return json.dumps({"step": int(step), **{k: _plain(v, k) for k, v in row.items()}}, allow_nan=False) + "\n"


def _parse(path: epath.Path) -> list[tuple[str, dict]]:
    """The lines of a .jsonl file with what they say; a last line that a kill has cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            row["step"] += 0
        except (ValueError, TypeError, KeyError) as error:
            if i == len(lines) - 1:
                break
            raise ValueError(
                f"{path}, line {i + 1}, is not a row ({line[:80]!r}); every line is a JSON object with a step."
            ) from error
        rows.append((line + "\n", row))
    return rows


def read_rows(workdir: epath.PathLike) -> list[dict]:
    """The rows of `workdir/metrics.jsonl`, in order; [] if there is none. Raises ValueError on a broken line inside."""
    return [row for _, row in _parse(epath.Path(workdir) / "metrics.jsonl")]


def _readable(row: dict) -> str:
    """One sample as text: a line for a plain value, an indented line for each record of a list of records."""

    def text(value) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    parts = [f"==== step {row['step']} " + "=" * 60]
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
            parts.append(f"{key}:")
            parts += ["    " + " | ".join(f"{k} {text(v)}" for k, v in record.items()) for record in value]
        elif key != "step":
            shown = text(value)
            parts.append(f"{key}:\n    " + shown.replace("\n", "\n    ") if "\n" in shown else f"{key}: {shown}")
    return "\n".join(parts) + "\n\n"


class _LineFile:
    """A text file that grows: appended to where that is possible, else kept in memory and rewritten by `flush`."""

    def __init__(self, path: epath.Path, kept: list[str]):
        self.path, self._dirty = path, False
        text = "".join(kept)
        if path.exists() and path.read_text() != text:
            if _is_local(path):
                temporary = path.parent / (path.name + ".tmp")
                temporary.write_text(text)
                temporary.replace(path)
            else:
                path.write_text(text)
        self._kept = None if _is_local(path) else list(kept)
        self._file: TextIO | None = path.open("a") if _is_local(path) else None

    def add(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
        else:
            self._kept.append(text)
            self._dirty = True

    def flush(self) -> None:
        if self._dirty:
            self.path.write_text("".join(self._kept))
            self._dirty = False

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


class MetricsWriter:
    """Writes rows of numbers and samples of text to a workdir; does nothing on processes other than 0.

    On creation every row of a step after `resume_step` is dropped (those steps are about to be run again), as is a last
    line that was cut short, so that a resumed run has each row once.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int):
        """Opens the files.

        Args:
          workdir: directory, created if absent; a local path or an object store's URL.
          resume_step: the step of the checkpoint that was restored; -1 for a run that starts from nothing.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)

        def before(name: str) -> list[tuple[str, dict]]:
            return [(line, row) for line, row in _parse(workdir / name) if row["step"] <= resume_step]

        self._metrics = _LineFile(workdir / "metrics.jsonl", [line for line, _ in before("metrics.jsonl")])
        samples = before("samples.jsonl")
        self._samples = _LineFile(workdir / "samples.jsonl", [line for line, _ in samples])
        self._text = _LineFile(workdir / "samples.txt", [_readable(row) for _, row in samples])
        self._board = None
        if _is_local(workdir):
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                pass
            else:
                self._board = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, row: dict) -> None:
        """Adds the line `{"step": step, **row}`: floats exact, NaN and infinities null, arrays as lists.

        Raises ValueError for an array of more than 4096 elements and TypeError for what has no JSON form.
        """
        if not self._active:
            return
        line = _line(step, row)
        self._metrics.add(line)
        if self._board is not None:
            for name, value in json.loads(line).items():
                if name != "step" and isinstance(value, (bool, int, float)):
                    self._board.add_scalar(name, float(value), step)

    def write_samples(self, step: int, samples: list[dict]) -> None:
        """Adds one line a sample to `samples.jsonl`, and the same as readable text to `samples.txt`."""
        if not self._active:
            return
        for sample in samples:
            line = _line(step, sample)
            self._samples.add(line)
            self._text.add(_readable(json.loads(line)))

    def flush(self) -> None:
        """On object stores rewrites the files with all rows so far; elsewhere every row is on disk already."""
        if self._active:
            for file in (self._metrics, self._samples, self._text):
                file.flush()
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        """Flushes and closes."""
        if self._active:
            for file in (self._metrics, self._samples, self._text):
                file.close()
            if self._board is not None:
                self._board.close()
            self._active = False

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Progress:
    """A tqdm bar on a terminal; elsewhere one plain line at the first and last step and now and then between."""

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        name: str = "train",
        every: int = 0,
        seconds: float = 10.0,
        force: bool = False,
        stream: TextIO | None = None,
    ):
        """Starts counting.

        Args:
          total: number of steps.
          initial: steps done before this process started.
          name: what stands at the beginning of the line.
          every: print a plain line at multiples of this step; 0 leaves it to `seconds`.
          seconds: print a plain line when the last one is this old.
          force: draw the bar even if `stream` is no terminal.
          stream: default stderr.
        """
        self._total, self._name, self._every, self._seconds = total, name, every, seconds
        self._stream = sys.stderr if stream is None else stream
        self._step, self._initial = initial, initial
        self._start = time.monotonic()
        self._printed_at: float | None = None
        self._active = jax.process_index() == 0
        self._bar = None
        if self._active and (force or self._stream.isatty()):
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=name, file=self._stream, dynamic_ncols=True)

    def update(self, step: int, numbers: dict) -> None:
        """Says that `step` steps are done, with `numbers` (name -> scalar) beside it."""
        if not self._active:
            return
        shown = {k: v if isinstance(v, str) else f"{float(v):.4g}" for k, v in numbers.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        if self._bar is None:
            now = time.monotonic()
            due = self._printed_at is None or step >= self._total or now - self._printed_at >= self._seconds
            if due or (self._every and step % self._every == 0):
                pace = (now - self._start) / max(step - self._initial, 1)
                text = " ".join(f"{k}={v}" for k, v in shown.items())
                self._stream.write(f"{self._name} {step}/{self._total} {text} ({pace:.3g} s/step)\n")
                self._stream.flush()
                self._printed_at = now

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._active = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()
