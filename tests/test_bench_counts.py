"""What the benchmarks count by hand, beside the compiler's own count, literal loops and arrays that are there."""

import dataclasses
import functools
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax import learner
from tto_jax.bench import branch_decode, limits, memory, models, timing, token_logprobs, tree_attention, trees, update
from tto_jax.bench.options import Options
from tto_jax.bench.trees import Sizes
from tto_jax.core import token_tree
from tto_jax.models.cache import Cache
from tto_jax.models.config import ModelConfig

PLAIN = Sizes(rows=2, prompt=8, forks=(24,), answers=0, forced=0, cap=0)
TREE = Sizes(rows=4, prompt=3, forks=(2, 5, 7), answers=2, forced=2, cap=3)
WIDE = ModelConfig(  # one layer: nothing loops, and products outweigh the rest by far
    vocab_size=1024,
    hidden_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_size=512,
    max_position=64,
    attention_bias=True,
)


def compiled_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def assert_just_below(counted, compiled, share):
    """The compiler counts element-wise work, too."""
    assert counted <= compiled <= (1 + share) * counted


# FLOPs, beside the compiler's.


def test_attention_flops():
    model = dataclasses.replace(WIDE, head_dim=128)
    sizes = Sizes(rows=1, prompt=16, forks=(48,), answers=0, forced=0, cap=0)
    rows = tree_attention.tree_rows(dataclasses.replace(sizes, answers=1, cap=64))
    arrays, length = tree_attention.inputs(model, rows), rows.tokens.shape[1]
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    every_pair = length**2  # what the reference multiplies, seen or not
    for function, count in (
        (tree_attention.attend, limits.attention),
        (tree_attention.gradient, limits.attention_gradient),
    ):
        counted = count(length, length, *heads, every_pair, 4).flops
        assert_just_below(counted, compiled_flops(functools.partial(function, "reference"), *arrays, rows), 0.06)


def test_branch_decode_flops():
    shape = branch_decode.Shape("ci", 2, (32, 32), 2, 16, "float32", 1)
    model = dataclasses.replace(WIDE, head_dim=128)
    query, trunk, own = branch_decode.inputs(model, shape)
    counted = branch_decode.work(model, shape, trunks=2).flops
    decode = functools.partial(branch_decode.branch_decode, implementation="reference")
    assert_just_below(counted, compiled_flops(decode, query, (trunk, own)), 0.06)


def test_logprob_flops():
    shape = token_logprobs.Shape(32, 512, 1024, "float32", 1)
    arrays = token_logprobs.inputs(shape)
    for make, gradient in ((token_logprobs.forward, False), (token_logprobs.gradient, True)):
        counted = limits.logprobs(shape.rows, shape.hidden, shape.vocabulary, 4, gradient).flops
        assert_just_below(counted, compiled_flops(make("reference"), *arrays), 0.03)


def test_update_flops():
    rows = update.plain_rows(PLAIN, WIDE)
    options = Options(attention="reference", logprobs="reference")
    config = update.loss_config(PLAIN, 10**6, rows, PLAIN.trained, options)
    state = jax.eval_shape(lambda: learner.init_state(models.decoder.init_params(WIDE, 0), update.OPTIMIZER))
    begun = jax.eval_shape(functools.partial(learner.begin, learner.loss, WIDE, config), state.params, rows)
    program = learner.accumulate.lower(learner.loss, WIDE, config, 0, state.params, *begun).compile()
    every_pair = PLAIN.rows * PLAIN.length**2
    counted = limits.update(WIDE, PLAIN.rows * PLAIN.length, every_pair, PLAIN.rows * PLAIN.trained)
    assert_just_below(counted.flops, program.cost_analysis()["flops"], 0.1)
    assert counted.bytes == 10 * 4 * limits.parameters(WIDE)


# Pairs, tokens and bytes, beside loops and arrays.


def test_sizes_of_real_models():
    model = models.find("1.5b", "bfloat16").config
    assert limits.parameters(model) == 1_777_088_000  # DeepSeek-R1-Distill-Qwen-1.5B
    assert limits.kv_bytes(model) == 28_672
    assert limits.weights_bytes(model) == 2 * (1_777_088_000 - 151_936 * 1536)
    assert round(limits.parameters(models.find("tiny", "float32").config) / 1e6, 1) == 3.5
    assert round(limits.parameters(models.find("small", "float32").config) / 1e6) == 25


