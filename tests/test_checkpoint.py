import json
import logging
import multiprocessing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tto_jax.checkpoint import Checkpointer, claim_workdir, config_hash, load_params, save_params
from tto_jax.core.types import pytree


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


def test_restores_into_the_given_shardings(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    w = jnp.arange(len(jax.devices()) * 4.0)
    with Checkpointer(tmp_path, keep=1) as c:
        c.save(0, {"w": w}, {})
        got, _ = c.restore(0, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)})
    assert got["w"].sharding == sharding
    np.testing.assert_array_equal(got["w"], w)


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
