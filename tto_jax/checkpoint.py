"""Checkpoints of a run, cached parameters, and the rule that a workdir belongs to one configuration.

What is saved is described beside it: dtype, shape and checksum of every array, under a seal. Orbax restores an array
with a flipped bit silently; here whatever comes back is what was saved, or an error says what is not.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from tto_jax import preemption

PyTree = Any
_RECORD = "record.json"
# Said by storage of itself, not of what is stored: such an error is no reason to give up a checkpoint.
_STORAGE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")


class Misfit(ValueError):
    """A checkpoint of another tree than the one that was asked for."""


class Damaged(RuntimeError):
    """A checkpoint that is not what was saved: truncated, with a flipped bit, without one of its files."""


class _NoOrbaxInfo(logging.Filter):
    """Drops what Orbax says below WARNING; it logs through absl's one logger, so its records are told by their file."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or f"orbax{os.sep}checkpoint" not in record.pathname


def _quiet_orbax() -> None:
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _NoOrbaxInfo) for f in logger.filters):
        logger.addFilter(_NoOrbaxInfo())


def _absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path))))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _checksum(x: jax.Array) -> jax.Array:
    """u32[]: the sum, modulo 2^32, of every element's bits mixed with its place in the array.

    A sum of integers has no order: it is the same on every mesh and for any number of processes, and no array is
    gathered for it. At a given place the mix is a bijection of the bits, so one changed element always changes the sum;
    other changes go unseen with a probability of 2^-32.
    """

    def mix(x):  # the finalizer of MurmurHash3 (A. Appleby, public domain)
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place = jnp.zeros_like(bits)
    for axis, size in enumerate(bits.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(mix(bits ^ mix(place)), dtype=jnp.uint32)


def _describe(tree: PyTree) -> dict[str, list]:
    """[dtype, shape, checksum] of every leaf, by its path."""
    named = [(_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree)]
    named = [(name, x if isinstance(x, jax.Array) else np.asarray(x)) for name, x in named]

    def checksum(x):  # where x lies is said: an array that is not bound to its device compiles nothing of its own
        where = x.sharding if isinstance(x, jax.Array) else None
        return jax.jit(_checksum, in_shardings=where)(x)

    # One at a time: collectives of several programs in flight may meet in another order on another process, and hang.
    jax.block_until_ready(tree)
    sums = [jax.device_get(checksum(x)) for _, x in named]
    return {name: [str(x.dtype), list(x.shape), f"{n:08x}"] for (name, x), n in zip(named, sums)}


def _seal(record: dict) -> str:
    return hashlib.blake2b(_canonical(record).encode(), digest_size=8).hexdigest()


def _sealed(record: dict) -> dict:
    return record | {"seal": _seal(record)}


def _read_record(path: epath.Path) -> dict:
    """What `_sealed` made. Raises an error of some kind if it is not that."""
    record = json.loads(path.read_text())
    if record.pop("seal") != _seal(record):
        raise ValueError(f"{path.name} is not what was written: its seal differs")
    return record


def _check_tree(described: dict[str, list], like: PyTree, where: epath.Path) -> None:
    """Raises a Misfit that lists every path whose presence, shape or dtype differs from those of `like`."""
    want = {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(like)}
    wrong = []
    for name in sorted(described.keys() | want.keys()):
        if name not in want:
            wrong.append(f"{name}: in the checkpoint only")
        elif name not in described:
            wrong.append(f"{name}: missing from the checkpoint")
        else:
            dtype, shape, _ = described[name]
            other = str(getattr(want[name], "dtype", dtype)), list(np.shape(want[name]))
            if (dtype, shape) != other:
                wrong.append(f"{name}: checkpoint has {dtype}{shape}, you gave {other[0]}{other[1]}")
    if wrong:
        raise Misfit(
            f"The checkpoint in {where} is of another tree ({len(wrong)} paths differ; structure, shapes and dtypes "
            "must be equal):\n  " + "\n  ".join(wrong)
        )


def _read(folder: epath.Path, record: str, arrays: str, like: PyTree, part: str = "") -> tuple[PyTree, dict]:
    """(arrays, record) as they were saved in `folder`, or a Misfit, or Damaged; with several processes on all of them.

    Args:
      folder: of one checkpoint; record, arrays: what they are called in it.
      like: what is wanted; part: which entry of the saved tree that is, the whole one if empty.
    """
    try:
        found, state, problem = _read_record(folder / record), None, None
        leaves = {name: of for name, of in found["leaves"].items() if name.startswith(part and f"{part}.")}
        wanted = {part: _target(like)} if part else _target(like)
        _check_tree(leaves, {part: like} if part else like, folder)
        args = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=bool(part)
        )
        # The handler itself: it has no barriers, which a process that fails would not reach.
        state = ocp.PyTreeCheckpointHandler().restore(folder / arrays, args=args)
    except (Misfit, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # whatever damage makes of Orbax's files
        if any(code in repr(error) for code in _STORAGE):
            raise
        problem = error
        while problem.__cause__:  # the root says most
            problem = problem.__cause__
    if preemption.on_any_process(problem is not None):
        said = " ".join(f"{type(problem).__name__}: {problem}".split())[:300] if problem else "another process says so"
        raise Damaged(f"The checkpoint {folder} cannot be read ({said})") from problem
    wrong = [name for name, of in _describe(state).items() if of != leaves[name]]
    if wrong:
        raise Damaged(
            f"The checkpoint {folder} is not what was saved: the checksums of {len(wrong)} of its {len(leaves)} arrays "
            f"differ ({', '.join(wrong[:8])}{', ...' if len(wrong) > 8 else ''})"
        )
    return state[part] if part else state, found


def _check_leaves(tree: PyTree) -> None:
    """Refuses what Orbax can't save; of empty arrays it says so only after a thread of it has hung for minutes."""
    leaves = [(_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree)]
    empty = [name for name, x in leaves if np.size(x) == 0]
    if empty:
        raise ValueError(f"Arrays of size 0 can't be saved; leave them out of the tree: {', '.join(empty)}.")
    keys = [n for n, x in leaves if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    if keys:
        raise ValueError(f"Typed random keys can't be saved; save jax.random.key_data of them: {', '.join(keys)}.")


def _target(like: PyTree) -> PyTree:
    """`like` with a sharding on every abstract leaf; in one process a leaf without one goes to the first device."""

    def leaf(x):
        if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None:
            if jax.process_count() > 1:
                raise ValueError(
                    f"A ShapeDtypeStruct without a sharding ({x}): with several processes every leaf needs one."
                )
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        return x

    return jax.tree.map(leaf, like)


class Checkpointer:
    """Asynchronous checkpoints `directory/STEP/{state,host}`: the last `keep`, and those of every `keep_every` steps.

    Every process of a run must make the same calls in the same order. A checkpoint is written beside its place and
    renamed, so a killed writer leaves nothing that `latest_step` would find.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, keep_every: int = 0):
        """Opens (and creates) `directory`. Raises ValueError unless keep >= 1 and keep_every >= 0 (0: none)."""
        if keep < 1 or keep_every < 0:
            raise ValueError(
                f"keep={keep}, keep_every={keep_every}: keep must be at least 1 (a resume needs a checkpoint), "
                "keep_every 0 or a number of steps."
            )
        _quiet_orbax()
        self.directory = _absolute(directory)
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "host": ocp.JsonCheckpointHandler(filename=_RECORD),
            },
        )

    @functools.partial(jax.profiler.annotate_function, name="save")
    def save(self, step: int, state: PyTree, host: dict) -> bool:
        """Starts to write `state` (arrays and numbers) and `host` (JSON-able); returns once both are copied off device.

        `state` may be donated or overwritten afterwards. A step that is saved already is left alone: False.
        Raises TypeError or ValueError if `host` isn't JSON or a leaf can't be saved (size 0, typed random key), and
        OSError for what this or an earlier save failed with, such as a full disk.
        """
        _check_leaves(state)
        host = json.loads(json.dumps(host))
        if step in self.steps():
            return False
        record = _sealed({"host": host, "leaves": _describe(state)})
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(record))
        with self._writing():
            return self._manager.save(step, args=args, force=True)

    def steps(self) -> list[int]:
        """The steps that were saved, and the one that is being saved."""
        return sorted(self._manager.all_steps())

    def written(self) -> list[int]:
        """The steps that are on the disk, whole; without the one that is being saved. Any thread may ask."""
        return sorted(ocp.utils.checkpoint_steps(self.directory))

    def latest_step(self) -> int | None:
        """The last of them, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict]:
        """`(state, host)` as saved at `step`, bit for bit, in the structure and the shardings of `like`.

        `like` holds arrays or `jax.ShapeDtypeStruct`s. Raises FileNotFoundError if there is no such checkpoint,
        Misfit (a ValueError), with all paths, if the trees, shapes or dtypes differ, Damaged if it isn't what was
        saved.
        """
        self.wait()
        if step not in self.steps():
            raise FileNotFoundError(
                f"No checkpoint of step {step} in {self.directory}; steps there: {self.steps() or 'none'}."
            )
        state, record = _read(self.directory / str(step), f"host/{_RECORD}", "state", like)
        return state, record["host"]

    def restore_latest(self, like: PyTree) -> tuple[int, PyTree, dict] | None:
        """`(step, state, host)` of the last checkpoint that is what was saved; None if nothing was saved.

        What comes after it is damaged: each is reported in the log, and set aside as `STEP.corrupt`, so that the step
        can be saved again. Raises Damaged, naming all, if none is whole (then nothing is moved), and Misfit.
        """
        self.wait()
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state, host = self.restore(step, like)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            for other, said in damaged.items():
                aside = self._set_aside(other)
                absl.logging.error("%s. It is kept as %s; step %d is used.", said, aside, step)
            return step, state, host
        if damaged:
            raise Damaged(
                f"No checkpoint in {self.directory} is whole; restore one of them from a copy, or choose another "
                "--workdir:\n  " + "\n  ".join(damaged.values())
            )
        return None

    def _set_aside(self, step: int) -> epath.Path:
        """Renames a checkpoint, out of the way of the next save of its step; returns its new place."""
        aside = [self.directory / f"{step}.corrupt{n or ''}" for n in range(1000)]
        aside = next(path for path in aside if not path.exists())
        multihost_utils.sync_global_devices("named")  # all have found the same name
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices("renamed")
        self._manager.reload()
        return aside

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says of an error of a save, which may come at the next call only, what it means for the run."""
        try:
            yield
        except Exception as error:
            kept = [int(path.name) for path in self.directory.iterdir() if path.name.isdigit()]
            raise OSError(
                f"A checkpoint could not be written to {self.directory}; the steps {sorted(kept) or 'none'} are there "
                f"as before. {error}"
            ) from error

    def wait(self) -> None:
        """Blocks until everything saved so far is on disk; raises OSError for what went wrong in the background."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def restore_params(directory: epath.PathLike, like: PyTree, step: int | None = None) -> tuple[PyTree, int]:
    """`(params, step)` of a run's checkpoint, the last one unless `step` says which; the optimizer's state is not read.

    `like` is as of `Checkpointer.restore`, of the parameters alone. Nothing is written: a run may be going on.
    Raises FileNotFoundError if there is no such checkpoint, Misfit, with all paths, if the parameters differ, and
    Damaged: here no other step takes the place of one that is damaged.
    """
    _quiet_orbax()
    directory = _absolute(directory)
    steps = sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []
    if not steps or (step is not None and step not in steps):
        wanted = "No checkpoint" if step is None else f"No checkpoint of step {step}"
        raise FileNotFoundError(f"{wanted} in {directory}; steps there: {steps if steps else 'none'}.")
    step = steps[-1] if step is None else step
    return _read(directory / str(step), f"host/{_RECORD}", "state", like, "params")[0], step


def save_params(directory: epath.PathLike, params: PyTree, info: dict) -> bool:
    """Writes `directory/{params,record.json,info.json}`; True if this call's parameters are the ones there now.

    They are written to a sibling directory that is renamed at the end: a killed writer leaves nothing under
    `directory`, and of several writers the first to finish wins, the others return False (give a name to a directory
    that says what is in it, such as a hash of the configuration). With several processes all must call. On object
    stores, where a rename copies file by file, `info.json` arrives last and marks the directory as complete.
    Raises FileExistsError if `directory` holds something else.
    """
    _quiet_orbax()
    directory = _absolute(directory)
    _check_leaves(params)
    text = json.dumps(info, indent=2, sort_keys=True)
    several, first = jax.process_count() > 1, jax.process_index() == 0
    name, done = uuid.uuid4().int & 0x7FFFFFFF, (directory / "info.json").exists()
    if several:
        name, done = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array([name, done], np.int32)))
    if done:
        return False
    temporary = directory.parent / f"{directory.name}.tmp-{name:08x}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary / "params", params)
        checkpointer.wait_until_finished()
    record = json.dumps(_sealed({"leaves": _describe(params)}))
    outcome = _publish(temporary, directory, record, text) if first else 0
    if several:
        outcome = int(multihost_utils.broadcast_one_to_all(np.array(outcome, np.int32)))
    if outcome < 0:
        raise FileExistsError(
            f"{directory} exists and holds no saved parameters (no info.json); remove it or choose another."
        )
    return outcome > 0


