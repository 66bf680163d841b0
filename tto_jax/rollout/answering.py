"""Answering: S*A answers of each trace, decoded together from its cached trunk; nothing is prefilled again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import sharding
from tto_jax.core import budgets
from tto_jax.core.types import Answers, Array, Traces, pytree
from tto_jax.kernels.branch_decode import Interval
from tto_jax.models import decoding
from tto_jax.models.cache import Cache, Context
from tto_jax.models.config import ModelConfig
from tto_jax.rollout.blocks import Flow, decode_block, draw
from tto_jax.rollout.config import RolloutConfig
from tto_jax.rollout.keys import answer_keys, row_keys, uniforms
from tto_jax.rollout.thinking import Trunk, Weights

cut = jax.jit(budgets.forks_at_budgets)  # between the two: lengths i32[N], schedule -> forks i32[N,S]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="bucket")
def sample_answers(
    model: ModelConfig,
    config: RolloutConfig,
    weights: Weights,
    trunk: Trunk,
    traces: Traces,
    forks: Array,
    key: Array,
    *,
    bucket: int | None = None,
) -> Answers:
    """Force an answer `config.answers` times at each fork, from the cached trace: no second prefill.

    Args:
      trunk, traces: of `sample_traces`. forks: i32[N,S], tokens of the trace before each cut.
      key: the one given to `sample_traces` (phases differ by tag).
      bucket: static; blocks of the traces' cache that hold all forks. None: all.

    Returns:
      Answers [N,S,A,E] with E = forced pad + answer cap.
    """
    keys = row_keys(key, trunk.prompts, config.group_size, trunk.first_trace).answering
    return answer(model, config, decoding.arrange(model, weights), trunk, traces, forks, keys, bucket)[0]


@pytree
class Sampled:
    """Sampled tokens of the branches, by position."""

    tokens: Array  # i32[positions, branches]
    logprob: Array  # f32[positions, branches]
    flow: Flow
    steps: Array  # i32[], of the branch that has most


def answer(
    model: ModelConfig,
    config: RolloutConfig,
    weights: decoding.Weights,
    trunk: Trunk,
    traces: Traces,
    forks: Array,
    keys: Array,
    bucket: int | None = None,
    skip: Array | None = None,
) -> tuple[Answers, jax.Array]:
    """The answers of `sample_answers`, and how many tokens the longest has: i32[].

    Args:
      keys: key[N] of the rows. skip: bool[N], rows whose answers are not asked for; what they get means nothing.
      The prompts' rows divide the traces'.
    """
    rows, columns = forks.shape
    number = config.answers
    cut_off = Trunk(
        prompts=trunk.prompts,
        prompt_cache=trunk.prompt_cache,
        trace_cache=trunk.trace_cache.first((bucket or config.blocks) * config.block),
        first_trace=trunk.first_trace,
    )
    forced, length = _forced_tokens(config, traces, forks)
    share = rows // trunk.prompts.length.shape[0]
    begin = jnp.repeat(trunk.prompts.length, share)[:, None] + forks  # position of the first inserted token
    hidden, forced_cache = _feed_forced(model, config, weights, cut_off, traces, forks, forced, begin)
    last = jnp.take_along_axis(hidden, (config.refed + length - 1)[..., None, None], axis=2)[:, :, 0]  # [N,S,M]

    spread = lambda x: jnp.repeat(x.reshape(rows * columns, *x.shape[2:]), number, axis=0)  # noqa: E731
    inserted = (length + config.refed).reshape(-1, 1)  # the one fed again is in the trunk
    context = (
        *_trunk_context(cut_off, jnp.repeat(begin, number, axis=1)),
        Context(cache=forced_cache, visible=Interval(begin=jnp.full_like(inserted, config.refed), end=inserted)),
    )
    done = jnp.zeros((rows, columns), bool) if skip is None else jnp.broadcast_to(skip[:, None], (rows, columns))
    sampled = _decode_answers(
        model,
        config,
        weights,
        Flow.begin(spread(last), spread(done)),
        answer_keys(keys, columns, number),
        spread(begin + length),
        tuple(part.for_loop(model, rows * columns * number) for part in context),
    )
    return _assemble(config, forced, length, sampled), sharding.constrain(sampled.steps)


def _decode_answers(model, config, weights, flow, keys, position, context) -> Sampled:
    """All branches from their first token on; position: i32[branches] of it. The last token is not fed to the model."""
    branches, size = position.shape[0], config.answer_block
    stops, cap = (config.eos,), config.answer_cap
    settled = config.answer_capacity - size  # tokens of the long cache: the last block stays in the short one
    long = Cache.empty(model, branches, settled) if settled else None
    begin = Sampled(
        tokens=jnp.zeros((config.answer_capacity + 1, branches), jnp.int32),
        logprob=jnp.zeros((config.answer_capacity + 1, branches)),
        flow=flow,
        steps=jnp.int32(0),
    )

    def step(carry):
        sampled, long = carry
        place = sampled.steps
        own = jnp.full((branches, 1), place)
        before = () if long is None else (Context(cache=long, visible=Interval(begin=jnp.zeros_like(own), end=own)),)
        flow, block = decode_block(
            model,
            weights,
            config.sample,
            sampled.flow,
            size,
            keys,
            position + place,
            (*context, *before),
            stops,
            cap,
            cap - 1 - place,
        )
        write = jax.lax.dynamic_update_slice_in_dim
        sampled = Sampled(
            tokens=write(sampled.tokens, block.tokens, place, axis=0),
            logprob=write(sampled.logprob, block.logprob, place, axis=0),
            flow=flow,
            steps=place + block.steps,
        )
        return sampled, None if long is None else long.write(place, block.cache)

    carry = (begin, long)
    if cap > 1:
        running = lambda carry: (carry[0].steps < cap - 1) & ~jnp.all(carry[0].flow.done)  # noqa: E731
        carry = jax.lax.while_loop(running, step, carry)
    sampled, _ = carry
    uniform = uniforms(keys, jnp.full(branches, cap - 1), 1)[0]
    more = ~jnp.all(sampled.flow.done)
    flow, token, logprob = draw(model, weights, config.sample, sampled.flow, uniform, stops, cap)
    return Sampled(
        tokens=sampled.tokens.at[cap - 1].add(token),
        logprob=sampled.logprob.at[cap - 1].add(logprob),
        flow=flow,
        steps=sampled.steps + more,
    )


def _forced_tokens(config, traces, forks):
    """Inserted tokens i32[N,S,F] and their number i32[N,S]: a column that holds `</think>` needs no other."""
    pad = lambda ids: np.pad(np.asarray(ids, np.int32), (0, config.forced_pad - len(ids)))  # noqa: E731
    ended = traces.ended[:, None] & (forks == traces.length[:, None])
    tokens = jnp.where(ended[..., None], pad(config.elicit_ended), pad(config.elicit_cut))
    return tokens, jnp.where(ended, len(config.elicit_ended), len(config.elicit_cut)).astype(jnp.int32)


def _feed_forced(model, config, weights, trunk, traces, forks, forced, begin):
    """Hidden states [N,S,F,M] of the inserted tokens, once for the A answers of a fork, and their cache (N*S rows).

    With `config.refed` the token before the fork comes first (F is one more).
    """
    if config.refed:
        before = jnp.take_along_axis(traces.tokens, jnp.maximum(forks - 1, 0), axis=1)
        last = jnp.take_along_axis(trunk.prompts.tokens, (trunk.prompts.length - 1)[:, None], axis=1)
        before = jnp.where(forks > 0, before, jnp.repeat(last, forks.shape[0] // last.shape[0], axis=0))
        forced, begin = jnp.concatenate([before[..., None], forced], axis=-1), begin - 1
    rows, columns, pad = forced.shape
    slot = jnp.arange(pad)
    position = (begin[..., None] + slot).reshape(rows * columns, pad)
    context = _trunk_context(trunk, jnp.repeat(begin, pad, axis=1))
    hidden, cache = decoding.decode(model, weights, forced.reshape(rows * columns, pad), position, context)
    return hidden.reshape(rows, columns, pad, -1), cache


def _trunk_context(trunk, end):
    """Prompt and trace as context of queries that see the trunk's positions before `end` i32[N,Q]."""
    problems = trunk.prompts.length.shape[0]
    length, of_prompt = trunk.prompts.length[:, None], end.reshape(problems, -1)
    in_prompt, in_trace = jnp.minimum(length, of_prompt), (of_prompt - length).reshape(end.shape)
    return (
        Context(cache=trunk.prompt_cache, visible=Interval(begin=jnp.zeros_like(in_prompt), end=in_prompt)),
        Context(cache=trunk.trace_cache, visible=Interval(begin=jnp.zeros_like(in_trace), end=in_trace)),
    )


def _assemble(config, forced, forced_length, sampled: Sampled) -> Answers:
    """Inserted tokens followed at once by the sampled ones: [N,S,A,E]."""
    rows, columns, pad = forced.shape
    lead = (rows, columns, config.answers)
    slot = jnp.arange(pad + config.answer_cap)
    index = slot - forced_length[..., None, None]  # of the sampled token
    inside = jnp.broadcast_to(jnp.clip(index, 0, config.answer_cap - 1), (*lead, slot.size))
    length = sampled.flow.length.reshape(lead)
    is_sampled = (index >= 0) & (index < length[..., None])
    gather = lambda x: jnp.take_along_axis(x.T.reshape(*lead, -1), inside, axis=-1)  # noqa: E731
    inserted = jnp.pad(forced, ((0, 0), (0, 0), (0, config.answer_cap)))[:, :, None]
    return Answers(
        tokens=jnp.where(index < 0, inserted, jnp.where(is_sampled, gather(sampled.tokens), 0)),
        logprob=jnp.where(is_sampled, gather(sampled.logprob), 0.0),
        length=forced_length[..., None] + length,
        forced=forced_length,
        ended=sampled.flow.last.reshape(lead) == config.eos if config.eos >= 0 else jnp.zeros(lead, bool),
    )
