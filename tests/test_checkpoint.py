import json
import logging
import multiprocessing
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tto_jax.checkpoint import (
    Checkpointer,
    Damaged,
    Misfit,
    _checksum,
    claim_workdir,
    config_hash,
    load_params,
    restore_params,
    save_params,
)
from tto_jax.core.types import pytree

ROOT = Path(__file__).resolve().parents[1]


@pytree
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embed": {"table": jax.random.normal(keys[0], (5, 3))},
        "layers": [jax.random.normal(keys[1], (3, 3)).astype(jnp.bfloat16)],
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1e-3, 5)))
    opt_state = tx.init(params)
    _, opt_state = tx.update(params, opt_state, params)
    return State(step=jnp.int32(7), params=params, opt_state=opt_state)


def assert_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_round_trip_is_bitwise_and_a_fresh_process_finds_it(tmp_path):
    state, host = make_state(), {"cursor": [1, 2**40], "key": "0x1", "nested": {"none": None, "x": 0.1}}
    with Checkpointer(tmp_path / "c", keep=2) as c:
        assert c.latest_step() is None
        assert c.save(3, state, host)
        assert not c.save(3, state, host)
    with Checkpointer(tmp_path / "c", keep=2) as c:
        assert c.latest_step() == 3
        for like in (abstract(state), state):
            got, got_host = c.restore(3, like)
            assert got_host == host
            assert_bitwise(got, state)


def test_a_state_may_be_donated_right_after_save(tmp_path):
    bump = jax.jit(partial(jax.tree.map, lambda x: x + 1), donate_argnums=0)
    state = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
    host = {"at": 0}
    with Checkpointer(tmp_path, keep=5) as c:
        expected = []
        for step in range(3):
            expected.append(np.array(state["w"]))
            c.save(step, state, host)
            state, host["at"] = bump(state), step + 1
        for step in range(3):
            got, got_host = c.restore(step, abstract(state))
            np.testing.assert_array_equal(got["w"], expected[step])
            assert got_host == {"at": step}


def test_keeps_the_last_ones(tmp_path):
    with Checkpointer(tmp_path, keep=2) as c:
        for step in (1, 2, 3):
            c.save(step, {"w": jnp.ones(2) * step}, {})
        c.wait()
        assert c.latest_step() == 3
        with pytest.raises(FileNotFoundError, match=r"step 1 in .*\[2, 3\]"):
            c.restore(1, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpointer(tmp_path, keep=0)


def test_every_so_many_steps_one_stays_for_ever(tmp_path):
    with Checkpointer(tmp_path, keep=1, keep_every=4) as c:
        for step in range(2, 12, 2):
            c.save(step, {"w": jnp.ones(2) * step}, {})
    with Checkpointer(tmp_path, keep=1, keep_every=4) as c:  # a later process goes by the same rule
        assert c.steps() == [4, 8, 10]
        c.save(12, {"w": jnp.ones(2)}, {})
        c.save(13, {"w": jnp.ones(2)}, {})
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 12, 13]
    with pytest.raises(ValueError, match="keep_every=-1"):
        Checkpointer(tmp_path, keep=1, keep_every=-1)


def test_a_step_that_is_being_saved_is_not_written_yet(tmp_path, monkeypatch):
    may_end, finalize = threading.Event(), ocp.CheckpointManager._finalize

    def later(*args):
        may_end.wait(60)
        finalize(*args)

    with Checkpointer(tmp_path, keep=2) as c:
        c.save(2, {"w": jnp.ones(2)}, {})
        c.wait()
        monkeypatch.setattr(ocp.CheckpointManager, "_finalize", later)
        c.save(3, {"w": jnp.ones(2)}, {})
        assert c.steps() == [2, 3] and c.written() == [2]
        may_end.set()
        c.wait()
        assert c.written() == [2, 3]


def split(x, *axes, shape):
    """`x` on a mesh of the first devices, its dimensions split over the named axes."""
    names = tuple("xyz"[: len(shape)])
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape), devices=devices)
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))


