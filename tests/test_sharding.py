"""Every mesh of 8 virtual devices gives the one-device result; layouts come from one table."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import peak
from tto_jax import checkpoint, data, evaluation, inputs, learner, rollout, settings, sharding
from tto_jax.core import credit, token_tree
from tto_jax.models import decoder, hf_weights

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
BUDGETS, ANSWER_CAP = (4, 8), 3
SMALL = {
    "task.num_values": 4,
    "model.hidden_size": 16,
    "model.num_heads": 8,
    "model.num_kv_heads": 2,  # fewer than the most devices along `tensor`
    "model.head_dim": 4,
    "model.mlp_size": 32,
    "data.problems": 8,
    "budgets.tokens": BUDGETS,
    "rollout.problems": 8,
    "rollout.group_size": 2,
    "rollout.answers": 2,
    "rollout.temperature": 0.9,
    "learner.micro_tokens": 1,
    "learner.buckets": 2,
    "learner.tokens_per_row": 6,
    "learner.optimizer.learning_rate": 1e-3,
    "learner.optimizer.warmup_steps": 0,
    "evaluation.budgets": BUDGETS,
}


def make_plan():
    """The peak experiment at its smallest, with answers of several tokens; neither 8 nor 2 divides its vocabulary."""
    config = peak.get_config("brpo")
    config.update_from_flattened_dict(SMALL)
    plan = settings.build(config)
    plan = dataclasses.replace(plan, rollout=dataclasses.replace(plan.rollout, answer_cap=ANSWER_CAP, eos=2))
    size, answers = plan.schedule.size, plan.rollout.answers
    states = token_tree.num_states(plan.prompt_pad, BUDGETS[-1], size, answers, plan.answer_pad, False)
    loss = dataclasses.replace(plan.loss, num_targets=BUDGETS[-1] + size * answers * ANSWER_CAP, num_states=states)
    assert plan.model.vocab_size == 27
    return dataclasses.replace(plan, loss=loss), inputs.training_problems(config, plan.task, plan.tokenizer).problems


PLAN, PROBLEMS = make_plan()
B, G, A = PLAN.problems, PLAN.rollout.group_size, PLAN.rollout.answers


@pytest.fixture(scope="module", autouse=True)
def unoptimized():
    """These programs run a few times at most: compiling them dominates."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    like = jax.eval_shape(lambda: decoder.init_params(PLAN.model, 0))
    return jax.tree.map(lambda x: np.asarray(0.3 * rng.normal(size=x.shape) + (x.ndim == 1), np.float32), like)