def _publish(temporary: epath.Path, directory: epath.Path, record: str, info: str) -> int:
    """Renames a finished directory into place: 1; another writer was first: 0; something else is there: -1."""
    local = "://" not in os.fspath(directory)
    (temporary / _RECORD).write_text(record)
    if local:
        (temporary / "info.json").write_text(info)
    try:
        temporary.rename(directory)
    except OSError:
        temporary.rmtree()
        return 0 if (directory / "info.json").exists() else -1
    if not local:
        (directory / "info.json").write_text(info)
    return 1


def load_params(directory: epath.PathLike, like: PyTree) -> tuple[PyTree, dict]:
    """`(params, info)` as written by `save_params`, in the structure and the shardings of `like`.

    Raises FileNotFoundError if there is nothing (complete) in `directory`, and what `Checkpointer.restore` does.
    """
    _quiet_orbax()
    directory = _absolute(directory)
    if not (directory / "info.json").exists():
        raise FileNotFoundError(f"No saved parameters in {directory} (no info.json there).")
    params, _ = _read(directory, _RECORD, "params", like)
    return params, json.loads((directory / "info.json").read_text())


def _canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def config_hash(config: dict) -> str:
    """12 hexadecimal digits of the SHA-256 of the configuration as canonical JSON (keys sorted, tuples are lists)."""
    return hashlib.sha256(_canonical(config).encode()).hexdigest()[:12]