def test_restores_on_another_mesh(tmp_path):
    w, b = jax.random.normal(jax.random.key(0), (16, 24)), jnp.arange(8, dtype=jnp.bfloat16)
    saved = {"w": split(w, "x", "y", shape=(2, 4)), "b": split(b, "y", shape=(2, 4))}
    likes = {
        "another": {"w": split(w, None, "x", shape=(8,)), "b": split(b, shape=(8,))},
        "fewer": {"w": split(w, ("x", "y"), shape=(2, 2)), "b": split(b, "y", shape=(2, 2))},
        "one": {"w": w, "b": b},
    }
    with Checkpointer(tmp_path, keep=1) as c:
        c.save(0, saved, {})
        for like in likes.values():
            got, _ = c.restore(0, like)
            assert_bitwise(got, {"w": w, "b": b})
            assert [x.sharding for x in jax.tree.leaves(got)] == [x.sharding for x in jax.tree.leaves(like)]


# ---------------------------------------------------------------- checksums


def checksum_by_hand(x):
    """The sum of every element's bits, mixed with its place; with Python's integers."""

    def mix(n):
        n = ((n ^ (n >> 16)) * 0x85EBCA6B) % 2**32
        n = ((n ^ (n >> 13)) * 0xC2B2AE35) % 2**32
        return n ^ (n >> 16)

    x = np.asarray(x)
    bits = x.reshape(-1).view(f"u{min(x.dtype.itemsize, 4)}").tolist()
    return sum(mix(n ^ mix(place)) for place, n in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_a_checksum_is_what_it_says(dtype):
    for shape in ((), (7,), (2, 3, 4)):
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 3, dtype)
        assert int(jax.jit(_checksum)(x)) == checksum_by_hand(x)


def test_a_checksum_is_the_same_on_every_mesh_without_a_gather():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    for axes, shape in (((("x", "y"),), (2, 4)), ((None, "y"), (2, 4)), (("y", "x"), (2, 4)), (("x",), (8,))):
        y = split(x, *axes, shape=shape)
        assert int(_checksum(y)) == checksum_by_hand(x)
        text = jax.jit(_checksum).lower(y).compile().as_text()
        assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text


def test_a_checksum_sees_every_bit_and_every_place():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    variants = [x]
    for i in range(x.size):
        for bit in range(32):
            y = x.copy()
            y.reshape(-1).view(np.uint32)[i] ^= np.uint32(1 << bit)
            variants.append(y)
        for j in range(i):
            y = x.copy()
            y.flat[i], y.flat[j] = x.flat[j], x.flat[i]
            variants.append(y)
    variants += [np.zeros_like(x), -np.zeros_like(x), np.full_like(x, np.nan)]
    sums = {int(n) for n in jax.vmap(_checksum)(jnp.asarray(np.stack(variants)))}
    assert len(sums) == len(variants)


# ---------------------------------------------------------------- damage


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


