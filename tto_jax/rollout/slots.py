"""Slots: fewer traces at a time than there are. Thinking and answering are phases of a slot.

A slot holds a copy of its problem's prompt in the cache, and the trace. When a trace is done its answers are decoded
from there, a few slots together, while the other slots stand still; then the slot takes the next trace. Rows and slots
are split over the parts of a mesh in the same way, and every part works through rows of its own: nothing but flags
crosses them. What each part does next follows from flags that every process has.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tto_jax import sharding
from tto_jax.core.types import Answers, Array, Prompts, Traces, pytree
from tto_jax.models import decoding
from tto_jax.models.cache import Cache
from tto_jax.models.config import ModelConfig
from tto_jax.rollout.answering import answer
from tto_jax.rollout.config import RolloutConfig
from tto_jax.rollout.keys import RowKeys, row_keys
from tto_jax.rollout.thinking import ThinkState, Trunk, Weights, idle, prefill


@pytree
class Source:
    """All that slots take: B prompts, prefilled once, and the keys of N traces."""

    prompts: Prompts
    cache: Cache  # B rows
    hidden: Array  # [B,M], predicts the first token of the problem's traces
    keys: RowKeys  # N rows


@pytree
class Slots:
    """W slots."""

    prompts: Prompts  # W rows
    prompt_cache: Cache
    keys: RowKeys
    state: ThinkState


@pytree
class Results:
    """What comes out, row by row, as the slots get done."""

    traces: Traces  # N rows
    forks: Array  # i32[N,S]
    answers: Answers


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def open_slots(
    model: ModelConfig,
    config: RolloutConfig,
    weights: Weights,
    prompts: Prompts,
    key: Array,
    first_trace: Array,
    columns: int,
) -> tuple[Source, Slots, Results]:
    """Prefill every prompt once; W = `config.slots` slots with nothing in them, and results of zeros. columns: S."""
    hidden, cache = prefill(model, decoding.arrange(model, weights), prompts)
    keys = row_keys(key, prompts, config.group_size, first_trace)
    source = Source(prompts=prompts, cache=cache, hidden=hidden, keys=keys)
    slots, pad = config.slots, prompts.tokens.shape[1]
    empty = Prompts(
        tokens=jnp.zeros((slots, pad), jnp.int32), length=jnp.ones(slots, jnp.int32), id=jnp.zeros(slots, jnp.uint32)
    )
    none = jnp.zeros((slots, hidden.shape[1]), hidden.dtype)
    held = Slots(
        prompts=sharding.constrain(empty, sharding.ROWS),
        prompt_cache=Cache.empty(model, slots, pad),
        keys=jax.tree.map(lambda k: sharding.constrain(jnp.broadcast_to(k[:1], (slots,)), sharding.ROWS), keys),
        state=idle(model, config, slots, none, jnp.ones(slots, bool)),
    )
    return source, held, _no_results(config, prompts.length.shape[0] * config.group_size, columns)


def _no_results(config, rows, columns) -> Results:
    lead, trace = (rows, columns, config.answers), (rows, config.trace_pad)
    width = config.forced_pad + config.answer_cap
    whole, real, flag = (functools.partial(jnp.zeros, dtype=dtype) for dtype in (jnp.int32, jnp.float32, bool))
    results = Results(
        traces=Traces(tokens=whole(trace), logprob=real(trace), length=whole(rows), ended=flag(rows), eos=flag(rows)),
        forks=whole((rows, columns)),
        answers=Answers(
            tokens=whole((*lead, width)),
            logprob=real((*lead, width)),
            length=whole(lead),
            forced=whole((rows, columns)),
            ended=flag(lead),
        ),
    )
    return sharding.constrain(results, sharding.ROWS)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def admit(model: ModelConfig, config: RolloutConfig, source: Source, slots: Slots, rows: Array) -> Slots:
    """Put traces into slots. rows: i32[W], of each slot the trace it takes, counted within its part; -1: as it is."""

    def local(arrays, _axis):
        source, slots, rows = arrays
        taken = rows >= 0
        pick = functools.partial(_pick, taken)
        problem, row = jnp.maximum(rows, 0) // config.group_size, jnp.maximum(rows, 0)
        prompts, cache, hidden = (
            jax.tree.map(functools.partial(pick, problem), new, old)
            for new, old in (
                (source.prompts, slots.prompts),
                (source.cache, slots.prompt_cache),
                (source.hidden, slots.state.flow.hidden),
            )
        )
        keys = jax.tree.map(functools.partial(pick, row), source.keys, slots.keys)
        old = slots.state
        reset = lambda x, value: jnp.where(taken, value, x)  # noqa: E731
        blank = lambda x: jnp.where(taken[:, None], 0, x).astype(x.dtype)  # noqa: E731
        flow = type(old.flow)(
            hidden=hidden,
            length=reset(old.flow.length, 0),
            last=reset(old.flow.last, -1),
            done=reset(old.flow.done, False),
        )
        state = ThinkState(flow=flow, tokens=blank(old.tokens), logprob=blank(old.logprob), cache=old.cache)
        return Slots(prompts=prompts, prompt_cache=cache, keys=keys, state=state)

    layout = _layout(slots)
    return sharding.split(local, (source, slots, rows), (_layout(source), layout, P(sharding.ROWS)), layout)


def _pick(taken, index, new, old):
    """Of each slot `new[index]` where it is taken, else `old`."""
    chosen = jnp.take(new, index, axis=0)
    return jnp.where(taken.reshape(-1, *[1] * (chosen.ndim - 1)), chosen, old)


def _layout(tree):
    """PartitionSpecs of a tree of rows: caches are split by heads, too."""
    caches = lambda x: isinstance(x, Cache)  # noqa: E731
    spec = lambda x: jax.tree.map(lambda _: P(sharding.ROWS, "tensor") if caches(x) else P(sharding.ROWS), x)  # noqa: E731
    return jax.tree.map(spec, tree, is_leaf=caches)


@functools.partial(jax.jit, static_argnums=0)
def traces_in(config: RolloutConfig, slots: Slots, lanes: Array, rows: Array) -> Traces:
    """The traces of some slots, `lanes` and `rows` as of `answer_slots`; empty where a lane is."""
    traces = _taken(slots.state.traces(config), lanes)
    return dataclasses.replace(traces, length=jnp.where(rows < 0, 0, traces.length))


def _taken(arrays, lanes):
    """The slots `lanes` of a tree of slots."""
    take = lambda arrays, _axis: jax.tree.map(lambda x: jnp.take(x, arrays[1], axis=0), arrays[0])  # noqa: E731
    layout = _layout(arrays)
    return sharding.split(take, (arrays, lanes), (layout, P(sharding.ROWS)), layout)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="bucket", donate_argnums=4)
def answer_slots(
    model: ModelConfig,
    config: RolloutConfig,
    weights: Weights,
    slots: Slots,
    results: Results,
    forks: Array,
    lanes: Array,
    rows: Array,
    *,
    bucket: int | None = None,
) -> tuple[Results, Array]:
    """Decode the answers of some slots' traces and store both with the results.

    Args:
      forks: i32[lanes,S], of their traces.
      lanes: i32[lanes], slots within their part. rows: i32[lanes], the traces in them within their part; -1: no trace,
        the lane stays empty.
      bucket: static, see `sample_answers`.

    Returns:
      The results, and how many tokens the longest answer has.
    """
    weights = decoding.arrange(model, weights)
    traces = slots.state.traces(config)
    held = (slots.prompts, slots.prompt_cache, slots.state.cache.first((bucket or config.blocks) * config.block))
    prompts, prompt_cache, cache, traces, keys = _taken((*held, traces, slots.keys.answering), lanes)
    trunk = Trunk(prompts=prompts, prompt_cache=prompt_cache, trace_cache=cache, first_trace=jnp.int32(0))
    answers, steps = answer(model, config, weights, trunk, traces, forks, keys, bucket, skip=rows < 0)

    def store(arrays, _axis):
        old, new, rows = arrays
        index = jnp.where(rows < 0, old.traces.length.shape[0], rows)  # beyond the end: dropped
        return jax.tree.map(lambda x, y: x.at[index].set(y, mode="drop"), old, new)

    found = Results(traces=traces, forks=forks, answers=answers)
    specs = (_layout(results), _layout(found), P(sharding.ROWS))
    return sharding.split(store, (results, found, rows), specs, _layout(results)), steps
