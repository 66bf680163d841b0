"""Slots, segments, length buckets and answer lanes: none may change a token, none may compile anything later."""

import contextlib
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from test_rollout import BUDGETS, CONFIG, MODEL, B, G, always, assert_same_rollout, base, make_prompts, params

from tto_jax import rollout, sharding
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.kernels.branch_decode import blocked
from tto_jax.rollout import thinking
from tto_jax.rollout.schedule import Scheduler

SCHEDULE = BudgetSchedule.from_prior(BUDGETS)
N = B * G


def sample(config=CONFIG, weights=None, step=50, prompts=None, model=MODEL, **options):
    """(traces, forks, answers) on the host, and the statistics."""
    weights = rollout.weights(model, params() if weights is None else weights)
    key = jax.random.fold_in(jax.random.key(0), step)
    prompts = jax.device_put(make_prompts() if prompts is None else prompts)
    *result, stats = rollout.sample(model, config, weights, prompts, key, SCHEDULE, **options)
    return jax.device_get(tuple(result)), stats


@pytest.fixture(scope="module", autouse=True)
def unoptimized():
    """These programs run a few times at most: compiling them dominates."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# What may not change.


@pytest.mark.parametrize(
    "change",
    [{}, {"slots": 8}, {"slots": 1}, {"slots": 5, "segment": 1}, {"slots": 7, "answer_slots": 3, "segment": 7}],
    ids=str,
)
def test_tokens_do_not_depend_on_slots_and_segments(change):
    """The reference is the two phases one after the other, by the functions that know of no slots."""
    result, stats = sample(dataclasses.replace(CONFIG, **{"segment": 256} | change))
    assert_same_rollout(result, base())
    assert stats.slots == change.get("slots", N)


@pytest.mark.parametrize("slots", [0, 5])
def test_tokens_do_not_depend_on_tiles_of_keys(slots, monkeypatch):
    """Of the traces' cache, where a block is a tile, and of the prompts', which each slot has to itself."""
    monkeypatch.setattr(blocked, "TILE", 8)
    monkeypatch.setattr(blocked, "TILED", 8)
    model = dataclasses.replace(MODEL, branch_decode="blocked")
    config = dataclasses.replace(CONFIG, segment=8, slots=slots)
    cache = thinking.idle(model, config, N, np.zeros((N, MODEL.hidden_size))).cache
    assert cache.k[0].shape == (N, 1, config.blocks, MODEL.head_dim, 8) and config.blocks > 1
    assert_same_rollout(sample(config, model=model, prompts=make_prompts(8))[0], base())


def test_a_rollout_in_parts_through_slots():
    half = dataclasses.replace(CONFIG, group_size=G // 2, slots=3)
    parts = [sample(half, first_trace=first)[0] for first in (0, G // 2)]
    joined = [
        np.concatenate([x.reshape(B, G // 2, *x.shape[1:]) for x in pair], axis=1).reshape(N, *pair[0].shape[1:])
        for pair in zip(*map(jax.tree.leaves, parts))
    ]
    assert_same_rollout(joined, base())


LONG = 140
LONG_BUDGETS = (70, LONG)
LONG_CONFIG = dataclasses.replace(CONFIG, trace_pad=LONG, answers=2, answer_cap=40, eos=-1, segment=48)
LONG_MODEL = dataclasses.replace(MODEL, max_position=LONG + 64, learned_positions=False)
LONG_SCHEDULE = BudgetSchedule.from_prior(LONG_BUDGETS)


@functools.cache
def long_params():
    """Ends are rare: traces of all lengths up to the pad."""
    weights = {name: tree for name, tree in params().items() if name != "position_embed"}
    head = 1.5 * np.array(weights["lm_head"]["kernel"])
    head[:, CONFIG.think_end] /= 6.0
    return weights | {"lm_head": {"kernel": head}}


@functools.cache
def long(**change):
    config = dataclasses.replace(LONG_CONFIG, **change)
    weights = rollout.weights(LONG_MODEL, long_params())
    *result, stats = rollout.sample(
        LONG_MODEL, config, weights, jax.device_put(make_prompts()), jax.random.key(3), LONG_SCHEDULE
    )
    return jax.device_get(tuple(result)), stats


@pytest.mark.slow
def test_blocks_and_buckets_of_long_traces():
    """Several blocks, segments and buckets, answers of more than one block; segment 140 has other blocks."""
    expected, stats = long()
    assert len(LONG_CONFIG.buckets) == 2 and LONG_CONFIG.block == 24
    lengths = expected[0].length
    assert (lengths == LONG).any() and len(set((lengths // LONG_CONFIG.block).tolist())) > 3
    for change in ({"slots": 4}, {"segment": 140}):
        assert_same_rollout(long(**change)[0], expected)
    for found in (stats, long(slots=4)[1]):
        assert found.tokens == lengths.sum() + (expected[2].length - expected[2].forced[..., None]).sum()


# What is compiled, and when.


@contextlib.contextmanager
def compilations():
    """Events of tracing and compiling that happen inside."""
    found = []
    listen = lambda event, _seconds, **_: found.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        found[:] = [event for event in found if "compile" in event or "trac" in event]


@pytest.mark.parametrize("slots", [0, 5])
def test_nothing_is_compiled_after_the_warm_up(slots):
    """`compile_all` once; then steps whose traces have other lengths, prompts and keys, under the transfer guard."""
    config = dataclasses.replace(LONG_CONFIG, trace_pad=130, answers=2, answer_cap=5, slots=slots)
    schedule = sharding.put(BudgetSchedule.from_prior((70, 130)))
    keys = [jax.device_put(jax.random.key(step)) for step in range(3)]
    trees = always(13), always(CONFIG.think_end), long_params()
    weights = [rollout.weights(LONG_MODEL, tree) for tree in trees]
    prompts = [
        jax.device_put(dataclasses.replace(make_prompts(), length=np.full(B, length, np.int32))) for length in (1, 3, 5)
    ]
    assert len(config.buckets) == 2
    with compilations() as before:
        rollout.compile_all(LONG_MODEL, config, weights[0], prompts[0], keys[0], schedule)
    with compilations() as after, jax.transfer_guard("disallow"):
        lengths = [
            jax.device_get(rollout.sample(LONG_MODEL, config, w, p, key, schedule)[0].length)
            for w, p, key in zip(weights, prompts, keys)
        ]
    assert before and not after, after
    assert (lengths[0] == 130).all() and (lengths[1] == 1).all() and len(set(lengths[2].tolist())) > 4


# How slots are used.


def simulate(config, problems, parts, lengths):
    """The scheduler's loop without a model: traces of given lengths [parts, rows]. Counts of each program."""
    plan = Scheduler(config, problems, parts)
    position = np.zeros(plan.slots.shape, int)
    order, counts = [[] for _ in range(parts)], {"think": 0, "answer": 0}
    for _ in range(10_000):
        if plan.finished:
            return plan, order, counts
        if (rows := plan.admit()) is not None:
            assert (plan.slots[rows >= 0] == rows[rows >= 0]).all()
            position[rows >= 0] = 0
        if plan.thinking():
            blocks, bucket = plan.segment()
            assert 1 <= blocks <= config.segment_blocks and bucket in config.buckets
            held = np.take_along_axis(lengths, np.maximum(plan.slots, 0), axis=1)
            active = (plan.slots >= 0) & (position < held)
            position = np.where(active, np.minimum(position + blocks * config.block, held), position)
            assert position[active].max() <= bucket * config.block
            done = (plan.slots < 0) | (position >= held)
            plan.see(done.reshape(-1), position.reshape(-1))
            counts["think"] += 1
        while plan.answers_due():
            lanes, rows, bucket = plan.answer()
            assert lanes.shape == (parts, plan.lanes)
            for part in range(parts):
                kept = rows[part] >= 0
                order[part] += rows[part][kept].tolist()
                assert (position[part][lanes[part][kept]] == lengths[part][rows[part][kept]]).all()
                assert (lengths[part][rows[part][kept]] <= bucket * config.block).all()
            counts["answer"] += 1
    raise AssertionError("the scheduler does not end")


