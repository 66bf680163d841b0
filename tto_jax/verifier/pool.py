"""Judges answers: by their text where that decides, otherwise in killable worker processes.

What a model wrote can hang a symbolic comparison, crash it or eat all memory. Each comparison therefore runs in a
`worker`, with limits on CPU time, wall-clock time and address space; one that exceeds them is wrong, is named as such
in its verdict, and costs no other answer anything, because a worker holds one comparison at a time.
"""

import collections
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tto_jax.verifier import equality
from tto_jax.verifier.worker import CPU_SIGNAL, WALL_SIGNAL

Pair = tuple[str, str]  # (answer, reference)

_WORKER_PROGRAM = ("-m", "tto_jax.verifier.worker")
_START_SECONDS = 180.0  # until a worker has imported its libraries; wall clock, on a machine that may be busy
_GRACE_SECONDS = 2.0  # a worker's own wall-clock timer comes first; the pool kills one that was stopped, say
_MOST_WORKERS = 32  # by default: each holds some 100 MB
_REMEMBERED_PAIRS = 2**15
_REMEMBERED_CHARACTERS = 2**10  # of a pair; longer ones hardly ever repeat
_WORST_FIRST = ("timeout", "crash", "symbolic", "text")


class Verdict(NamedTuple):
    """Of one answer."""

    correct: bool
    how: str  # "text": without a worker; "symbolic"; wrong by force: "timeout", "crash" (raised, died, out of memory)


class Pool:
    """Worker processes that are started when first needed, reused, and replaced when they die.

    Workers are fresh interpreters, not forks: the program around may hold jax, threads and locks. Leaving the `with`
    block, `close()` and the end of the program end them; if the program is killed they end by themselves, within the
    limits of what they are comparing. One caller at a time; others wait.

    Args:
        workers: at most so many processes; None: as many as usable cores, at most 32.
        cpu_seconds: of one comparison. CPU time, so that the load of the machine does not decide what is right.
        wall_seconds: of one comparison: ends what waits without computing. Generous, as it depends on the load.
        memory_mb: address space of a worker beyond what it starts with, in MiB (Linux only).
        _program: a stand-in for the worker's program, as arguments of the interpreter; for tests.

    Raises ValueError unless all limits are positive and wall_seconds is at least cpu_seconds.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        cpu_seconds: float = 2.0,
        wall_seconds: float = 20.0,
        memory_mb: int = 1024,
        _program: Sequence[str] = _WORKER_PROGRAM,
    ):
        self._size = min(_usable_cores(), _MOST_WORKERS) if workers is None else workers
        for name, value in {"workers": self._size, "cpu_seconds": cpu_seconds, "memory_mb": memory_mb}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite")
        if not cpu_seconds <= wall_seconds < math.inf:
            raise ValueError(f"wall_seconds={wall_seconds} must be finite and at least cpu_seconds={cpu_seconds}")
        self._command = (*_program, str(cpu_seconds), str(wall_seconds), str(memory_mb))
        self._wall_seconds = wall_seconds
        self._lock = threading.Lock()
        self._remembered: collections.OrderedDict[Pair, Verdict] = collections.OrderedDict()
        self._workers: list[_Worker] = []
        self._end = weakref.finalize(self, _kill_all, self._workers)  # runs at the end of the program, too

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Kills all workers and waits for their end, after a call in progress; a closed pool judges nothing."""
        with self._lock:
            self._end()

    def judge(self, items: Sequence[tuple[str, tuple[str, ...]]]) -> list[Verdict]:
        """Compares every answer with its references; right if equal to any of them.

        Equal pairs are compared once. Verdicts of workers are remembered across calls, the most recent 32,768, except
        those that the state of the machine may have caused: the wall clock ran out, or someone else killed the worker.

        Args:
            items: (answer, its valid references).

        Returns:
            One verdict an item, in their order.

        Raises:
            ValueError: an item that is not a string and a tuple of one or more strings; a closed pool.
            RuntimeError: a worker could not start; with what it wrote to stderr.
        """
        _check(items)
        with self._lock:
            if not self._end.alive:
                raise ValueError("this pool is closed: make another one")
            found = {pair: self._without_worker(pair) for pair in dict.fromkeys(_pairs(items))}
            self._ask_workers(_undecided(items, found), found)
            return [_best(found[pair] for pair in _pairs([item])) for item in items]

    def _without_worker(self, pair: Pair) -> Verdict | None:
        if pair in self._remembered:
            self._remembered.move_to_end(pair)
            return self._remembered[pair]
        equal = equality.decide(*pair)
        return None if equal is None else Verdict(equal, "text")

    def _ask_workers(self, pairs: Sequence[Pair], found: dict[Pair, Verdict | None]) -> None:
        """Puts the verdicts of `pairs` into `found`. No worker is busy afterwards, whatever happens."""
        waiting = collections.deque(pairs)
        try:
            while waiting or any(worker.pair for worker in self._workers):
                self._staff(waiting)
                for worker in self._awaited():
                    pair, report = worker.pair, worker.report()
                    if report:
                        found[pair] = report.verdict
                        self._remember(pair, report)
        except BaseException:  # an interrupt, too: nobody will read what the workers have in hand
            _kill_all(self._workers)
            raise

    def _staff(self, waiting: collections.deque[Pair]) -> None:
        """Replaces the dead, starts as many as there is work for, gives each idle one a pair."""
        # One that dies with something in hand is not dropped before it has been reported.
        self._workers[:] = [worker for worker in self._workers if worker.owes() or worker.alive()]
        busy = sum(worker.pair is not None for worker in self._workers)
        for _ in range(len(self._workers), min(self._size, busy + len(waiting))):
            self._workers.append(_Worker(self._command))
        for worker in self._workers:
            if waiting and worker.ready and not worker.pair:
                worker.send(waiting.popleft(), self._wall_seconds + _GRACE_SECONDS)

    def _awaited(self) -> list["_Worker"]:
        """Waits; then those that have written something, have died or have run out of time."""
        workers = {worker.descriptor: worker for worker in self._workers if worker.owes()}
        poll = select.poll()
        for descriptor in workers:
            poll.register(descriptor, select.POLLIN)
        patience = min(worker.deadline for worker in workers.values()) - time.monotonic()
        # No longer than a second: an interrupt that another thread received is seen between two waits only.
        written = {descriptor for descriptor, _ in poll.poll(1000 * min(max(patience, 0), 1))}
        return [worker for descriptor, worker in workers.items() if descriptor in written or worker.late()]

    def _remember(self, pair: Pair, report: "_Report") -> None:
        if report.lasting and sum(map(len, pair)) <= _REMEMBERED_CHARACTERS:
            self._remembered[pair] = report.verdict
            if len(self._remembered) > _REMEMBERED_PAIRS:
                self._remembered.popitem(last=False)


