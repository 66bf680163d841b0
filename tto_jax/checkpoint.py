"""Checkpoints of a run, cached parameters, and the rule that a workdir belongs to one configuration."""

import hashlib
import json
import logging
import os
import uuid
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

PyTree = Any
_ABSENT = object()


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


def _check_tree(stored: PyTree, like: PyTree, where: epath.Path) -> None:
    """Raises a ValueError that lists every path whose presence, shape or dtype differs between `stored` and `like`."""
    have = {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(stored)}
    want = {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(like)}
    wrong = []
    for name in sorted(have.keys() | want.keys()):
        if name not in want:
            wrong.append(f"{name}: in the checkpoint only")
        elif name not in have:
            wrong.append(f"{name}: missing from the checkpoint")
        else:
            shapes = tuple(have[name].shape), np.shape(want[name])
            dtypes = str(have[name].dtype), str(getattr(want[name], "dtype", have[name].dtype))
            if shapes[0] != shapes[1] or dtypes[0] != dtypes[1]:
                wrong.append(
                    f"{name}: checkpoint has {dtypes[0]}{list(shapes[0])}, you gave {dtypes[1]}{list(shapes[1])}"
                )
    if wrong:
        raise ValueError(
            f"The checkpoint in {where} is of another tree ({len(wrong)} paths differ; structure, shapes and dtypes "
            "must be equal):\n  " + "\n  ".join(wrong)
        )


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
    """Asynchronous checkpoints `directory/STEP/{state,host}`, of which the last `keep` stay.

    Every process of a run must make the same calls in the same order. A checkpoint is written beside its place and
    renamed, so a killed writer leaves nothing that `latest_step` would find. Orbax detects files that are truncated or
    missing, not flipped bits.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int):
        """Opens (and creates) `directory`. Raises ValueError unless keep >= 1."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1 (a resume needs a checkpoint), got {keep}.")
        _quiet_orbax()
        self.directory = _absolute(directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "host": ocp.JsonCheckpointHandler()},
        )

    def save(self, step: int, state: PyTree, host: dict) -> bool:
        """Starts to write `state` (arrays and numbers) and `host` (JSON-able); returns once both are copied off device.

        `state` may be donated or overwritten afterwards. A step that is saved already is left alone: False.
        Raises TypeError or ValueError if `host` isn't JSON or a leaf can't be saved (size 0, typed random key), and
        what an earlier save failed with in the background.
        """
        _check_leaves(state)
        if step in self._manager.all_steps():
            return False
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(json.loads(json.dumps(host)))
        )
        return self._manager.save(step, args=args, force=True)

    def latest_step(self) -> int | None:
        """The last step that was saved completely, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict]:
        """`(state, host)` as saved at `step`, bit for bit, in the structure and the shardings of `like`.

        `like` holds arrays or `jax.ShapeDtypeStruct`s. Raises FileNotFoundError if there is no such checkpoint and
        ValueError, with all paths, if the trees, shapes or dtypes differ.
        """
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            raise FileNotFoundError(
                f"No checkpoint of step {step} in {self.directory}; steps there: {steps if steps else 'none'}."
            )
        _check_tree(self._manager.item_metadata(step)["state"].tree, like, self.directory / str(step))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_target(like)), host=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["host"]

    def wait(self) -> None:
        """Blocks until everything saved so far is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the threads."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def restore_params(directory: epath.PathLike, like: PyTree, step: int | None = None) -> tuple[PyTree, int]:
    """`(params, step)` of a run's checkpoint, the last one unless `step` says which; the optimizer's state is not read.

    `like` is as of `Checkpointer.restore`, of the parameters alone. Nothing is written: a run may be going on.
    Raises FileNotFoundError if there is no such checkpoint and ValueError, with all paths, if the parameters differ.
    """
    _quiet_orbax()
    directory = _absolute(directory)
    steps = sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []
    if not steps or (step is not None and step not in steps):
        wanted = "No checkpoint" if step is None else f"No checkpoint of step {step}"
        raise FileNotFoundError(f"{wanted} in {directory}; steps there: {steps if steps else 'none'}.")
    step = steps[-1] if step is None else step
    state = directory / str(step) / "state"
    with ocp.Checkpointer(handler := ocp.PyTreeCheckpointHandler()) as checkpointer:
        _check_tree(handler.metadata(state).tree["params"], like, directory / str(step))
        item = {"params": _target(like)}
        how = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
        restored = checkpointer.restore(state, args=args)
    return restored["params"], step


def save_params(directory: epath.PathLike, params: PyTree, info: dict) -> bool:
    """Writes `directory/{params,info.json}`; True if this call's parameters are the ones there now.

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
        from jax.experimental import multihost_utils

        name, done = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array([name, done], np.int32)))
    if done:
        return False
    temporary = directory.parent / f"{directory.name}.tmp-{name:08x}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary / "params", params)
        checkpointer.wait_until_finished()
    outcome = _publish(temporary, directory, text) if first else 0
    if several:
        outcome = int(multihost_utils.broadcast_one_to_all(np.array(outcome, np.int32)))
    if outcome < 0:
        raise FileExistsError(
            f"{directory} exists and holds no saved parameters (no info.json); remove it or choose another."
        )
    return outcome > 0


def _publish(temporary: epath.Path, directory: epath.Path, info: str) -> int:
    """Renames a finished directory into place: 1; another writer was first: 0; something else is there: -1."""
    local = "://" not in os.fspath(directory)
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

    Raises FileNotFoundError if there is nothing (complete) in `directory`, ValueError as `Checkpointer.restore` does.
    """
    _quiet_orbax()
    directory = _absolute(directory)
    if not (directory / "info.json").exists():
        raise FileNotFoundError(f"No saved parameters in {directory} (no info.json there).")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(directory / "params")
        _check_tree(getattr(stored.item_metadata, "tree", stored.item_metadata), like, directory)
        params = checkpointer.restore(directory / "params", _target(like))
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
            have = _flat(json.loads(old_text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); restore it or choose another --workdir.") from error
        give = _flat(json.loads(text))

        def show(value) -> str:
            return "nothing" if value is _ABSENT else _canonical(value)

        differ = [
            f"{name}: run has {show(have.get(name, _ABSENT))}, you gave {show(give.get(name, _ABSENT))}"
            for name in sorted(have.keys() | give.keys())
            if show(have.get(name, _ABSENT)) != show(give.get(name, _ABSENT))
            and not any(name == o or name.startswith(o + ".") for o in overridable)
        ]
        if differ:
            raise ValueError(
                f"{workdir} belongs to another configuration:\n  "
                + "\n  ".join(differ)
                + "\nA workdir belongs to one configuration; choose another --workdir or restore these values."
                + (f" (These may change: {', '.join(overridable)}.)" if overridable else "")
            )
        if old_text == text:
            return
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / f"config.json.tmp-{uuid.uuid4().hex[:8]}"
        temporary.write_text(text)
        temporary.replace(path)