@pytest.mark.parametrize(("slots", "lanes", "parts"), [(1, 1, 1), (5, 2, 1), (8, 4, 2), (16, 0, 4)], ids=str)
def test_every_trace_is_answered_once(slots, lanes, parts):
    config = dataclasses.replace(LONG_CONFIG, group_size=8, slots=slots, answer_slots=lanes)
    lengths = np.random.default_rng(slots).integers(1, LONG + 1, (parts, 8 * 8 // parts))
    _, order, counts = simulate(config, 8, parts, lengths)
    assert [sorted(part) for part in order] == [list(range(64 // parts))] * parts
    together = max(lanes, slots // 4 if not lanes else 1)
    assert counts["answer"] <= 2 * 64 / together, "answers are decoded together"


def test_a_free_slot_takes_the_next_trace_at_once():
    """One slot: a trace after the other, each with its answers; as many programs as that takes and no more."""
    config = dataclasses.replace(LONG_CONFIG, slots=1)
    _, order, counts = simulate(config, 4, 1, np.full((1, 16), 24))
    assert order == [list(range(16))] and counts == {"think": 16, "answer": 16}


@pytest.mark.parametrize(
    ("change", "problems", "parts", "says"),
    [
        ({"slots": 17}, 4, 1, r"slots=17.*at most 16"),
        ({"slots": 6}, 4, 4, r"slots=6.*4 parts.*multiples of 4"),
        ({"slots": 8, "answer_slots": 2}, 4, 4, r"answer_slots=2.*multiples of 4"),
        ({"slots": 3}, 3, 2, r"3 problems.*2 parts"),
    ],
    ids=str,
)
def test_slots_that_do_not_fit_are_refused(change, problems, parts, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CONFIG, **change).check(problems, parts)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"slots": -1}, "slots=-1"), ({"answer_slots": 2}, "answer_slots=2 exceeds rollout.slots=0")],
    ids=str,
)
def test_slots_that_make_no_sense_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CONFIG, **change)


def test_segments_are_whole_blocks():
    for segment in range(1, 300):
        config = dataclasses.replace(CONFIG, trace_pad=1000, segment=segment)
        taken = config.block * config.segment_blocks
        assert 1 <= config.block <= 32 and segment - config.segment_blocks < taken <= segment
        assert config.buckets[-1] == config.blocks and 0 <= config.blocks * config.block - 1000 < config.block
    assert dataclasses.replace(CONFIG, trace_pad=8000, segment=256).buckets == (63, 125, 188, 250)


# What is reported.


def ticks():
    return functools.partial(next, itertools.count())


def test_statistics_of_a_model_that_never_ends():
    """Every slot-step samples a token: nothing is lost; a clock that ticks once a look shows where the time goes."""
    clock = ticks()
    (traces, _, answers), stats = sample(weights=always(13), clock=clock)
    assert stats.think_tokens == stats.think_slot_steps == traces.length.sum() == N * CONFIG.trace_pad
    assert stats.answer_tokens == stats.answer_slot_steps == answers.length.size * CONFIG.answer_cap
    assert stats.occupancy == 1 and stats.straggler_share == 0
    assert (stats.prefill_seconds, stats.think_seconds, stats.answer_seconds, stats.seconds) == (1, 1, 1, 4)
    assert stats.prefill_share == 1 / 4 and stats.tokens_per_second == stats.tokens / 4
    wanted = {"rollout/occupancy", "speed/rollout/tokens_per_second", "speed/rollout/straggler_share"}
    assert set(stats.metrics()) >= wanted


def test_slots_lose_less_to_stragglers():
    """The same tokens in fewer slot-steps: slots take new traces while long ones go on."""
    whole, few = long()[1], long(slots=4)[1]
    assert whole.think_tokens == few.think_tokens and whole.answer_tokens == few.answer_tokens
    assert whole.occupancy < 1 and few.think_slot_steps < 0.9 * whole.think_slot_steps
    assert whole.straggler_share > 0


def test_poll_is_called_between_segments_and_ends_the_rollout():
    class Stop(Exception):
        pass

    def poll():
        raise Stop

    for slots in (0, 3):
        with pytest.raises(Stop):
            sample(dataclasses.replace(CONFIG, slots=slots), weights=always(13), poll=poll)


# On a mesh.


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2)], ids=str)
def test_slots_on_a_mesh_give_the_tokens_of_one_device(shape):
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    model = dataclasses.replace(MODEL, kv_copies=sharding.kv_copies(MODEL.num_heads, MODEL.num_kv_heads, mesh))
    with jax.set_mesh(mesh):
        placed = sharding.place(mesh, params(), model.num_kv_heads)
        weights, prompts = rollout.weights(model, placed), sharding.put_rows(make_prompts())
        key = sharding.put(jax.random.fold_in(jax.random.key(0), 50))
        config = dataclasses.replace(CONFIG, slots=6)
        with jax.transfer_guard("disallow"):
            *result, _ = rollout.sample(model, config, weights, prompts, key, sharding.put(SCHEDULE))
            result = jax.device_get(tuple(result))
    assert_same_rollout(result, base())
