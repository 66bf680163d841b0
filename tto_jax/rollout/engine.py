"""The whole rollout, both phases: all traces at once, or through slots; and its compilation beforehand."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import sharding
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.types import Answers, Array, Prompts, Traces
from tto_jax.models import decoding
from tto_jax.models.config import ModelConfig
from tto_jax.rollout import slots as slots_of
from tto_jax.rollout.answering import answer
from tto_jax.rollout.config import RolloutConfig
from tto_jax.rollout.cuts import Cuts
from tto_jax.rollout.schedule import Scheduler
from tto_jax.rollout.stats import RolloutStats, Watch
from tto_jax.rollout.thinking import Trunk, Waiting, Weights, start, think, think_all, traces_of

Rollout = tuple[Traces, Array, Answers, RolloutStats]


def sample(
    model: ModelConfig,
    config: RolloutConfig,
    weights: Weights,
    prompts: Prompts,
    key: Array,
    cuts: Cuts | BudgetSchedule,
    first_trace: int = 0,
    poll: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rollout:
    """G traces of each problem, and answers where they are cut, from the cached traces.

    Args:
      weights: of `rollout.weights`, or parameters. prompts: B rows. key: holds the seed and the step.
      cuts: where; a schedule alone cuts at its budgets.
      first_trace: number of each problem's first trace: many traces can be sampled in parts.
      poll: called between segments; what it raises ends the rollout.
      clock: seconds, for the statistics.

    Returns:
      Traces [N], forks i32[N,S], Answers [N,S,A,E] and the statistics. Tokens depend on the key, the problem's id and
      the trace's number, and on neither slots nor segments (up to floating-point ties).

    Raises:
      ValueError: slots that cannot be split as the mesh asks.
    """
    per_part = config.check(prompts.length.shape[0], _parts())
    watch, first = Watch(clock), sharding.put(np.int32(first_trace))
    run = _in_slots if per_part else _all_at_once
    results, counts = run(model, config, weights, prompts, key, _cuts(cuts), first, poll, watch)
    tokens = jax.device_get(_tokens(results[0].length, results[2]))
    return *results, _stats(counts, tokens, watch)


def compile_all(
    model: ModelConfig,
    config: RolloutConfig,
    weights: Weights,
    prompts: Prompts,
    key: Array,
    cuts: Cuts | BudgetSchedule,
) -> int:
    """Compile every program that `sample` may call with arrays of these shapes; returns how many calls that took.

    Nothing is decoded: loops run no step. Prompts are prefilled.
    """
    number, cuts = 0, _cuts(cuts)
    first, none = sharding.put(np.int32(0)), sharding.put(np.int32(0))
    if config.check(prompts.length.shape[0], _parts()):
        source, held, results = slots_of.open_slots(model, config, weights, prompts, key, first, cuts.size)
        plan = Scheduler(config, prompts.length.shape[0], _parts())
        held = slots_of.admit(model, config, source, held, _row_array(np.full_like(plan.slots, -1)))
        waiting = Waiting(occupied=_row_array(plan.slots >= 0, flat=False), limit=sharding.put(np.int32(1)))
        empty = tuple(_row_array(np.full((plan.parts, plan.lanes), value)) for value in (0, -1))
        for bucket in config.buckets:
            held, _ = _think_in_slots(model, config, weights, held, none, waiting, bucket)
            results, _ = _answer_in_slots(model, config, weights, held, results, cuts, *empty, bucket=bucket)
            number += 2
        traces, answers = results.traces, results.answers
        number += 4
    else:
        skip = sharding.put(np.bool_(True))
        for bucket, state, cache, keys in _each_bucket(model, config, weights, prompts, key):
            traces = traces_of(config, state)
            answers, _ = _answer(
                *(model, config, weights, prompts, cache, state.cache, traces, cuts(traces), keys.answering, skip),
                bucket=bucket,
            )
            number += 2
        number += 3
    jax.block_until_ready(_tokens(traces.length, answers))
    return number + 1


def compile_traces(model: ModelConfig, config: RolloutConfig, weights: Weights, prompts: Prompts, key: Array) -> None:
    """Compile every program that `sample_traces` may call with arrays of these shapes, as `compile_all` does."""
    for _, state, *_ in _each_bucket(model, config, weights, prompts, key):
        jax.block_until_ready(traces_of(config, state).length)


def _each_bucket(model, config, weights, prompts, key):
    """Of every bucket: its size, and the state after no step of thinking, the prompts' cache and the keys."""
    first, none = sharding.put(np.int32(0)), sharding.put(np.int32(0))
    state, cache, keys = start(model, config, weights, prompts, key, first)
    for bucket in config.buckets:
        state, _ = think(model, config, weights, prompts, cache, state, keys.thinking, none, bucket=bucket)
        yield bucket, state, cache, keys


def _parts():
    """How many parts the mesh of the context splits rows into."""
    mesh = jax.sharding.get_mesh()
    return 1 if mesh.empty else sharding.row_shards(mesh)