class _Report(NamedTuple):
    verdict: Verdict
    lasting: bool  # the same would come out again


class _Worker:
    """The pool's end of one process: starting, then idle or busy with a pair, then dead."""

    def __init__(self, command: Sequence[str]):
        self.ready = False
        self.pair: Pair | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - not a pipe, which would have to be drained
        self._process = subprocess.Popen(
            [sys.executable, "-P", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=os.sep,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is the caller's
        )
        self.descriptor = self._process.stdout.fileno()

    def owes(self) -> bool:
        """A report will come: that it is ready, or of its pair."""
        return self.pair is not None or not self.ready

    def alive(self) -> bool:
        if self._process.poll() is not None:
            self.kill()  # closes its files
        return self._process.returncode is None

    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    def send(self, pair: Pair, seconds: float) -> None:
        self.pair, self.deadline = pair, time.monotonic() + seconds
        request = json.dumps(dict(zip(("answer", "reference"), pair))).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # then it is dead, which the report says
            self._process.stdin.write(request)
            self._process.stdin.flush()

    def report(self) -> _Report | None:
        """What has become of its pair, once it has written, died or is late; None if it only became ready."""
        late = self.late()
        if late:
            self._process.kill()
        line = os.read(self.descriptor, select.PIPE_BUF)  # a reply is short: it arrives whole
        if not self.ready and not line:
            raise RuntimeError(self._why_not_started())
        reply = json.loads(line or "{}")
        if late or not line or reply.get("retire"):
            self.kill()
        starting, self.ready = not self.ready, True
        self.pair, self.deadline = None, math.inf
        if starting:
            return None
        if not line:
            return _report_of_death(late, self._process.returncode)
        equal = reply["equal"]
        return _Report(Verdict(False, "crash") if equal is None else Verdict(equal, "symbolic"), lasting=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):  # closing flushes what it did not read
                file.close()

    def _why_not_started(self) -> str:
        self._process.kill()
        self._errors.seek(0)
        said = self._errors.read()[-4000:].decode(errors="replace").strip()
        code = self._process.wait()
        return f"a worker ended with code {code} (or took {_START_SECONDS} s) before it was ready; it wrote:\n{said}"


def _report_of_death(late: bool, code: int) -> _Report:
    how = "timeout" if late or -code in (CPU_SIGNAL, WALL_SIGNAL) else "crash"
    return _Report(Verdict(False, how), lasting=not late and -code not in (WALL_SIGNAL, signal.SIGKILL))


def _check(items: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    for index, (answer, references) in enumerate(items):
        if not isinstance(answer, str) or not isinstance(references, tuple) or not references:
            raise ValueError(f"item {index}: ({answer!r}, {references!r}) must be a string and a tuple of references")
        if not all(isinstance(reference, str) for reference in references):
            raise ValueError(f"item {index}: references {references!r} must be strings")


def _pairs(items: Sequence[tuple[str, tuple[str, ...]]]) -> list[Pair]:
    return [(answer, reference) for answer, references in items for reference in references]


def _undecided(items: Sequence[tuple[str, tuple[str, ...]]], found: dict[Pair, Verdict | None]) -> list[Pair]:
    """Pairs of unknown verdict, each once, of the items that have no right pair yet."""
    undecided: dict[Pair, None] = {}
    for item in items:
        verdicts = {pair: found[pair] for pair in _pairs([item])}
        if not any(verdict and verdict.correct for verdict in verdicts.values()):
            undecided |= dict.fromkeys(pair for pair, verdict in verdicts.items() if verdict is None)
    return list(undecided)


def _best(verdicts: Iterable[Verdict | None]) -> Verdict:
    """A right one if there is one; otherwise what may have hidden one: a timeout before a crash before the rest."""
    return min(filter(None, verdicts), key=lambda verdict: (not verdict.correct, _WORST_FIRST.index(verdict.how)))


def _environment() -> dict[str, str]:
    """The caller's import path, whatever put it there, and nothing else of its environment but what Python needs.

    Hashes are fixed: the order of a symbolic expression's terms, and with it a verdict, must not depend on the worker.
    """
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    return {**kept, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
