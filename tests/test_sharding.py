"""Every mesh of 8 virtual devices gives the one-device result; layouts come from one table."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import peak
from tto_jax import learner, rollout, settings, sharding
from tto_jax.core import credit, token_tree
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.types import Prompts
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig

B, G, A, PROMPT, BUDGETS = 8, 2, 2, 6, (4, 8, 12)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=64,
    max_position=64,
    attention_bias=True,
    qk_norm=True,
    tie_embeddings=False,
)
ROLLOUT = rollout.RolloutConfig(
    group_size=G,
    trace_pad=BUDGETS[-1],
    answers=A,
    answer_cap=3,
    think_end=1,
    eos=2,
    elicit_ended=(5,),
    elicit_cut=(6, 7),
)
SCHEDULE = BudgetSchedule.from_prior(BUDGETS)
OPTIMIZER = learner.OptimizerConfig(learning_rate=1e-3)
LOSS = learner.LossConfig(
    num_targets=BUDGETS[-1] + len(BUDGETS) * A * 3,
    num_states=token_tree.num_states(PROMPT, BUDGETS[-1], len(BUDGETS), A, 5, False),
    constant=100.0,
    micro_rows=8,
)


def make_prompts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, MODEL.vocab_size, (B, PROMPT)).astype(np.int32)
    return Prompts(
        tokens=tokens, length=rng.integers(2, PROMPT + 1, B).astype(np.int32), id=np.arange(B, dtype=np.uint32)
    )


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    like = jax.eval_shape(lambda: decoder.init_params(MODEL, 0))
    return jax.tree.map(lambda x: np.asarray(0.3 * rng.normal(size=x.shape) + (x.ndim == 1), np.float32), like)


def model_on(mesh):
    return dataclasses.replace(MODEL, kv_copies=sharding.kv_copies(MODEL.num_heads, MODEL.num_kv_heads, mesh))


def step(mesh):
    """One step: rollout, credit, log-probs, two minibatches. Results on the host and the state's types."""
    model = model_on(mesh)
    whole = sharding.place(mesh, weights(), model.num_kv_heads, without=("fsdp",))
    prompts, key = sharding.put_rows(make_prompts()), jax.random.key(0)
    traces, trunk = rollout.sample_traces(model, ROLLOUT, whole, prompts, key)
    forks = rollout.cut(traces.length, SCHEDULE)
    answers = rollout.sample_answers(model, ROLLOUT, whole, trunk, traces, forks, key)
    correct = (np.random.default_rng(1).random((B, G, len(BUDGETS), A)) < 0.5).astype(np.float32)
    correct, by_trace = sharding.put_rows(correct), forks.reshape(B, G, -1)
    earned = jax.jit(functools.partial(credit.assign, estimator="brpo", answers="brpo"))(correct, by_trace, SCHEDULE)
    rows = jax.jit(token_tree.pack)(prompts, traces, answers, forks, earned, jnp.ones(len(BUDGETS)))
    state = sharding.place(mesh, learner.init_state(weights(), OPTIMIZER), model.num_kv_heads)
    before = types(state)
    old, _ = learner.score_logprobs(model, LOSS, state.params, rows)
    rows = dataclasses.replace(rows, old_logprob=old)
    for index in range(2):
        part = learner.minibatch(rows, 2, index)
        state, metrics = learner.train_step(model, LOSS, OPTIMIZER, state, part)
    after = types(state)
    return jax.device_get((traces, answers, earned, old, state.params, metrics)), before, after


def types(state):
    return [(x.shape, str(x.dtype), x.sharding) for x in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def alone():
    return step(None)[0]


@pytest.fixture(scope="module", params=MESHES, ids=str)
def meshed(request):
    mesh = sharding.make_mesh(request.param)
    with jax.set_mesh(mesh):
        return step(mesh)


def test_every_mesh_gives_the_one_device_result(alone, meshed):
    for one, many in zip(jax.tree.leaves(alone[:2]), jax.tree.leaves(meshed[0][:2])):
        if one.dtype == np.float32:
            np.testing.assert_allclose(one, many, atol=3e-5)
        else:
            np.testing.assert_array_equal(one, many)
    for one, many in zip(jax.tree.leaves(alone[2:4]), jax.tree.leaves(meshed[0][2:4])):
        np.testing.assert_allclose(one, many, atol=3e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), weights(), alone[4])
    assert min(jax.tree.leaves(moved)) > 1e-4, "a parameter that does not move would agree for nothing"
    # Adam divides by the gradient's size, so that rounding of tiny gradients is seen: a tenth of a step of 1e-3.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), alone[4], meshed[0][4])
    np.testing.assert_allclose(alone[5]["update/grad_norm"], meshed[0][5]["update/grad_norm"], rtol=1e-5)


def test_a_step_keeps_the_types_of_the_state(meshed):
    _, before, after = meshed
    assert before == after


def test_the_state_is_split(meshed):
    """Each device holds its share of what the mesh splits, not a copy."""
    _, before, _ = meshed
    sizes = [np.prod(sharded.shard_shape(shape)) / np.prod(shape) for shape, _, sharded in before if len(shape) > 1]
    assert min(sizes) < 1 or before[-1][2].mesh.shape["data"] == 8