def _row_array(x, flat=True):
    """Host integers or flags of all parts [parts, ...] on the devices, split by part."""
    x = np.asarray(x, bool if x.dtype == bool else np.int32)
    return sharding.put(x.reshape(-1) if flat else x, sharding.ROWS)


def _cuts(cuts):
    return Cuts(cuts) if isinstance(cuts, BudgetSchedule) else cuts


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="bucket")
def _answer(model, config, weights, prompts, prompt_cache, trace_cache, traces, forks, keys, skip, *, bucket):
    trunk = Trunk(prompts=prompts, prompt_cache=prompt_cache, trace_cache=trace_cache, first_trace=jnp.int32(0))
    skip, arranged = jnp.broadcast_to(skip, traces.length.shape), decoding.arrange(model, weights)
    return answer(model, config, arranged, trunk, traces, forks, keys, bucket, skip)


@jax.jit
def _tokens(length, answers):
    """Sampled tokens of all traces, and of all answers."""
    counts = jnp.sum(length), jnp.sum(answers.length - answers.forced[..., None])
    return sharding.constrain(counts)


def _all_at_once(model, config, weights, prompts, key, cuts, first, poll, watch):
    state, cache, keys = jax.block_until_ready(start(model, config, weights, prompts, key, first))
    watch.mark("prefill")
    state, seen = think_all(model, config, weights, prompts, cache, state, keys, poll)
    watch.mark("think")
    bucket = config.bucket(-(-int(seen[-1].length.max()) // config.block))
    skip = sharding.put(np.bool_(False))
    traces = traces_of(config, state)
    forks = cuts(traces)
    answers, steps = _answer(
        model, config, weights, prompts, cache, state.cache, traces, forks, keys.answering, skip, bucket=bucket
    )
    branches = answers.length.size * int(jax.device_get(steps))
    watch.mark("answer")
    rows = traces.length.shape[0]
    think_steps = rows * sum(int(progress.steps) for progress in seen)
    return (traces, forks, answers), (rows, len(seen) + 4, think_steps, branches)


def _in_slots(model, config, weights, prompts, key, cuts, first, poll, watch):
    plan = Scheduler(config, prompts.length.shape[0], _parts())
    opened = slots_of.open_slots(model, config, weights, prompts, key, first, cuts.size)
    source, held, results = jax.block_until_ready(opened)
    del opened
    watch.mark("prefill")
    calls, think_steps, answer_steps = 1, 0, 0
    while not plan.finished:
        if (rows := plan.admit()) is not None:
            held = slots_of.admit(model, config, source, held, _row_array(rows))
            calls += 1
        if plan.thinking():
            waiting = Waiting(
                occupied=_row_array(plan.slots >= 0, flat=False), limit=sharding.put(np.int32(plan.lanes))
            )
            blocks, bucket = plan.segment()
            end = sharding.put(np.int32(blocks))
            held, progress = _think_in_slots(model, config, weights, held, end, waiting, bucket)
            progress = jax.device_get(progress)
            plan.see(progress.done, progress.length)
            calls, think_steps = calls + 1, think_steps + config.slots * int(progress.steps)
            watch.mark("think")
        while plan.answers_due():
            lanes, rows, bucket = plan.answer()
            results, steps = _answer_in_slots(
                model, config, weights, held, results, cuts, _row_array(lanes), _row_array(rows), bucket=bucket
            )
            branches = lanes.size * cuts.size * config.answers
            calls, answer_steps = calls + 3, answer_steps + branches * int(jax.device_get(steps))
            watch.mark("answer")
        if not plan.finished:
            poll()
    return (results.traces, results.forks, results.answers), (config.slots, calls, think_steps, answer_steps)


def _think_in_slots(model, config, weights, held, end, waiting, bucket):
    """A segment of the slots' traces, up to `end` blocks: the slots after it, and how far they are."""
    state, progress = think(
        model,
        config,
        weights,
        held.prompts,
        held.prompt_cache,
        held.state,
        held.keys.thinking,
        end,
        waiting,
        bucket=bucket,
    )
    return dataclasses.replace(held, state=state), progress


def _answer_in_slots(model, config, weights, held, results, cuts, lanes, rows, bucket):
    """Cut the traces of some slots and decode their answers: the results with them, and the longest answer's tokens."""
    forks = cuts(slots_of.traces_in(config, held, lanes, rows))
    return slots_of.answer_slots(model, config, weights, held, results, forks, lanes, rows, bucket=bucket)


def _stats(counts, tokens, watch) -> RolloutStats:
    slots, programs, think_steps, answer_steps = counts
    return RolloutStats(
        slots=slots,
        programs=programs,
        prefill_seconds=watch.seconds["prefill"],
        think_seconds=watch.seconds["think"],
        answer_seconds=watch.seconds["answer"],
        seconds=watch.total(),
        think_tokens=int(tokens[0]),
        answer_tokens=int(tokens[1]),
        think_slot_steps=think_steps,
        answer_slot_steps=answer_steps,
    )