def test_kv_bytes_are_those_of_a_cache():
    model = models.find("ci", "bfloat16").config
    cache = jax.eval_shape(lambda: Cache.empty(model, 3, 7))
    assert 3 * 7 * limits.kv_bytes(model) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def test_pairs_of_a_tree():
    rows = trees.packed(TREE, *trees.made(TREE, 50, group=2), trees.credit_of(TREE, 2))
    assert rows.tokens.shape == (TREE.rows, TREE.length)
    visible = np.asarray(jax.vmap(token_tree.visible)(rows, rows))
    assert visible.sum() == TREE.rows * TREE.pairs
    assert rows.loss_mask.sum() == TREE.rows * TREE.trained


def test_pairs_of_trees_whose_traces_end_anywhere():
    prompts, traces, answers, forks = trees.made(TREE, 50, group=2, full=False)
    rows = trees.packed(TREE, prompts, traces, answers, forks, trees.credit_of(TREE, 2))
    assert len(set(traces.length.tolist())) > 1 and (forks <= traces.length[:, None]).all()
    visible, real = np.asarray(jax.vmap(token_tree.visible)(rows, rows)), np.asarray(rows.tree) >= 0
    assert visible[real].sum() == trees.pairs(TREE, traces.length, forks)
    assert real.sum() == rows.tokens.size - TREE.rows * TREE.trace + traces.length.sum()


def test_flattened_rows_are_the_branches():
    """Every trained token once, with its advantage, behind the tokens that it saw in the tree."""
    rows = trees.packed(TREE, *trees.made(TREE, 50, group=2), trees.credit_of(TREE, 2))
    flat = trees.flattened(TREE, rows)
    seen = {True: [], False: []}  # packed? -> (what came before, token, advantage, log-prob) of every trained token
    for packed, part in ((True, rows), *((False, part) for part in flat)):
        part = jax.device_get(part)
        visible = np.asarray(jax.vmap(token_tree.visible)(part, part))
        for n, t in np.argwhere(part.loss_mask):
            source = part.source[n, t]
            before = part.tokens[n][visible[n, source]][np.argsort(part.position[n][visible[n, source]])]
            line = (*before.tolist(), part.tokens[n, t], part.advantage[n, t], part.old_logprob[n, t])
            seen[packed].append(tuple(float(x) for x in line))
    assert sorted(seen[True]) == sorted(seen[False])
    assert [(g.rows(TREE), g.length(TREE)) for g in trees.groups(TREE)] == [part.tokens.shape for part in flat]


@pytest.mark.parametrize("group", [1, 2])
def test_thinking_is_what_a_loop_counts(group):
    problems, prompt, new, model = 3, 5, 4, models.find("ci", "float32").config
    tokens = pairs = held = projected = steps = 0
    for _ in range(problems):
        tokens, pairs, projected = tokens + prompt, pairs + sum(range(1, prompt + 1)), projected + 1
    for t in range(1, new):  # feed sampled token t: it sees the prompt and t tokens of its trace
        for _ in range(problems * group):
            tokens, pairs, projected = tokens + 1, pairs + prompt + t, projected + 1
        held += problems * prompt + problems * group * t
    steps = 1 + (new - 1)
    found = limits.thinking(model, problems, group, prompt, new)
    assert found.flops == limits.forward_flops(model, tokens, pairs, projected)
    assert found.bytes == steps * limits.weights_bytes(model) + held * limits.kv_bytes(model)


