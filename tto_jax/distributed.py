"""Several processes: how they find each other, that they run the same thing, and what a run says at its start."""

import functools
import glob
import hashlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from jax.experimental import multihost_utils

from tto_jax import host

_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; on TPUs it is found by itself.")
_NUMBER = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_ID = flags.DEFINE_integer("process_id", None, "Number of this process.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 20, "How long a process may be silent before the others end.", lower_bound=5
)


def initialize() -> None:
    """Connects the processes of a page; to be called before anything else of jax. One process by itself: does nothing.

    On TPU hosts (VMs and GKE) jax finds the others; elsewhere the three flags say who they are.
    """
    given = (_ADDRESS.value, _NUMBER.value, _ID.value)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise app.UsageError("--coordinator_address, --num_processes and --process_id go together: give all three")
        if not _ID.value < _NUMBER.value:
            raise app.UsageError(f"--process_id={_ID.value} must be below --num_processes={_NUMBER.value}")
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=_HEARTBEAT.value)
    elif _has_tpu() and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT.value)


def ends_all(main: Callable) -> Callable:
    """`main` of a page, such that a process that fails ends at once, and the others notice within a heartbeat.

    A normal exit would wait for the others, which wait for this one in some collective.
    """

    @functools.wraps(main)
    def run(argv):
        try:
            return main(argv)
        except BaseException as error:
            ended_well = isinstance(error, SystemExit) and not error.code
            if not jax.distributed.is_initialized() or jax.process_count() == 1 or ended_well:
                raise
            traceback.print_exc()
            _warn(f"process {jax.process_index()} of {jax.process_count()} ends; the others will notice")
            # Collectives on CPUs raise a ValueError that begins with a status: "UNKNOWN: Gloo ...".
            if isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]+: ", str(error)):
                # Perhaps another process is gone. Which one, the coordination service says, and ends this one with it.
                _warn(
                    f"waiting {_HEARTBEAT.value + 10} s for the coordination service to say whether a process is lost"
                )
                time.sleep(_HEARTBEAT.value + 10)
            os._exit(1)

    return run


def _warn(text):
    print(text, file=sys.stderr, flush=True)


def _has_tpu():
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def say(text: str) -> None:
    """A line for the reader, from process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def banner(mesh: jax.sharding.Mesh | None) -> str:
    """Processes, devices, mesh and versions, for the start of a run."""
    device = jax.devices()[0]
    sizes = "1 device" if mesh is None else " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    versions = ", ".join(f"{name} {version}" for name, version in host.versions().items())
    return (
        f"hosts    {jax.process_count()} processes, {jax.device_count()} devices ({device.device_kind}), mesh {sizes}\n"
        f"versions {versions}, commit {host.commit()[:12]}"
    )


def check_same(what: dict[str, str]) -> None:
    """Raises RuntimeError on every process if `what` (name -> text) differs between them, naming what and where."""
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(text.encode()).digest() for _, text in sorted(what.items())]
    mine = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    all_of_them = multihost_utils.process_allgather(mine)
    for index, name in enumerate(sorted(what)):
        others = [p for p, theirs in enumerate(all_of_them) if (theirs[index] != all_of_them[0][index]).any()]
        if others:
            raise RuntimeError(
                f"processes {others} have another {name} than process 0 (here, on process {jax.process_index()}: "
                f"{what[name][:200]}): all must run the same code and configuration"
            )