def test_credit_over_problems_needs_no_collective():
    mesh = sharding.make_mesh((8, 1, 1))
    rows = NamedSharding(mesh, P("data"))
    correct = jax.ShapeDtypeStruct((B, G, 3, A), jnp.float32, sharding=rows)
    forks = jax.ShapeDtypeStruct((B, G, 3), jnp.int32, sharding=rows)
    for estimator in ("brpo", "grpo", "mrt"):
        function = functools.partial(credit.assign, estimator=estimator, answers="brpo")
        text = jax.jit(function).lower(correct, forks, SCHEDULE).compile().as_text()
        assert "replica_groups" not in text and collectives(text) == []


def collectives(text):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return re.findall(rf"= (.*?) ({names})(?:-start)?\(", text)


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_the_decode_loop_gathers_no_weights(shape):
    """In the token loop nothing crosses `data` or `fsdp` but the stop test, and no weight is gathered."""
    mesh = sharding.make_mesh(shape)
    model = model_on(mesh)
    with jax.set_mesh(mesh):
        params = sharding.place(mesh, weights(), model.num_kv_heads, without=("fsdp",))
        prompts = sharding.put_rows(make_prompts())
        state, cache, keys = rollout._start(model, ROLLOUT, params, prompts, jax.random.key(0), np.int32(0))
        arguments = (model, ROLLOUT, params, prompts, cache, state, keys.thinking, np.int32(4))
        text = rollout._think.lower(*arguments).compile().as_text()
    groups = row_groups(mesh)
    for line in text.splitlines():
        if not collectives(line):
            continue
        result = line.split("=")[1].split("(")[0]
        inside = re.search(r"pred\[\]|s32\[\]|u32\[\]", result)
        crosses = any(len(set(group) & set(other)) > 1 for group in line_groups(line) for other in groups)
        assert inside or not crosses, line
        if "all-gather" in line:
            assert np.prod([int(n) for n in re.findall(r"\[([\d,]+)\]", result)[0].split(",")]) < weight_size(), line


def weight_size():
    return min(x.size for x in jax.tree.leaves(weights()) if x.ndim == 3)


def row_groups(mesh):
    """Devices that differ in data and fsdp only."""
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    return ids.reshape(-1, ids.shape[2]).T.tolist()


def line_groups(line):
    explicit = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if explicit:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", explicit.group(1))]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named.group(2))]
        ids = np.moveaxis(
            np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values())), over, range(len(over))
        )
        return ids.reshape(np.prod([list(sizes.values())[i] for i in over]), -1).T.tolist()
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert iota, line
    number, size, dims, order = iota.groups()
    ids = np.arange(int(number) * int(size)).reshape([int(n) for n in dims.split(",")])
    ids = ids if order is None else ids.transpose([int(n) for n in order.split(",")])
    return ids.reshape(int(number), int(size)).tolist()


# Layouts and their refusals.


def test_one_pattern_a_path():
    for config in (MODEL, dataclasses.replace(MODEL, learned_positions=True, tie_embeddings=True)):
        mesh = sharding.make_mesh((2, 2, 2))
        like = jax.eval_shape(lambda config=config: learner.init_state(decoder.init_params(config, 0), OPTIMIZER))
        found = sharding.shardings(mesh, like, config.num_kv_heads)
        spec = found.opt_state.inner_state[1][0].mu["layers"]["down"]["kernel"].spec
        assert found.params["layers"]["down"]["kernel"].spec == spec == P(None, "tensor", "fsdp")
        assert found.params["layers"]["attention"]["k"]["kernel"].spec == P(None, "fsdp", "tensor")
        assert found.step.spec == P()


def test_weights_of_kv_heads_are_not_repeated():
    mesh = sharding.make_mesh((1, 1, 8))
    assert sharding.kv_copies(8, 2, mesh) == 4
    spec = sharding.shardings(mesh, weights(), 2)["layers"]["attention"]["k"]["kernel"].spec
    assert spec == P(), "two heads cannot be split over 8 devices: every device has both"


def test_conflicts_are_listed_together():
    mesh = sharding.make_mesh((1, 8, 1))
    tree = {"layers": {"down": {"kernel": np.zeros((2, 6, 12))}, "extra": np.zeros(3)}, "norm": {"scale": np.zeros(4)}}
    with pytest.raises(
        ValueError, match=r"2 arrays.*\n.*layers.down.kernel \(2, 6, 12\).*fsdp=8.*12\n.*extra.*no pattern"
    ):
        sharding.shardings(mesh, tree, 2)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((3, 1, 1), "does not fit 8 devices"),
        ((1, -1, 3), "does not fit 8 devices"),
        ((-1, -1, 1), "one of them -1"),
        ((8, 1), "a size for each of"),
        ((0, 8, 1), "positive"),
    ],
)
def test_meshes_that_do_not_fit(shape, said):
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(shape)


def test_the_rest_of_the_devices():
    assert dict(sharding.make_mesh((2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_rows_must_be_split_evenly():
    plan = settings.build(peak.get_config("brpo"))  # 32 problems, minibatches of 128 rows, 16 at a time
    plan.check_rows(None)
    plan.check_rows(sharding.make_mesh((2, 4, 1)))
    with pytest.raises(ValueError, match=r"problems=32 and the 128 rows.*multiples of 8 and 256.*micro_rows=32"):
        dataclasses.replace(plan, loss=dataclasses.replace(plan.loss, micro_rows=32)).check_rows(
            sharding.make_mesh((2, 4, 1))
        )


def test_tensor_must_divide_the_heads():
    with pytest.raises(ValueError, match=r"tensor=8 does not divide.*12 query heads.*\(1, 2, 3, 4, 6, 12\)"):
        sharding.kv_copies(12, 2, sharding.make_mesh((1, 1, 8)))
