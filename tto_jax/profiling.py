"""Where a step's time goes: seconds of its phases, and a trace for XProf with the phases named in it."""

import re
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import jax
from etils import epath

from tto_jax import preemption

# In the order in which they come. `report` is what follows the update: metrics, samples.
PHASES = ("data", "think", "answer", "grade", "credit", "score", "update", "report")


class Clock:
    """Seconds of each phase of a step; where one ends, the step may be given up for a stop."""

    def __init__(self, stop: preemption.Notice, step: int):
        stop.begin()
        self._begin = self._last = time.perf_counter()
        self._phases, self._stop = {}, stop
        self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._step.__enter__()
        self._enter(PHASES[0])

    def _enter(self, phase: str) -> None:
        self._open = jax.profiler.TraceAnnotation(phase)
        self._open.__enter__()

    def mark(self, phase: str, result=None, may_stop: bool = True) -> None:
        """End a phase, once its result is there; the next one of `PHASES` begins."""
        jax.block_until_ready(result)
        now = time.perf_counter()
        self._phases[phase], self._last = now - self._last, now
        self._open.__exit__(None, None, None)
        self._enter(PHASES[PHASES.index(phase) + 1])
        if may_stop:
            self._stop.check(phase)

    def total(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self._begin

    def seconds(self) -> dict:
        """`seconds/PHASE` of every phase, and of the step."""
        return {f"seconds/{name}": value for name, value in self._phases.items()} | {"seconds/step": self.total()}

    def close(self) -> None:
        """The step ends, in the trace."""
        for annotation in (self._open, self._step):
            annotation.__exit__(None, None, None)


def parse_steps(text: str, last: int) -> tuple[int, ...]:
    """The steps that `text` names: numbers and ranges FIRST:LAST (both included), with commas between; "" names none.

    Raises ValueError for what is none of it, and for steps that a run of `last` steps does not have.
    """
    steps = set()
    for item in text.split(",") if text else ():
        found = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", item)
        begin, end = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= begin <= end <= last:
            raise ValueError(
                f"profile_steps={text!r}: {item!r} names no steps of this run, which has 1 to {last}; give numbers and "
                "ranges FIRST:LAST with commas between, such as 3 or 3:5 or 3,20:22"
            )
        steps |= set(range(begin, end + 1))
    return tuple(sorted(steps))


class Profile:
    """Traces of the named steps, one for each row of consecutive ones: `WORKDIR/profile`, a folder for XProf.

    Every process writes what it saw. Steps that were done before the run was resumed are not there to be traced.
    """

    def __init__(self, workdir: epath.Path, steps: Collection[int]):
        self._folder, self._steps = workdir / "profile" / "plugins" / "profile", steps
        self._traced: list[int] = []
        self._scratch: tempfile.TemporaryDirectory | None = None

    def before(self, step: int) -> None:
        """A step begins: a trace begins or ends with it."""
        if self._traced and step not in self._steps:
            self._finish()
        if step in self._steps:
            if not self._traced:
                self._scratch = tempfile.TemporaryDirectory()
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # every call of Python: large, and slow
                jax.profiler.start_trace(self._scratch.name, profiler_options=options)
            self._traced.append(step)

    def _finish(self) -> None:
        """Ends the trace and puts it into the workdir, which may be on an object store."""
        jax.profiler.stop_trace()
        first, last, self._traced = self._traced[0], self._traced[-1], []
        target = self._folder / (f"step_{first}" if first == last else f"steps_{first}-{last}")
        target.mkdir(parents=True, exist_ok=True)
        with self._scratch as scratch:
            for path in Path(scratch).rglob("*.xplane.pb"):
                (target / f"process_{jax.process_index()}.xplane.pb").write_bytes(path.read_bytes())

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._traced:
            self._finish()
