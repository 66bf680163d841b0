"""One killable comparison process: requests as JSON lines on stdin, replies as JSON lines on stdout.

    request  {"answer": "...", "reference": "..."}
    reply    {"equal": true | false | null, "retire": true | false}      null: the comparison raised
    first    {"ready": true}

A comparison ends by the kernel's hand where it does not end by itself: two timers whose signals keep their default
action, so that a loop inside C code or one that swallows exceptions is stopped too, and so that a busy worker ends
within its deadline even if nobody is left to kill it. An idle one ends when its stdin is closed. Imports neither jax
nor numpy nor torch; `pool` starts it as `python -m tto_jax.verifier.worker CPU_SECONDS WALL_SECONDS MEMORY_MB`.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO

Equal = Callable[[str, str], bool]

CPU_SIGNAL, WALL_SIGNAL = signal.SIGPROF, signal.SIGALRM  # a worker that one of them ended ran out of time


def main() -> None:
    """Serves `symbolic.equal`."""
    serve(_symbolic)


def serve(load: Callable[[], Equal]) -> None:
    """Answers requests until stdin ends; limits are the program's three arguments.

    Args:
        load: imports and tries what compares; what it raises is an error of the environment, not of an answer.
    """
    cpu_seconds, wall_seconds, memory_mb = map(float, sys.argv[1:])
    requests, replies = _private_streams()
    equal = load()
    ceiling = _limit_resources(int(memory_mb * 2**20))
    _reply(replies, ready=True)
    _silence(1, 2)
    for line in requests:
        request = json.loads(line)
        _set_timers(cpu_seconds, wall_seconds)
        verdict = _guarded(equal, request["answer"], request["reference"])
        _set_timers(0, 0)
        # What a comparison left behind (caches) must not make the next one run out of memory.
        _reply(replies, equal=verdict, retire=ceiling is not None and _address_space() > ceiling)


def _symbolic() -> Equal:
    """After a first comparison, which loads what is loaded lazily; if it were wrong, every later one would be too."""
    from tto_jax.verifier import symbolic

    if not symbolic.equal(r"\frac{\sqrt{8}}{2}", r"\sqrt{2}") or symbolic.equal(r"\sqrt{2}", r"\frac{\pi}{2}"):
        raise RuntimeError("symbolic comparison does not work here: sqrt(8)/2 must equal sqrt(2), and sqrt(2) not pi/2")
    return symbolic.equal


def _guarded(equal: Equal, answer: str, reference: str) -> bool | None:
    """None if `equal` raised: SystemExit, RecursionError and MemoryError included."""
    try:
        return bool(equal(answer, reference))
    except BaseException:
        return None


def _private_streams() -> tuple[BinaryIO, BinaryIO]:
    """stdin and stdout under other numbers: what a library prints or reads can't reach the protocol."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _silence(0)
    os.dup2(2, 1)
    return requests, replies


def _silence(*descriptors: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _reply(replies: BinaryIO, **message) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


def _limit_resources(memory: int) -> int | None:
    """No core dump, nothing written to files, `memory` bytes more than now; returns the size at which to retire."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())  # a mask is inherited
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    start = _address_space()
    if start is None:
        return None
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = start + memory if hard == resource.RLIM_INFINITY else min(start + memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return (start + limit) // 2


def _address_space() -> int | None:
    """Bytes of this process's address space; None where there is no /proc (nothing there honours its limit either)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return None


def _set_timers(cpu_seconds: float, wall_seconds: float) -> None:
    """Arms both deadlines (0 disarms); the actions are set again each time, as a library may have changed them."""
    signal.signal(CPU_SIGNAL, signal.SIG_DFL)
    signal.signal(WALL_SIGNAL, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


if __name__ == "__main__":
    main()