def test_answering_is_what_a_loop_counts():
    rows, group, answers, prompt, forks, forced, cap = 4, 2, 3, 5, (2, 6), 2, 4
    model = models.find("ci", "float32").config
    tokens = pairs = projected = 0
    for fork in [fork for fork in forks for _ in range(rows)]:
        for i in range(forced):
            tokens, pairs = tokens + 1, pairs + prompt + fork + i + 1
        projected += 1
        for _ in range(answers):
            for e in range(1, cap):
                tokens, pairs, projected = tokens + 1, pairs + prompt + fork + forced + e, projected + 1
    trunk = (rows // group) * prompt + rows * max(forks) + rows * len(forks) * forced
    held = sum(trunk + rows * len(forks) * answers * e for e in range(cap))
    found = limits.answering(model, rows, group, answers, prompt, forks, forced, cap)
    assert found.flops == limits.forward_flops(model, tokens, pairs, projected)
    assert found.bytes == cap * limits.weights_bytes(model) + held * limits.kv_bytes(model)
    apart = limits.prefilled_answers(model, rows, answers, prompt, forks, forced, cap)
    assert apart.flops > found.flops and apart.bytes > found.bytes


def test_branches_share_their_trunk():
    shape = branch_decode.Shape("ci", 2, (8, 16), 3, 4, "float32", 1)
    model = models.find("ci", "float32").config
    shared, alone = (branch_decode.work(model, shape, trunks) for trunks in (2, 12))
    a_token = 2 * model.num_kv_heads * model.head_dim * 4
    assert shared.flops == alone.flops
    assert alone.bytes - shared.bytes == (2 * 3 * (8 + 16) - 2 * 16) * a_token


# Limits of the device.


def test_limits_are_given_known_or_measured(monkeypatch):
    work = limits.Work(flops=2e12, bytes=1e9)
    given = limits.of_device("float32", 1e12, 1e9)
    assert given == limits.Limits(1e12, 1e9, "given")
    assert given.share(work, 4.0) == (0.5, "compute")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")])
    assert limits.of_device("bfloat16") == limits.Limits(197e12, 819e9, "known, v5e")
    assert limits.of_device("bfloat16", peak_bandwidth=1e9) == limits.Limits(197e12, 1e9, "given, the other known, v5e")
    monkeypatch.undo()
    found = limits.measured("float32", 64, 2**16)
    assert found.flops > 1e6 and found.bandwidth > 1e6 and found.source.startswith("measured: 64 x 64 float32")


# Seconds, compilation, memory.


def test_first_calls_are_left_out():
    seen = []
    sides = [timing.Side(name, functools.partial(seen.append, name), limits.Work()) for name in "ab"]
    a, b = timing.measure(sides, calls=3)
    assert seen == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert a.timing.n == b.timing.n == 3


def test_cpu_seconds_are_not_those_of_waiting():
    def work():
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    busy, idle = timing.measure(
        [
            timing.Side("busy", work, limits.Work()),
            timing.Side("idle", lambda: time.sleep(0.05), limits.Work()),
        ],
        calls=1,
        left_out=0,
    )
    assert busy.timing.cpu >= 0.05 > 0.04 > idle.timing.cpu
    assert idle.timing.median >= 0.05


def test_compilation_is_counted_and_found_where_it_should_not_be():
    steady = jax.jit(lambda x: jnp.sin(x) * 3.25)
    sizes = iter(range(10, 20))
    row, changing = timing.measure(
        [
            timing.Side("steady", lambda: steady(np.ones(7)), limits.Work()),
            timing.Side("changing", lambda: steady(np.ones(next(sizes))), limits.Work()),
        ],
        calls=2,
    )
    assert row.compile_s > 0 and row.compiled_later == 0
    assert changing.compiled_later >= 2


def test_nested_compilation_is_counted_once(monkeypatch):
    now = iter([1.0, 3.0, 10.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    found = timing.Compilation()
    for event, duration in ((timing.COMPILED, 0.5), (timing.COMPILATION + "trace", 3.0), (timing.COMPILED, 1.0)):
        found.add(event, duration)
    found.add("/jax/other", 100.0)
    assert found.seconds == 3.0 + 1.0 and found.programs == 2


def test_peak_memory_is_that_of_the_calls():
    if not memory.reset():
        pytest.skip("the system does not let the peak be reset")
    big = 2**28

    def hold(size):
        return float(np.ones(size // 8).sum())

    large, small = timing.measure(
        [timing.Side(str(size), functools.partial(hold, size), limits.Work()) for size in (big, 8)], calls=1
    )
    assert large.memory.source == "VmHWM"
    assert 0.9 * big < large.memory.peak - small.memory.peak < 1.5 * big


def test_differences_are_relative_to_the_first():
    first = [np.float32([2, -4]), np.zeros(1) + 1]
    assert timing.largest_difference([first]) == 0
    assert timing.largest_difference([first, [np.float32([2, -3]), np.ones(1)]]) == 0.25