@jax.jit
def credit_and_pack(prompts, traces, answers, forks, correct):
    by_trace = forks.reshape(*correct.shape[:2], -1)
    earned = credit.assign(correct, by_trace, PLAN.schedule, estimator="brpo", answers="brpo")
    return earned, token_tree.pack(prompts, traces, answers, forks, earned, jnp.ones(PLAN.schedule.size))


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out on one mesh."""

    state: Any  # shape, dtype and sharding of every array of the state: when it was born, after each step
    first: Any  # results of the first step, on the host
    params: Any  # after it, on the host
    evaluation: evaluation.Evaluation
    compiled: list[str]  # in the steps after the first
    programs: dict[str, str]  # compiled: `think` decodes traces, `score` computes log-probs


def run(mesh):
    """Three steps of training, and an evaluation before them whose rollout is as large as theirs."""
    compiled = []
    listen = lambda event, _seconds, **_: compiled.append(event)  # noqa: E731
    plan = PLAN.on(mesh)
    params = sharding.place(mesh, weights(), plan.model.num_kv_heads)
    rows = PLAN.rows if mesh is None else PLAN.rows // sharding.row_shards(mesh)
    options = evaluation.Options(budgets=BUDGETS, traces=G, answers=A, temperature=0.9, seed=3, rows=rows)
    evaluated = evaluation.evaluate(plan, params, PROBLEMS, options)
    state = learner.init_state(params, plan.optimizer, mesh, plan.model.num_kv_heads)
    seen = [types(state)]
    programs = {}
    state, first = step(plan, state, 0, programs)
    after, seen = jax.device_get(state.params), [*seen, types(state)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for number in (1, 2):
            state, _ = step(plan, state, number)
            seen.append(types(state))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    again = [event for event in compiled if "compile" in event or "trac" in event]
    return Run(seen, first, after, evaluated, again, programs)


def step(plan, state, number, programs=None):
    """Rollout, credit, log-probs, two minibatches: (state, results on the host). `programs` are filled in if given."""
    batches = data.problem_batches(PROBLEMS, plan.tokenizer, plan.problems, plan.prompt_pad, number, (0, 1))
    prompts, key = sharding.put_rows(next(batches).prompts), sharding.put(jax.random.key(number))
    cast = rollout.weights(plan.model, state.params)
    traces, trunk = rollout.sample_traces(plan.model, plan.rollout, cast, prompts, key)
    forks = rollout.cut(traces.length, sharding.put(plan.schedule))
    answers = rollout.sample_answers(plan.model, plan.rollout, cast, trunk, traces, forks, key)
    correct = np.random.default_rng(number).random((B, G, plan.schedule.size, A)) < 0.5
    earned, rows = credit_and_pack(prompts, traces, answers, forks, sharding.put_rows(correct.astype(np.float32)))
    old, entropy = learner.score_logprobs(plan.model, plan.loss, state.params, rows)
    if programs is not None:
        programs["think"] = token_loop(plan, cast, prompts, key)
        begun = learner.begin_scores(plan.loss, rows)
        score = learner.score_bucket.lower(plan.model, plan.loss, 0, state.params, *begun)
        programs["score"] = score.compile().as_text()
        programs["sort"] = learner.begin_scores.lower(plan.loss, rows).compile().as_text()
    rows = dataclasses.replace(rows, old_logprob=old)
    for index in range(2):
        part = learner.minibatch(rows, 2, sharding.put(np.int32(index)))
        state, metrics = learner.train_step(plan.model, plan.loss, plan.optimizer, state, part)
    return state, jax.device_get((traces, answers, earned, rows, entropy, metrics))


def token_loop(plan, cast, prompts, key):
    state, cache, keys = rollout.start(plan.model, plan.rollout, cast, prompts, key, sharding.put(np.int32(0)))
    end = sharding.put(np.int32(BUDGETS[-1]))
    arguments = (plan.model, plan.rollout, cast, prompts, cache, state, keys.thinking, end)
    return rollout.think.lower(*arguments).compile().as_text()


def types(state):
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): (x.shape, x.dtype, x.sharding) for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def alone():
    return run(None)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def meshed(request):
    mesh = sharding.make_mesh(request.param)
    with sharding.use(mesh):
        return mesh, run(mesh)


def test_every_mesh_gives_the_one_device_result(alone, meshed):
    """Tokens are compared exactly, though a uniform draw within rounding of a boundary could choose its neighbour."""
    _, found = meshed
    results, padding = zip(*(without_padding_share(first) for first in (alone.first, found.first)))
    assert 0 < padding[0] <= padding[1] < 1, "parts compute one length at a time, that of the longest row of any"
    for one, many in zip(*map(jax.tree.leaves, results), strict=True):
        if np.issubdtype(one.dtype, np.floating):
            np.testing.assert_allclose(one, many, atol=3e-5, rtol=1e-5)
        else:
            np.testing.assert_array_equal(one, many)
    traces, answers, _, rows, entropy, _ = found.first
    size = PLAN.model.vocab_size
    assert traces.tokens.max() < size and answers.tokens.max() < size and entropy.max() < np.log(size)
    assert len(np.unique(traces.tokens)) > size / 2 and len(np.unique(traces.length)) > 1
    trained = rows.loss_mask
    np.testing.assert_allclose(rows.sampler_logprob[trained], rows.old_logprob[trained], atol=3e-5)
    assert rows.old_logprob[trained].min() < -3
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), weights(), alone.params)
    assert min(jax.tree.leaves(moved)) > 1e-4, "a parameter that does not move would agree for nothing"
    # Adam divides by the gradient's size, so that rounding of tiny gradients is seen: a tenth of a step of 1e-3.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), alone.params, found.params)


def without_padding_share(first):
    *others, metrics = first
    share = metrics["update/padding_share"]
    return (*others, {name: x for name, x in metrics.items() if name != "update/padding_share"}), share


def test_every_mesh_gives_the_one_device_evaluation(alone, meshed):
    one, many = (dataclasses.asdict(x) | {"seconds": 0} for x in (alone.evaluation, meshed[1].evaluation))
    assert one["length"].shape == (B, G) and len(np.unique(one["length"])) > 1
    for name in one:
        np.testing.assert_array_equal(one[name], many[name], err_msg=name)


def test_steps_keep_the_types_of_the_state(meshed):
    born, *after = meshed[1].state
    assert len(after) == 3 and all(types == born for types in after)


def test_later_steps_compile_nothing(meshed, alone):
    assert alone.compiled == [] and meshed[1].compiled == []


def test_the_state_is_split(meshed):
    """Each device holds its share of what the mesh splits, not a copy; what has a vocabulary lies without `tensor`."""
    mesh, found = meshed
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    shares = {r"(q|out|gate|up|down)\.kernel": 1 / (fsdp * tensor), r"embed\.embedding|lm_head\.kernel": 1 / fsdp}
    for pattern, share in shares.items():
        arrays = [of for name, of in found.state[0].items() if re.search(rf"({pattern})$", name)]
        assert len(arrays) >= 9, "parameters and both moments"
        for shape, _, where in arrays:
            assert np.prod(where.shard_shape(shape)) == share * np.prod(shape)


def test_the_token_loop_gathers_no_weights(meshed):
    """In the token loop nothing crosses `data` or `fsdp` but the stop test, and no weight is gathered."""
    mesh, found = meshed
    groups = row_groups(mesh)
    for line in found.programs["think"].splitlines():
        if not collectives(line):
            continue
        result = line.split("=")[1].split("(")[0]
        inside = re.search(r"(pred|[su]32)\[\d*\]", result)  # flags and lengths of rows
        crosses = any(len(set(group) & set(other)) > 1 for group in line_groups(line) for other in groups)
        assert inside or not crosses, line
        if "all-gather" in line and "f32[" in result:
            (sizes,) = re.findall(r"f32\[([\d,]+)\]", result)
            rows = PLAN.rows // sharding.row_shards(mesh)
            assert sizes == f"{-(-PLAN.model.vocab_size // mesh.shape['tensor']) * mesh.shape['tensor']},{rows}", line


def test_sorting_rows_sends_their_lengths_alone(meshed):
    mesh, found = meshed
    sent = collectives(found.programs["sort"])
    assert len(sent) <= 1 and all(re.match(rf"s32\[{PLAN.rows // sharding.row_shards(mesh)}\]", x) for x, _ in sent)


def test_a_padded_vocabulary_is_split_before_it_is_gathered(meshed):
    """Over `fsdp` each device gathers its own part of embedding and head: no device ever holds all of either."""
    mesh, found = meshed
    lines = [line for line in found.programs["score"].splitlines() if collectives(line) and "all-gather" in line]
    assert lines or mesh.shape["fsdp"] == 1
    if mesh.shape["tensor"] > 1:
        width, sizes = PLAN.model.hidden_size, (27, 28, 32)
        whole = [f"f32[{rows},{columns}]" for n in sizes for rows, columns in ((n, width), (width, n))]
        assert not [line for line in lines if any(shape in line.split("all-gather")[0] for shape in whole)]


def test_a_checkpoint_goes_from_mesh_to_mesh(tmp_path):
    """Arrays whose vocabulary no `tensor` axis divides: saved on one mesh, restored on another and on none."""
    params = {name: weights()[name] for name in ("embed", "lm_head")}
    one, other = sharding.make_mesh((2, 2, 2)), sharding.make_mesh((1, 1, 8))
    like = jax.eval_shape(lambda: params)
    with checkpoint.Checkpointer(tmp_path, keep=1) as saved:
        saved.save(1, sharding.place(one, params, 2), {})
        found = [saved.restore(1, sharding.abstract(mesh, like, 2))[0] for mesh in (other, None)]
    assert found[0]["embed"]["embedding"].sharding.mesh == other
    for restored in found:
        jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(restored))


def test_hugging_face_files_know_nothing_of_a_mesh(tmp_path):
    """Of a model on a mesh that does not divide its vocabulary: byte by byte those of one device, and read back."""
    model = dataclasses.replace(PLAN.model, learned_positions=False, qk_norm=False)
    like, mesh = hf_weights.abstract_params(model), sharding.make_mesh((1, 2, 4))
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), like)
    for name, on in (("one", None), ("many", mesh)):
        placed = sharding.place(on, params, model.num_kv_heads)
        hf_weights.save(tmp_path / name, model, placed, dtype="float32")
    one, many = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many"))
    assert one == many
    read = hf_weights.load(tmp_path / "many", model, sharding.shardings(mesh, like, model.num_kv_heads))
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(read))


def test_credit_over_problems_needs_no_collective():
    mesh = sharding.make_mesh((8, 1, 1))
    rows = NamedSharding(mesh, P("data"))
    correct = jax.ShapeDtypeStruct((B, G, len(BUDGETS), A), jnp.float32, sharding=rows)
    forks = jax.ShapeDtypeStruct((B, G, len(BUDGETS)), jnp.int32, sharding=rows)
    for estimator in ("brpo", "grpo", "mrt"):
        function = functools.partial(credit.assign, estimator=estimator, answers="brpo")
        text = jax.jit(function).lower(correct, forks, PLAN.schedule).compile().as_text()
        assert "replica_groups" not in text and collectives(text) == []


def collectives(text):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return re.findall(rf"= (.*?) ({names})(?:-start)?\(", text)


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
    for config in (PLAN.model, dataclasses.replace(PLAN.model, learned_positions=False, tie_embeddings=True)):
        mesh = sharding.make_mesh((2, 2, 2))
        like = learner.abstract_state(config, PLAN.optimizer)
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


@pytest.mark.parametrize(("size", "axis"), [(27, None), (28, "tensor")])
def test_weights_of_a_vocabulary_are_not_padded(size, axis):
    mesh = sharding.make_mesh((1, 4, 2))
    like = jax.eval_shape(lambda: decoder.init_params(dataclasses.replace(PLAN.model, vocab_size=size), 0))
    found = sharding.shardings(mesh, like, 2)
    assert found["embed"]["embedding"].spec == P(axis, "fsdp")
    assert found["lm_head"]["kernel"].spec == (P("fsdp", axis) if axis else P("fsdp"))
    rollouts = sharding.shardings(mesh, like, 2, without=("fsdp",))
    assert rollouts["embed"]["embedding"].spec == (P(axis) if axis else P())


def test_conflicts_are_listed_together(monkeypatch):
    mesh = sharding.make_mesh((1, 8, 1))
    tree = {"layers": {"down": {"kernel": np.zeros((2, 6, 12))}, "extra": np.zeros(3)}, "norm": {"scale": np.zeros(4)}}
    tree |= {"lm_head": {"kernel": np.zeros(8)}, "other": {"norm": {"scale": np.zeros((5, 8))}}}
    monkeypatch.setattr(sharding, "TABLE", (*sharding.TABLE, (r"other\..*", P("fsdp"))))
    with pytest.raises(ValueError, match=r"4 arrays cannot be laid out on mesh .*'fsdp': 8") as raised:
        sharding.shardings(mesh, tree, 2)
    said = str(raised.value).replace("PartitionSpec", "P").splitlines()[1:]
    assert [line.strip() for line in said] == [
        "layers.down.kernel (2, 6, 12) with P(None, None, 'fsdp'): fsdp=8 does not divide 12",
        "layers.extra (3,): no pattern matches",
        "lm_head.kernel (8,): its spec P('fsdp', 'vocab') has more dimensions",
        r"other.norm.scale (5, 8): matched by ['norm\\.scale', 'other\\..*']",
    ]


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


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of one of several slices; their processes have two each."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "tpu"


def test_data_spans_the_slices():
    """Each index along `data` lies in one slice, whatever the order of the devices; other axes may not span slices."""
    chips = [Chip(id=i, slice_index=i % 2, process_index=0) for i in range(8)]
    for shape in ((2, 2, 2), (4, 1, 2), (2, -1, 1)):
        grid = sharding.make_mesh(shape, chips).devices
        assert grid.size == 8 and all(len({chip.slice_index for chip in part.flat}) == 1 for part in grid)
    with pytest.raises(ValueError, match=r"data=1 must be a multiple of the 2 slices"):
        sharding.make_mesh((1, 4, 2), chips)


def test_a_process_has_consecutive_rows():
    """`tensor` stays within a process, so that a row is whole on the one that grades it."""
    chips = [Chip(id=i, slice_index=0, process_index=i // 2) for i in range(8)]
    rows = sharding.make_mesh((2, 2, 2), chips[::-1]).devices.reshape(4, 2)
    assert [[chip.process_index for chip in row] for row in rows] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    with pytest.raises(ValueError, match=r"tensor=4 must lie within a process.*\[\[0, 0, 1, 1\], \[2, 2, 3, 3\]\]"):
        sharding.make_mesh((1, 2, 4), chips)


def test_rows_must_be_split_evenly():
    plan = settings.build(peak.get_config("brpo"))  # 32 problems, minibatches of 128 rows
    plan.check_rows(None)
    plan.check_rows(sharding.make_mesh((2, 4, 1)))
    with pytest.raises(ValueError, match=r"problems=28 and the 112 rows.*multiples of 8: mesh"):
        dataclasses.replace(plan, problems=28).check_rows(sharding.make_mesh((2, 4, 1)))


def test_tensor_must_divide_the_heads():
    with pytest.raises(ValueError, match=r"tensor=8 does not divide.*12 query heads.*\(1, 2, 3, 4, 6, 12\)"):
        sharding.kv_copies(12, 2, sharding.make_mesh((1, 1, 8)))