def _flat(config: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        flat |= _flat(value, path + ".") if isinstance(value, dict) and value else {path: value}
    return flat


def differences(have: dict, give: dict) -> list[tuple[str, str, str]]:
    """`(path, text, text)` of every field in which two nested dicts of JSON-able values differ, by dotted path.

    The texts are the values of `have` and of `give` as canonical JSON, `nothing` where there is none. Tuples are lists.
    """
    have, give = _flat(have), _flat(give)

    def show(flat: dict, name: str) -> str:
        return _canonical(flat[name]) if name in flat else "nothing"

    both = [(name, show(have, name), show(give, name)) for name in sorted(have.keys() | give.keys())]
    return [(name, a, b) for name, a, b in both if a != b]


def check_config(where: epath.PathLike, have: dict, give: dict, overridable: tuple[str, ...] = ()) -> None:
    """Raises ValueError if what lies in `where` has another configuration than the one given; every field is listed.

    overridable: dotted paths, of fields or whole sections, that may differ.
    """
    differ = [
        f"{name}: run has {a}, you gave {b}"
        for name, a, b in differences(have, give)
        if not any(name == o or name.startswith(o + ".") for o in overridable)
    ]
    if differ:
        raise ValueError(
            f"{where} belongs to another configuration:\n  "
            + "\n  ".join(differ)
            + "\nA workdir belongs to one configuration; choose another --workdir or restore these values."
            + (f" (These may change: {', '.join(overridable)}.)" if overridable else "")
        )


def claim_workdir(workdir: epath.PathLike, config: dict, *, overridable: tuple[str, ...] = ()) -> None:
    """Writes `workdir/config.json`, or checks that the run in `workdir` has this configuration.

    Args:
      workdir: where the run lives; created if absent.
      config: nested dict of JSON-able values (tuples become lists).
      overridable: dotted paths, of fields or whole sections, that a resumed run may change; the file then follows.

    Raises:
      ValueError: another configuration owns the workdir; every differing field is listed.
    """
    workdir = _absolute(workdir)
    path = workdir / "config.json"
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if path.exists():
        old_text = path.read_text()
        try:
            have = json.loads(old_text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); restore it or choose another --workdir.") from error
        check_config(workdir, have, json.loads(text), overridable)
        if old_text == text:
            return
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / f"config.json.tmp-{uuid.uuid4().hex[:8]}"
        temporary.write_text(text)
        temporary.replace(path)