DAMAGES = {
    "missing": lambda path, data: path.unlink(),
    "empty": lambda path, data: path.write_bytes(b""),
    "truncated": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "a flipped bit": lambda path, data: path.write_bytes(flipped(data, len(data) // 2)),
}


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Two steps of one run; the second array is so big that no copy of it lies in Orbax's index."""
    folder = tmp_path_factory.mktemp("two") / "c"
    states = {
        n: {"params": {"w": jax.random.normal(jax.random.key(n), (64, 33))}, "step": jnp.int32(n)} for n in (4, 6)
    }
    with Checkpointer(folder, keep=2) as c:
        for step, state in states.items():
            c.save(step, state, {"cursor": step * 10})
    return folder, states


def damaged_copy(source, target, step, file, damage):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    path = target / str(step) / file
    DAMAGES[damage](path, path.read_bytes())
    return target


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves when it fails
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_is_reported_or_harmless(two_checkpoints, tmp_path, caplog, damage):
    """Every file of a checkpoint in turn: the step comes back as it was saved, or the one before does, with a word."""
    source, states = two_checkpoints
    names = [path.relative_to(source / "6") for path in files(source / "6")]
    fell_back = []
    for name in names:
        folder = damaged_copy(source, tmp_path / "c", 6, name, damage)
        caplog.clear()
        with Checkpointer(folder, keep=2) as c:
            step, state, host = c.restore_latest(abstract(states[6]))
        assert_bitwise(state, states[step])
        assert host == {"cursor": step * 10}
        said = [text for text in caplog.messages if "is used" in text]
        if step == 4:
            fell_back.append(name)
            assert len(said) == 1 and str(folder / "6") in said[0] and "step 4 is used" in said[0]
            assert (folder / "6.corrupt").is_dir() and not (folder / "6").exists()
        else:
            assert said == [] and sorted(p.name for p in folder.iterdir()) == ["4", "6"]
    assert Path("host/record.json") in fell_back and Path("state/manifest.ocdbt") in fell_back
    arrays = max(names, key=lambda name: (source / "6" / name).stat().st_size)
    assert arrays in fell_back, "the file that holds the arrays"


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_bit_that_orbax_restores_silently(two_checkpoints, tmp_path):
    """Flips in the file of arrays, one after the other: some pass Orbax unseen, none passes the checksums."""
    source, states = two_checkpoints
    path = max(files(source / "6"), key=lambda path: path.stat().st_size)
    data, name = path.read_bytes(), path.relative_to(source)
    folder, unseen = tmp_path / "c", 0
    shutil.copytree(source, folder)
    for at in range(len(data) // 20, len(data), len(data) // 10):
        (folder / name).write_bytes(flipped(data, at))
        with Checkpointer(folder, keep=2) as c:
            try:
                args = ocp.args.PyTreeRestore(states[6])
                raw = ocp.PyTreeCheckpointHandler().restore(c.directory / "6" / "state", args=args)
            except Exception:  # of one kind or another
                raw = None
            if raw is not None and all(jax.tree.leaves(jax.tree.map(np.array_equal, raw, states[6]))):
                continue  # it belongs to nothing
            with pytest.raises(Damaged) as error:
                c.restore(6, states[6])
        assert str(folder / "6") in str(error.value)
        if raw is not None:
            unseen += 1
            assert "the checksums of 1 of its 2 arrays differ (params.w)" in str(error.value)
    assert unseen >= 3


def test_a_step_is_saved_again_where_a_damaged_one_lay(two_checkpoints, tmp_path):
    source, states = two_checkpoints
    arrays = max(files(source / "6"), key=lambda path: path.stat().st_size).relative_to(source / "6")
    folder = damaged_copy(source, tmp_path / "c", 6, arrays, "a flipped bit")
    for n, aside in enumerate(("6.corrupt", "6.corrupt1")):
        with Checkpointer(folder, keep=2) as c:
            assert c.restore_latest(states[6])[0] == 4 and c.steps() == [4]
            assert c.save(6, states[6], {"again": n})
        assert {p.name for p in folder.iterdir()} >= {"4", "6", aside}
        with Checkpointer(folder, keep=2) as c:
            step, state, host = c.restore_latest(states[6])
            assert (step, host) == (6, {"again": n})
            assert_bitwise(state, states[6])
        path = max(files(folder / "6"), key=lambda path: path.stat().st_size)
        DAMAGES["a flipped bit"](path, path.read_bytes())
    assert restore_params_step(folder, states) == 4


def restore_params_step(folder, states):
    """A reader takes the last step; that it is damaged is an error which says so, and nothing is moved."""
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(Damaged, match=f"{folder}/6"):
        restore_params(folder, states[6]["params"])
    params, step = restore_params(folder, states[6]["params"], step=4)
    assert_bitwise(params, states[4]["params"])
    assert sorted(p.name for p in folder.iterdir()) == before
    return step


def test_none_is_whole(two_checkpoints, tmp_path):
    source, states = two_checkpoints
    with Checkpointer(tmp_path / "none", keep=1) as c:
        assert c.restore_latest(states[6]) is None
    folder = damaged_copy(source, tmp_path / "c", 6, "state/manifest.ocdbt", "missing")
    record = folder / "4" / "host" / "record.json"
    record.write_text(record.read_text().replace('"cursor": 40', '"cursor": 41'))
    with Checkpointer(folder, keep=2) as c, pytest.raises(Damaged, match=r"No checkpoint in .* is whole") as error:
        c.restore_latest(states[6])
    assert f"{folder}/6 cannot be read (ValueError: NOT_FOUND" in str(error.value)
    assert f"{folder}/4 cannot be read (ValueError: record.json is not what was written" in str(error.value)
    assert sorted(p.name for p in folder.iterdir()) == ["4", "6"], "a damaged checkpoint may be all there is"


def test_what_is_no_damage_moves_nothing(two_checkpoints, tmp_path, monkeypatch):
    """Another tree is the caller's error; storage that is away comes back."""
    source, states = two_checkpoints
    folder = shutil.copytree(source, tmp_path / "c")
    with Checkpointer(folder, keep=2) as c:
        with pytest.raises(Misfit, match=r"params.w: checkpoint has float32\[64, 33\], you gave float32\[64, 34\]"):
            c.restore_latest({"params": {"w": jnp.ones((64, 34))}, "step": jnp.int32(0)})

        def away(*_, **__):
            raise ValueError("UNAVAILABLE: Error reading: Connection reset by peer")

        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", away)
        with pytest.raises(ValueError, match="UNAVAILABLE"):
            c.restore_latest(states[6])
    assert sorted(p.name for p in folder.iterdir()) == ["4", "6"]


def test_damaged_parameters(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 33))}
    save_params(tmp_path / "p", params, {})
    path = max(files(tmp_path / "p"), key=lambda path: path.stat().st_size)
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2))
    with pytest.raises(Damaged, match=f"{tmp_path}/p is not what was saved: .* 1 of its 1 arrays differ .w"):
        load_params(tmp_path / "p", params)


