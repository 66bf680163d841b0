"""Thinking: prompts are prefilled once for their traces, which are decoded in segments of blocks."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import sharding
from tto_jax.core.types import Array, Prompts, Traces, pytree
from tto_jax.kernels import branch_decode
from tto_jax.kernels.branch_decode import Interval
from tto_jax.models import decoding
from tto_jax.models.cache import Cache, Context
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params
from tto_jax.rollout.blocks import Flow, decode_block
from tto_jax.rollout.config import RolloutConfig
from tto_jax.rollout.keys import RowKeys, row_keys

Weights = decoding.Weights | Params


@functools.partial(jax.jit, static_argnums=0)
def weights(model: ModelConfig, params: Params) -> decoding.Weights:
    """The parameters as the rollout wants them: in the compute dtype, whole on every device but for `tensor`.

    Once an iteration: weights split over `fsdp` would be gathered for every token.
    """
    arranged = decoding.arrange(model, params)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return arranged
    return jax.tree.map(jax.lax.with_sharding_constraint, arranged, decoding.shardings(mesh, model))


@pytree
class Trunk:
    """What the answers hang on: prompts (B rows) and traces (N rows) in the cache."""

    prompts: Prompts
    prompt_cache: Cache
    trace_cache: Cache
    first_trace: Array  # i32[], number of each problem's first trace


@pytree
class ThinkState:
    """R traces under way; of row r the cache holds all whole blocks, and no other row needs to stand where it does."""

    flow: Flow
    tokens: Array  # i32[R,C]
    logprob: Array  # f32[R,C]
    cache: Cache  # capacity: C, rounded up to whole blocks

    def traces(self, config: RolloutConfig) -> Traces:
        """The traces so far."""
        ended = self.flow.done & (self.flow.last == config.think_end) & (self.flow.length > 0)
        eos = self.flow.done & (self.flow.last == config.eos) & (self.flow.length > 0) & ~ended
        return Traces(tokens=self.tokens, logprob=self.logprob, length=self.flow.length, ended=ended, eos=eos)


@pytree
class Progress:
    """What the host needs to know, the same on every device."""

    done: Array  # bool[R]
    length: Array  # i32[R]
    steps: Array  # i32[], tokens of the row that got most


@pytree
class Waiting:
    """When slots are to be seen to: of any part, `limit` occupied slots are done."""

    occupied: Array  # bool[parts, R / parts]
    limit: Array  # i32[]


def enough(done: Array, waiting: Waiting) -> jax.Array:
    """bool[]: some part has as many traces that are done as it may."""
    number = jnp.sum(done.reshape(waiting.occupied.shape) & waiting.occupied, axis=1)
    return jnp.any(number >= waiting.limit)


def idle(model: ModelConfig, config: RolloutConfig, rows: int, hidden: Array, done: Array | None = None) -> ThinkState:
    """R traces without a token; hidden [R,M] predicts their first."""
    shape = (rows, config.trace_pad)
    arrays = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    tokens, logprob = sharding.constrain(arrays, sharding.ROWS)
    capacity = config.blocks * config.block
    tile = branch_decode.tile(model.branch_decode, model.group, capacity)
    cache = Cache.empty(model, rows, capacity, tile if tile == config.block else 0)  # a block is written as a tile
    return ThinkState(flow=Flow.begin(hidden, done), tokens=tokens, logprob=logprob, cache=cache)


def prefill(model: ModelConfig, weights: decoding.Weights, prompts: Prompts) -> tuple[jax.Array, Cache]:
    """Hidden state of each prompt's last token [B,M], the only ones that are projected later, and the cache."""
    rows, pad = prompts.tokens.shape
    position = jnp.broadcast_to(jnp.arange(pad), (rows, pad))
    hidden, cache = decoding.decode(model, weights, prompts.tokens, position)
    return jnp.take_along_axis(hidden, (prompts.length - 1)[:, None, None], axis=1)[:, 0], cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def start(
    model: ModelConfig, config: RolloutConfig, weights: Weights, prompts: Prompts, key: Array, first_trace: Array
) -> tuple[ThinkState, Cache, RowKeys]:
    """Prefill every prompt once; its G traces share the cache and start from its last hidden state."""
    last, cache = prefill(model, decoding.arrange(model, weights), prompts)
    hidden = jnp.repeat(last, config.group_size, axis=0)
    return (
        idle(model, config, hidden.shape[0], hidden),
        cache,
        row_keys(key, prompts, config.group_size, first_trace),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="bucket", donate_argnums=5)
