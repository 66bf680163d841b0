"""A run's numbers: `metrics.jsonl`, `samples.jsonl` with a readable `samples.txt`, TensorBoard, and a progress line.

On object stores, where nothing can be appended to, each of the three is a folder of parts that are written once.
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import absl.logging
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
    """The lines of a .jsonl file, or of its parts, with what they say; a last line that was cut short is left out."""
    if not path.exists():
        return []
    texts = [part.read_text() for part in _parts(path)] if path.is_dir() else [path.read_text()]
    lines = "".join(texts).splitlines()
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


def _parts(folder: epath.Path) -> list[epath.Path]:
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: path.name)


def read_rows(workdir: epath.PathLike) -> list[dict]:
    """The rows of `workdir/metrics.jsonl` in order; [] if there is none. Raises ValueError on a broken line inside."""
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


class _File:
    """A text that grows by entries, on a disk: a file that is appended to."""

    def __init__(self, path: epath.Path, kept: list[str]):
        self.count, text = len(kept), "".join(kept)
        if path.exists() and path.read_text() != text:
            temporary = path.parent / (path.name + ".tmp")
            temporary.write_text(text)
            temporary.replace(path)
        self._file: TextIO = path.open("a")

    def add(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
        self.count += 1

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Parts:
    """The same on an object store: a folder of objects, each named by the number of entries up to its end."""

    def __init__(self, folder: epath.Path, count: int):
        self.count, self._folder, self._new = count, folder, []
        for part in _parts(folder) if folder.exists() else ():
            if int(part.name) > self.count:
                part.unlink()

    def add(self, text: str) -> None:
        self._new.append(text)
        self.count += 1

    def flush(self) -> None:
        if self._new:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{self.count:09d}").write_text("".join(self._new))
            self._new = []

    def close(self) -> None:
        pass


class MetricsWriter:
    """Writes rows of numbers and samples of text to a workdir; does nothing on processes other than 0.

    What was written after the checkpoint from which a run is resumed is dropped on creation (those steps are about to
    be run again): a resumed run has each row once. A checkpoint holds what `flush` said before it was saved.
    """

    def __init__(self, workdir: epath.PathLike, written: Sequence[int] = (0, 0)):
        """Opens the files.

        Args:
          workdir: directory, created if absent; a local path or an object store's URL.
          written: rows and samples that stay, as said by `flush`; none, for a run that starts from nothing.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)

        def before(name: str, number: int) -> list[tuple[str, dict]]:
            found = _parse(workdir / name)
            if len(found) < number:
                absl.logging.warning("%s has %d entries, not %d: some were lost", workdir / name, len(found), number)
            return found[:number]

        def grow(name: str, number: int, kept: list[str]) -> _File | _Parts:
            return _File(workdir / name, kept) if _is_local(workdir) else _Parts(workdir / name, number)

        rows, samples = before("metrics.jsonl", written[0]), before("samples.jsonl", written[1])
        self._metrics = grow("metrics.jsonl", written[0], [line for line, _ in rows])
        self._samples = grow("samples.jsonl", written[1], [line for line, _ in samples])
        self._text = grow("samples.txt", written[1], [_readable(row) for _, row in samples])
        self._board = None
        if _is_local(workdir):
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                pass
            else:
                purge = rows[-1][1]["step"] + 1 if rows else 0
                self._board = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=purge)

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

    def flush(self) -> list[int]:
        """Puts everything so far on the disk, or on an object store as new parts; returns how many rows and samples."""
        if not self._active:
            return [0, 0]
        for file in (self._metrics, self._samples, self._text):
            file.flush()
        if self._board is not None:
            self._board.flush()
        return [self._metrics.count, self._samples.count]

    def close(self) -> None:
        """Flushes and closes."""
        if self._active:
            self.flush()
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
