"""Seconds, CPU seconds, compilation and memory of the sides of a comparison, measured in turns in one run."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.monitoring
import numpy as np

from tto_jax.bench import memory
from tto_jax.bench.limits import Work

LEFT_OUT = 2  # first calls: they compile and touch new memory
COMPILATION = "/jax/core/compile/"  # the events that tracing, lowering and compilation report their seconds by
COMPILED = COMPILATION + "backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of n calls, and the median of their CPU seconds (all threads of the process)."""

    median: float
    low: float
    high: float
    n: int
    cpu: float | None = None

    @classmethod
    def of(cls, seconds: Sequence[float], cpu: Sequence[float] = ()) -> "Timing":
        """Median, smallest and largest."""
        return cls(
            statistics.median(seconds),
            min(seconds),
            max(seconds),
            len(seconds),
            statistics.median(cpu) if cpu else None,
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Largest number of bytes held at a time; on CPU by the whole process, on an accelerator by arrays and programs."""

    peak: int  # in calls after the first
    first_call: int  # with compilation
    source: str  # where it was read, one of `memory.SOURCES`; those but VmHWM never fall while the process lives


class Probe:
    """Peak memory of this process or, where it has one, of its accelerator."""

    def __init__(self):
        self._was_reset = False

    def reset(self) -> None:
        """The peak begins at what is held now, where the system allows that."""
        self._was_reset = memory.reset()

    def peak(self) -> tuple[int, str]:
        """Bytes, and where they were read."""
        found = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in found:
            return found["peak_bytes_in_use"], "memory_stats"
        return memory.peak(self._was_reset)


@dataclasses.dataclass(frozen=True)
class Side:
    """Something to measure: it does `work` and handles so many `tokens` a call."""

    name: str
    call: Callable[[], Any]
    work: Work
    tokens: int = 0  # sampled, trained or written; 0 where a side has none
    clock: Callable[[], float] = time.process_time  # CPU seconds so far, of the process that works
    probe: Any = dataclasses.field(default_factory=Probe)  # its memory: `reset()` and `peak()`


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one side."""

    name: str
    timing: Timing
    work: Work
    tokens: int = 0
    memory: Memory | None = None
    compile_s: float | None = None  # tracing, lowering, compiling in the first call
    compiled_later: int = 0  # programs compiled while it was timed: 0, or the median is of something else


@dataclasses.dataclass(frozen=True)
class Result:
    """What one target measured at one shape."""

    rows: tuple[Row, ...]
    ratios: dict[str, float]  # of median times
    difference: float  # largest, between the sides' results
    tolerance: float  # what it had to stay below
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # what else a reader of a record needs


def measure(sides: Sequence[Side], calls: int, left_out: int = LEFT_OUT) -> tuple[Row, ...]:
    """Seconds of each side, called in turns, so that a slow moment of the machine hits all of them.

    Before that each side is called `left_out` times by itself: the first call compiles, the memory is that of the
    later ones. With `left_out` 0 neither is known.
    """
    begun = {side.name: _begin(side, left_out) for side in sides}
    seconds, cpu = ({side.name: [] for side in sides} for _ in range(2))
    compiled = dict.fromkeys(seconds, 0)
    for _ in range(calls):
        for side in sides:
            with watch_compilation() as compilation:
                before, begin = side.clock(), time.perf_counter()
                jax.block_until_ready(side.call())
                seconds[side.name].append(time.perf_counter() - begin)
                cpu[side.name].append(side.clock() - before)
            compiled[side.name] += compilation.programs
    return tuple(
        Row(
            side.name,
            Timing.of(seconds[side.name], cpu[side.name]),
            side.work,
            side.tokens,
            *begun[side.name],
            compiled[side.name],
        )
        for side in sides
    )


def _begin(side, left_out):
    """The first calls of a side: its memory and the seconds of its compilation."""
    if not left_out:
        return None, None
    side.probe.reset()
    with watch_compilation() as compilation:
        jax.block_until_ready(side.call())
    first, _ = side.probe.peak()
    side.probe.reset()
    for _ in range(left_out - 1):
        jax.block_until_ready(side.call())
    peak, source = side.probe.peak()
    return Memory(peak, first, source), compilation.seconds


class Compilation:
    """What was compiled in a `with` block."""

    def __init__(self):
        self.programs = 0
        self._spans = []

    def add(self, event: str, duration: float) -> None:
        """An event of jax.monitoring that has just ended."""
        if event.startswith(COMPILATION):
            now = time.perf_counter()
            self._spans.append((now - duration, now))
            self.programs += event == COMPILED

    @property
    def seconds(self) -> float:
        """Of tracing, lowering and compiling; what lies inside of another is counted once."""
        total, end = 0.0, float("-inf")
        for low, high in sorted(self._spans):
            total += max(high - max(low, end), 0.0)
            end = max(end, high)
        return total


_watching: list[Compilation] = []
_listening = False


@contextlib.contextmanager
def watch_compilation() -> Iterator[Compilation]:
    """Counts the programs that are compiled inside, and their seconds."""
    global _listening
    if not _listening:  # listeners of jax.monitoring cannot be taken off again
        jax.monitoring.register_event_duration_secs_listener(_heard)
        _listening = True
    found = Compilation()
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.remove(found)


def _heard(event, duration, **_):
    for watching in _watching:
        watching.add(event, duration)


def largest_difference(results: Sequence[Any]) -> float:
    """Between the first result (arrays) and the others, as a share of the first one's largest number; 0 for one."""
    found = 0.0
    for result in results[1:]:
        for one, other in zip(jax.tree.leaves(results[0]), jax.tree.leaves(result)):
            one, other = (np.asarray(x, np.float64) for x in (one, other))
            found = max(found, float(np.abs(one - other).max() / np.abs(one).max()))
    return found


def ratios_to(rows: Sequence[Row], pairs: dict[str, str]) -> dict[str, float]:
    """How many times faster the second of each pair of sides is than the first, where both were measured."""
    median = {row.name: row.timing.median for row in rows}
    return {
        f"times faster than {slow}": median[slow] / median[fast]
        for slow, fast in pairs.items()
        if {slow, fast} <= set(median) and slow != fast
    }