def think(
    model: ModelConfig,
    config: RolloutConfig,
    weights: Weights,
    prompts: Prompts,
    prompt_cache: Cache,
    state: ThinkState,
    keys: Array,
    blocks: Array,
    waiting: Waiting | None = None,
    *,
    bucket: int | None = None,
) -> tuple[ThinkState, Progress]:
    """Decode up to `blocks` blocks; stops early when all traces are done.

    Args:
      prompts, prompt_cache: B rows, each of R / B consecutive traces.
      keys: key[R]. blocks: i32[].
      waiting: for slots, which stand at places of their own; it stops early, too, when `enough` of them are done. None:
        all traces have begun together.
      bucket: static; blocks of the cache that any row may hold when this ends. None: all.
    """
    weights = decoding.arrange(model, weights)
    rows = state.tokens.shape[0]
    share = rows // prompts.length.shape[0]
    prompt_length = jnp.repeat(prompts.length, share)
    size, bucket = config.block, bucket or config.blocks
    in_prompt = jnp.broadcast_to(prompts.length[:, None], (prompts.length.shape[0], share))
    prompt = Context(cache=prompt_cache, visible=Interval(begin=jnp.zeros_like(in_prompt), end=in_prompt))
    prompt = prompt.for_loop(model, rows)
    stops, limit = (config.think_end, config.eos), config.trace_pad

    def running(carry):
        number, _, state = carry
        go_on = (number < blocks) & ~jnp.all(state.flow.done)
        return go_on if waiting is None else go_on & ~enough(state.flow.done, waiting)

    def step(carry):
        number, steps, state = carry
        active, begin = ~state.flow.done, state.flow.length
        before = Interval(begin=jnp.zeros((rows, 1), jnp.int32), end=begin[:, None])
        context = (prompt, Context(cache=state.cache.first(bucket * size), visible=before))
        flow, block = decode_block(
            model, weights, config.sample, state.flow, size, keys, prompt_length + begin, context, stops, limit, size
        )
        place = jnp.where(active, begin // size, -1)
        state = ThinkState(
            flow=flow,
            tokens=_store(state.tokens, block.tokens, place),
            logprob=_store(state.logprob, block.logprob, place),
            # Without slots all traces that go on stand at one place; beyond its end a cache may hold anything.
            cache=state.cache.write(jnp.max(place) * size, block.cache)
            if waiting is None
            else state.cache.write_blocks(place, block.cache),
        )
        return number + 1, steps + block.steps, state

    _, steps, state = jax.lax.while_loop(running, step, (jnp.int32(0), jnp.int32(0), state))
    told = sharding.constrain(Progress(done=state.flow.done, length=state.flow.length, steps=steps))
    # Rows stay where they are, though what is told of them goes to every device: a state keeps its types.
    return dataclasses.replace(state, flow=sharding.constrain(state.flow, sharding.ROWS)), told


def _store(long, block, place):
    """long [R,C], block [T,R] -> long with the block at [place T, place T + T) of each row; beyond C it is cut."""
    size, capacity = block.shape[0], long.shape[1]
    tiled = jnp.tile(block.T, (1, -(-capacity // size)))[:, :capacity]
    return jnp.where(jnp.arange(capacity) // size == place[:, None], tiled, long)


def sample_traces(
    model: ModelConfig,
    config: RolloutConfig,
    weights: Weights,
    prompts: Prompts,
    key: Array,
    first_trace: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> tuple[Traces, Trunk]:
    """Think: G traces for each problem, up to `trace_pad` tokens, ended by `</think>` or EOS.

    Segments of at most `config.segment` tokens are jitted; between them the host looks whether all traces have ended.
    Traces are numbered from `first_trace`: many traces of a problem can be sampled in parts. `poll` is called between
    segments; what it raises ends the rollout.
    """
    first_trace = sharding.put(np.int32(first_trace))
    state, cache, keys = start(model, config, weights, prompts, key, first_trace)
    state, _ = think_all(model, config, weights, prompts, cache, state, keys, poll)
    trunk = Trunk(prompts=prompts, prompt_cache=cache, trace_cache=state.cache, first_trace=first_trace)
    return traces_of(config, state), trunk


traces_of = jax.jit(lambda config, state: state.traces(config), static_argnums=0)


def think_all(model, config, weights, prompts, cache, state, keys, poll) -> tuple[ThinkState, list[Progress]]:
    """All traces to their ends, segment by segment; what is known after each."""
    place, seen = 0, []
    while place < config.blocks:
        bucket = config.bucket(place + 1)
        number = min(config.segment_blocks, bucket - place)
        state, progress = think(
            model, config, weights, prompts, cache, state, keys.thinking, sharding.put(np.int32(number)), bucket=bucket
        )
        seen.append(jax.device_get(progress))
        place += number
        if place < config.blocks:
            if seen[-1].done.all():
                break
            poll()
    return state, seen
