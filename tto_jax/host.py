"""What a page sets up on its host before any work."""

import ctypes
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
from absl import logging

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc, malloc.h
_PACKAGES = (
    *("tto-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers"),
    *("latex2sympy2-extended", "sympy"),
)


def set_up() -> None:
    """Called by a page before its work: only warnings on the terminal, memory that stays in the process, programs that
    are compiled once, and an end at SIGTERM until `preemption.Notice` says otherwise.
    """
    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    keep_compiled_programs()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `jax.distributed` would swallow it, for a loop that asks it


def keep_compiled_programs() -> None:
    """A persistent cache of compiled programs, below the user's cache folder; JAX_COMPILATION_CACHE_DIR moves it.

    Set and empty, that variable means none. Several processes get none by default, as jax lets only process 0 write:
    on a pod, give all hosts one folder that they share, such as gs://BUCKET/jax_cache. (A program is found again by its
    text, jax's version, the compiler's options and the kind of device; what compiles within a second is not kept.)
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and jax.process_count() == 1:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tto_jax" / "jax_cache"
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


def keep_freed_memory() -> None:
    """On CPU with glibc, keep freed memory in the process.

    XLA's large temporaries would otherwise go back to the system after every step; faulting them in again is up to half
    of a small step.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library: slower, not wrong
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20)):
        mallopt(option, value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The checkout's commit, with `+` if files differ from it; elsewhere TTO_COMMIT, or `unknown`."""
    if "TTO_COMMIT" in os.environ:  # set where a copy of a commit runs, without its repository
        return os.environ["TTO_COMMIT"]
    here = Path(__file__).parent

    def git(*args):
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
