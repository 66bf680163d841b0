"""The loop over the tokens of a block, which thinking and answering share.

Rows stand at places of their own, but all of them begin a block together. Inside a block the new keys and values go to
a short cache at one common slot; what came before is only read. Nothing is scattered row by row.
"""

import functools

import jax
import jax.numpy as jnp

from tto_jax import sharding
from tto_jax.core import sampling
from tto_jax.core.sampling import SampleConfig
from tto_jax.core.types import Array, pytree
from tto_jax.models import decoding
from tto_jax.models.cache import Cache, Context
from tto_jax.models.config import ModelConfig
from tto_jax.models.rope import rotation
from tto_jax.rollout.keys import uniforms


@pytree
class Flow:
    """Where the rows of a loop stand."""

    hidden: Array  # [R,M], predicts the next token
    length: Array  # i32[R], tokens sampled so far
    last: Array  # i32[R], the one before; -1: none
    done: Array  # bool[R], nothing is sampled any more

    @classmethod
    def begin(cls, hidden: Array, done: Array | None = None) -> "Flow":
        """Rows that predict their first token, but for those that are `done` bool[R]."""
        rows = hidden.shape[:1]
        done = jnp.zeros(rows, bool) if done is None else done
        flow = cls(hidden=hidden, length=jnp.zeros(rows, jnp.int32), last=jnp.full(rows, -1, jnp.int32), done=done)
        return sharding.constrain(flow, sharding.ROWS)


@pytree
class Block:
    """What a block has added, [T,R]; 0 where nothing was sampled."""

    tokens: Array  # i32[T,R]
    logprob: Array  # f32[T,R]
    cache: Cache  # R rows of capacity T
    steps: Array  # i32[], tokens of the row that has most


def draw(
    model: ModelConfig,
    weights: decoding.Weights,
    options: SampleConfig,
    flow: Flow,
    uniform: Array,
    stops: tuple[int, ...],
    limit: int,
) -> tuple[Flow, jax.Array, jax.Array]:
    """Sample the next token of the rows that are not done: the flow after it, tokens i32[R] and log-probs f32[R].

    A row is done after a token of `stops` and at `limit` tokens. uniform: f32[R].
    """
    logits = decoding.logits(model, weights, flow.hidden)
    drawn = functools.partial(sampling.sample, temperature=options.temperature, top_k=options.top_k)
    token, logprob = drawn(logits, uniform, top_p=options.top_p, renormalise=options.renormalise)
    token, logprob = jnp.where(flow.done, 0, token), jnp.where(flow.done, 0.0, logprob)
    length, stopped = flow.length + ~flow.done, functools.reduce(jnp.logical_or, [token == stop for stop in stops])
    after = Flow(
        hidden=flow.hidden,
        length=length,
        last=jnp.where(flow.done, flow.last, token),
        done=flow.done | stopped | (length >= limit),
    )
    return after, token, logprob


def decode_block(
    model: ModelConfig,
    weights: decoding.Weights,
    options: SampleConfig,
    flow: Flow,
    size: int,
    keys: Array,
    position: Array,
    context: tuple[Context, ...],
    stops: tuple[int, ...],
    limit: int,
    steps: Array,
) -> tuple[Flow, Block]:
    """Sample up to `size` tokens a row, T, until all rows are done.

    Args:
      keys: key[R], from which every token's is folded. position: i32[R], of the first token of each row's block.
      context: finished caches, with everything before the block.
      stops, limit: see `draw`. steps: i32[], tokens at most of this block.
    """
    rows, begin = position.shape[0], flow.length
    turns = rotation(position[:, None] + jnp.arange(size), model)
    drawn = uniforms(keys, begin, size)
    empty = Block(
        tokens=jnp.zeros((size, rows), jnp.int32),
        logprob=jnp.zeros((size, rows)),
        cache=Cache.empty(model, rows, size),
        steps=jnp.int32(0),
    )

    def step(carry):
        flow, block = carry
        i = block.steps
        flow, token, logprob = draw(model, weights, options, flow, drawn[i], stops, limit)
        own = decoding.Open(cache=block.cache, slot=i, turns=turns)
        hidden, cache = decoding.decode(model, weights, token[:, None], (position + i)[:, None], context, own)
        flow = Flow(hidden=hidden[:, 0], length=flow.length, last=flow.last, done=flow.done)
        tokens, logprobs = block.tokens.at[i].set(token), block.logprob.at[i].set(logprob)
        return flow, Block(tokens=tokens, logprob=logprobs, cache=cache, steps=i + 1)

    running = lambda carry: (carry[1].steps < jnp.minimum(size, steps)) & ~jnp.all(carry[0].done)  # noqa: E731
    return jax.lax.while_loop(running, step, (flow, empty))
