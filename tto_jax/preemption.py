"""The notice that this machine will be taken away: SIGTERM, turned into a flag that the loop looks at.

A loop looks often (`Notice.check`): between segments of a rollout, at the end of a phase of a step, between the parts
of an evaluation. `Stopped` then leads out of whatever is unfinished, to where the last whole step is saved. The work
between two looks cannot be given up: a call on the device, a compilation. Where it takes longer than `PATIENCE`, the
process ends in the middle of it, as soon as the last whole step is on the disk; a loop that asks `was_slow` at the end
of a step and saves if so has it there. So at most one step is lost, and the end comes within `PATIENCE` and what it
takes to write a checkpoint: within 30 s if that is 15.

SIGTERM is what Kubernetes sends to the containers of a node that goes, and what the shutdown of a preempted TPU VM
sends to its processes. Whoever learns of it in another way (the metadata server) sends SIGTERM to the page.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

PATIENCE = 15.0  # seconds that a loop may go without a look before a notice ends the process
EXIT_CODE = 128 + signal.SIGTERM  # of a page that a notice stopped: it is not done, to start it again goes on


def on_any_process(flag: bool) -> bool:
    """Whether `flag` is set on one of the processes, which all must call this."""
    if jax.process_count() == 1:
        return flag
    with jax.transfer_guard("allow"):
        return bool(multihost_utils.process_allgather(np.array(flag)).any())


class Stopped(Exception):
    """A notice was seen in a phase; nothing that a checkpoint holds has been changed by the unfinished work."""

    def __init__(self, phase: str):
        super().__init__(f"stopped in phase {phase}")
        self.phase = phase


class Notice:
    """While it is open, SIGTERM ends nothing: it is remembered. A second one changes nothing.

    Signals reach Python in the main thread only; opened in another one, it never sees a notice. With several processes
    each may get its signal at another moment, or not at all: all look at the same places of their loops, and what one
    has seen counts for all. (It takes the place of the handler of `jax.distributed`, which is asked once a step.)
    """

    def __init__(self, may_end: Callable[[], bool] = lambda: False):
        """`may_end`: whether what was finished, the last whole step, is safe; a thread asks while the loop hangs."""
        self._may_end = may_end
        self._seen = False
        self._before = None
        self._heard = threading.Event()
        self.begin()

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._remember) or signal.SIG_DFL
            # Python runs a handler between two of its own instructions; the descriptor is written to at once.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, name="preemption", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._before)
            self._heard.set()
            os.close(self._write)
            self._watcher.join()
            os.close(self._read)

    def _remember(self, *_) -> None:
        self._seen = True

    def _watch(self) -> None:
        """Waits for the signal; then ends the process if the loop does not look and nothing is lost by it."""
        while (numbers := os.read(self._read, 64)) and signal.SIGTERM not in numbers:
            pass
        if numbers and not self._heard.wait(PATIENCE):
            while not self._may_end():
                if self._heard.wait(0.5):
                    return
            print(
                f"stopped after {PATIENCE:g} s in which the work did not come to an end: what was finished is saved, "
                "the same command goes on from there",
                flush=True,
            )
            os._exit(EXIT_CODE)

    def begin(self) -> None:
        """A step begins: `was_slow` is about what comes from here on."""
        self._looked, self._longest = time.monotonic(), 0.0

    def was_slow(self) -> bool:
        """Whether the loop of a process has gone for `PATIENCE` without a look since `begin`. All must call."""
        return on_any_process(max(self._longest, time.monotonic() - self._looked) > PATIENCE)

    def requested(self) -> bool:
        """Whether a process has got the notice. With several processes all must call: they answer alike."""
        self._seen = on_any_process(self._seen)
        now = time.monotonic()
        self._longest, self._looked = max(self._longest, now - self._looked), now
        if self._seen:
            self._heard.set()
        return self._seen

    def check(self, phase: str) -> None:
        """Raises `Stopped` if a process has got the notice; `phase` says what is being done."""
        if self.requested():
            raise Stopped(phase)
