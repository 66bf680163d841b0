"""The notice that this machine will be taken away: SIGTERM, turned into a flag that the loop looks at.

A loop looks often (`Notice.check`): between segments of a rollout, at the end of a phase of a step, between the parts
of an evaluation. `Stopped` then leads out of whatever is unfinished, to where the last whole step is saved.
"""

import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils


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
    has seen counts for all. (It takes the place of the handler that `jax.distributed` installs.)
    """

    def __init__(self):
        self._seen = False
        self._before = None

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._remember) or signal.SIG_DFL
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _remember(self, *_) -> None:
        self._seen = True

    def requested(self) -> bool:
        """Whether a process has got the notice. With several processes all must call: they answer alike."""
        self._seen = on_any_process(self._seen)
        return self._seen

    def check(self, phase: str) -> None:
        """Raises `Stopped` if a process has got the notice; `phase` says what is being done."""
        if self.requested():
            raise Stopped(phase)
