"""Peak memory of a call. No jax here: a peer's process measures itself with the same functions."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SOURCES = ("VmHWM", "ru_maxrss", "memory_stats", "torch.cuda")  # where a peak was read


def reset() -> bool:
    """Give freed memory back and let the peak begin at what is resident now; whether the system lets us."""
    gc.collect()
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(AttributeError, OSError):  # another C library: what it keeps counts as used
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak(was_reset: bool) -> tuple[int, str]:
    """Largest resident size of this process in bytes, since `reset` or (ru_maxrss) since it began, and its source."""
    if was_reset:
        return _status("VmHWM"), "VmHWM"
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "ru_maxrss"


def _status(name):
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024
