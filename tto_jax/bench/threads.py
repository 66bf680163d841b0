"""As many CPUs as asked, for this process, its peers and everything in them. To be called before jax starts."""

import os
import sys
from collections.abc import Sequence

MARK = "TTO_BENCH_THREADS"  # set in the process that runs on so many CPUs


def limit(number: int, argv: Sequence[str]) -> None:
    """Replaces this process by the same page on `number` CPUs, unless it is that one.

    Libraries decide how many threads they use when they start, by the CPUs that they may run on and by these
    variables, so the page starts again. By hand the same is, for one thread:

        NPROC=1 OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 python -m tto_jax.bench ...

    Raises ValueError if there are not so many CPUs, or the system cannot bind a process to some.
    """
    if os.environ.get(MARK) == str(number):
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"--threads={number}: {sys.platform} cannot bind a process to CPUs; leave the flag out")
    cpus = sorted(os.sched_getaffinity(0))
    if not 1 <= number <= len(cpus):
        raise ValueError(f"--threads={number}: this process may run on {len(cpus)} CPUs; choose 1 to {len(cpus)}")
    os.sched_setaffinity(0, cpus[:number])
    environment = os.environ | {MARK: str(number), "NPROC": str(number)}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(number))
    if number == 1:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "tto_jax.bench", *argv], environment)


def available() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