FULL = """
import resource, subprocess, sys
import jax, jax.numpy as jnp, numpy as np
from tto_jax.checkpoint import Checkpointer
folder, how = sys.argv[1:]
if how == "disk":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=True)
small, big = {"w": jnp.arange(100.0)}, {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
saved = Checkpointer(folder + "/c", keep=1)
saved.save(1, small, {"cursor": 7})
saved.wait()
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
failed = []
for call in (lambda: saved.save(2, big, {}), saved.wait, saved.close):  # the error may come at once or later
    try:
        call()
    except OSError as error:
        failed.append(str(error))
assert failed and "the steps [1] are there as before" in failed[0], failed
assert ("No space left on device" if how == "disk" else "File too large") in failed[0], failed
with Checkpointer(folder + "/c", keep=1) as saved:
    step, state, host = saved.restore_latest(small)
    assert (step, host) == (1, {"cursor": 7}) and np.array_equal(state["w"], small["w"])
    saved.save(2, small, {})  # and there is room again: what the failed one left is gone
with Checkpointer(folder + "/c", keep=1) as saved:
    assert saved.steps() == [2]
"""


@pytest.mark.parametrize("how", ["disk", "limit"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, how):
    """On a small disk of its own, where one may be mounted; and with a limit on the size of a file."""
    own = ["unshare", "--map-root-user", "--mount"] if how == "disk" else []
    if own and (shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True).returncode):
        pytest.skip("no file system can be mounted here")
    command = [*own, sys.executable, "-c", FULL, str(tmp_path), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


# ---------------------------------------------------------------- what else is refused


def test_errors_name_the_directory_and_the_paths(tmp_path):
    with Checkpointer(tmp_path / "c", keep=1) as c:
        with pytest.raises(FileNotFoundError, match="steps there: none"):
            c.restore(1, {"w": jnp.ones(2)})
        c.save(1, {"a": {"w": jnp.ones((2, 3)), "gone": jnp.ones(1)}, "n": jnp.int32(0)}, {})
        like = {"a": {"w": jnp.ones((2, 4)), "new": jnp.ones(1)}, "n": jnp.float32(0)}
        with pytest.raises(ValueError, match="4 paths differ") as error:
            c.restore(1, like)
        for text in (
            "a.w: checkpoint has float32[2, 3], you gave float32[2, 4]",
            "a.gone: in the checkpoint only",
            "a.new: missing from the checkpoint",
            "n: checkpoint has int32[], you gave float32[]",
        ):
            assert text in str(error.value)
        with pytest.raises(TypeError):
            c.save(2, {"w": jnp.ones(2)}, {"not json": object()})
        with pytest.raises(ValueError, match=r"size 0 .*: a\.0\."):
            c.save(2, {"a": [jnp.ones((0, 2))]}, {})
        with pytest.raises(ValueError, match=r"key_data of them: k\."):
            c.save(2, {"k": jax.random.key(0)}, {})


def test_orbax_is_quiet_and_others_are_not(tmp_path, caplog):
    logger = logging.getLogger("absl")
    with caplog.at_level(logging.INFO, logger="absl"), Checkpointer(tmp_path, keep=1) as c:
        c.save(0, {"w": jnp.ones(2)}, {})
        logger.info("mine")
    assert "mine" in [r.getMessage() for r in caplog.records]
    assert not [r for r in caplog.records if "orbax" in r.pathname and r.levelno < logging.WARNING]


def test_params_round_trip(tmp_path):
    params = make_state().params
    target = tmp_path / "cache" / "abc"
    with pytest.raises(FileNotFoundError, match="cache/abc"):
        load_params(target, params)
    assert save_params(target, params, {"step": 5})
    assert not save_params(target, params, {"step": 6})  # the first one stays
    got, info = load_params(target, abstract(params))
    assert_bitwise(got, params)
    assert info == {"step": 5}
    with pytest.raises(ValueError, match=r"embed.table: checkpoint has float32\[5, 3\]"):
        load_params(target, params | {"embed": {"table": jnp.ones((5, 4))}})
    assert [p.name for p in target.parent.iterdir()] == ["abc"]  # no litter


def test_a_writer_that_dies_or_loses_the_race_does_no_harm(tmp_path, monkeypatch):
    target, params = tmp_path / "p", {"w": jnp.arange(3.0)}
    from etils import epath

    rename = type(epath.Path(tmp_path)).rename

    def dies(self, to):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        save_params(target, params, {})
    with pytest.raises(FileNotFoundError):
        load_params(target, params)

    def loses(self, to):
        monkeypatch.setattr(type(epath.Path(tmp_path)), "rename", rename)
        assert save_params(target, {"w": params["w"] + 1}, {"who": "other"})
        return rename(self, to)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rename", loses)
    assert not save_params(target, params, {"who": "me"})
    got, info = load_params(target, params)
    assert info == {"who": "other"}
    np.testing.assert_array_equal(got["w"], params["w"] + 1)

    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds no saved parameters"):
        save_params(tmp_path / "busy", params, {})
    assert (tmp_path / "busy" / "thesis.tex").read_text() == "x"


def test_a_workdir_belongs_to_one_configuration(tmp_path):
    config = {"steps": 10, "loss": {"clip": (0.2, 0.28), "kind": "ppo"}, "task": {}}
    claim_workdir(tmp_path / "run", config)
    path = tmp_path / "run" / "config.json"
    text = path.read_text()
    assert json.loads(text)["loss"]["clip"] == [0.2, 0.28]
    assert text.index('"loss"') < text.index('"steps"') < text.index('"task"')
    claim_workdir(tmp_path / "run", config)
    assert path.read_text() == text

    other = {"steps": 20, "loss": {"clip": (0.2, 0.2), "kind": "ppo", "kl": 0.1}}
    with pytest.raises(ValueError) as error:
        claim_workdir(tmp_path / "run", other, overridable=("steps",))
    message = str(error.value)
    assert "loss.clip: run has [0.2,0.28], you gave [0.2,0.2]" in message
    assert "loss.kl: run has nothing, you gave 0.1" in message
    assert "task: run has {}, you gave nothing" in message
    assert "steps: run" not in message
    assert "choose another --workdir or restore these values" in message
    assert path.read_text() == text

    claim_workdir(tmp_path / "run", config | {"steps": 20}, overridable=("steps",))
    assert json.loads(path.read_text())["steps"] == 20
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_config_hash_is_of_the_values():
    a = config_hash({"a": 1, "b": {"c": (1, 2)}})
    assert a == config_hash({"b": {"c": [1, 2]}, "a": 1})
    assert a != config_hash({"b": {"c": [1, 3]}, "a": 1})
    assert len(a) == 12 and int(a, 16) >= 0


def _hammer(path, k):
    save_params(path, {"w": np.full(3, k, np.float32)}, {"k": k})


@pytest.mark.slow
def test_processes_that_race(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hammer, args=(tmp_path / "p", k)) for k in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
        assert w.exitcode == 0
    got, info = load_params(tmp_path / "p", {"w": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(got["w"], info["k"])
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
