"""The rollout engine: thinking traces, then answers forced at forks of the cached traces.

Everything jitted is pure in (params, prompts, key). Shapes are static; the host loop runs segments and stops early.
Random keys are folded from (step, problem id, trace[, column, answer], position): the tokens that come out do not
depend on the batch's layout (up to floating-point ties).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import sharding
from tto_jax.core import budgets, sampling
from tto_jax.core.sampling import SampleConfig
from tto_jax.core.types import Answers, Array, Prompts, Traces, pytree
from tto_jax.models import decoder
from tto_jax.models.cache import Cache, Context
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params

THINKING, ANSWERING = 0, 1  # phases have keys of their own


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Static options of a rollout; token ids come from the tokenizer."""

    group_size: int  # G
    trace_pad: int  # C, the largest budget in tokens
    answers: int  # A
    answer_cap: int  # sampled tokens an answer
    think_end: int
    eos: int  # -1 where the vocabulary has none
    elicit_ended: tuple[int, ...]  # inserted after a trace that ended with think_end
    elicit_cut: tuple[int, ...]  # inserted after a cut
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    segment: int = 256  # tokens a jitted segment: how soon the host can stop

    def __post_init__(self):
        for name in ("group_size", "trace_pad", "answers", "answer_cap", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: it must be a positive integer")

    @property
    def forced_pad(self) -> int:
        """Longest elicitation, in tokens."""
        return max(len(self.elicit_ended), len(self.elicit_cut))

    @property
    def refed(self) -> int:
        """1 where an answer may follow the trunk directly: the token before the fork is then fed once more, as the
        hidden state that predicts the answer is not kept. Else 0: an inserted token predicts it.
        """
        return int(not (self.elicit_ended and self.elicit_cut))


@functools.partial(jax.jit, static_argnums=0)
def weights(model: ModelConfig, params: Params) -> Params:
    """The parameters as the rollout wants them: in the compute dtype, whole on every device but for `tensor`.

    Once an iteration: weights split over `fsdp` would be gathered for every token.
    """
    cast = jax.tree.map(lambda x: x.astype(model.dtype), params)
    return sharding.constrain_params(cast, model.num_kv_heads, without=("fsdp",))


@pytree
class Trunk:
    """What the answers hang on: prompts (B rows) and traces (N rows) in the cache."""

    prompts: Prompts
    prompt_cache: Cache
    trace_cache: Cache
    first_trace: Array  # i32[], number of each problem's first trace


@pytree
class ThinkState:
    """State of the decoding loop over positions of the trace."""

    position: Array  # i32[], tokens of the trace so far
    hidden: Array  # [N, M], predicts the next token
    traces: Traces
    cache: Cache


@pytree
class RowKeys:
    """Keys of the N rows by identity: folded from (step, problem id, trace)."""

    thinking: Array  # key[N]
    answering: Array  # key[N]


def row_keys(key: Array, prompts: Prompts, group_size: int, first_trace: Array) -> RowKeys:
    """Keys for B problems x G traces, numbered from `first_trace`; `key` already holds the seed and the step."""

    def one(problem, trace):
        row = jax.random.fold_in(jax.random.fold_in(key, problem), trace)
        return RowKeys(thinking=jax.random.fold_in(row, THINKING), answering=jax.random.fold_in(row, ANSWERING))

    keys = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.asarray(prompts.id), first_trace + jnp.arange(group_size))
    return jax.tree.map(lambda x: x.reshape(-1), keys)


def sample_traces(
    model: ModelConfig,
    config: RolloutConfig,
    params: Params,
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
    state, trunk, keys = _start(model, config, params, prompts, key, first_trace)
    for begin in range(0, config.trace_pad, config.segment):
        end = min(begin + config.segment, config.trace_pad)
        state, done = _think(model, config, params, prompts, trunk, state, keys.thinking, sharding.put(np.int32(end)))
        if end < config.trace_pad:
            if bool(jax.device_get(done)):
                break
            poll()
    return state.traces, Trunk(prompts=prompts, prompt_cache=trunk, trace_cache=state.cache, first_trace=first_trace)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(model, config, params, prompts, key, first_trace):
    """Prefill every prompt once; its G traces share the cache and start from its last hidden state."""
    rows, pad = prompts.tokens.shape
    slot = jnp.arange(pad)
    position = jnp.broadcast_to(slot, (rows, pad))
    causal = jnp.broadcast_to(slot[None, :] <= slot[:, None], (rows, pad, pad))
    cache = Cache.empty(model, rows, pad)
    hidden, cache = decoder.decode(model, params, prompts.tokens, position, cache, 0, causal)
    last = jnp.take_along_axis(hidden, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
    number = rows * config.group_size
    shape = (number, config.trace_pad)
    state = ThinkState(
        position=jnp.int32(0),
        hidden=jnp.repeat(last, config.group_size, axis=0),
        traces=sharding.constrain(
            Traces(
                tokens=jnp.zeros(shape, jnp.int32),
                logprob=jnp.zeros(shape, jnp.float32),
                length=jnp.zeros(number, jnp.int32),
                ended=jnp.zeros(number, bool),
                eos=jnp.zeros(number, bool),
            ),
            sharding.ROWS,
        ),
        cache=Cache.empty(model, number, config.trace_pad),
    )
    return state, cache, row_keys(key, prompts, config.group_size, first_trace)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(5,))
def _think(model, config, params, prompts, prompt_cache, state, keys, end):
    """Decode up to position `end`; returns the state and whether all traces have ended."""
    rows, pad = prompts.tokens.shape
    prompt_length = jnp.repeat(prompts.length, config.group_size)
    seen = jnp.broadcast_to((jnp.arange(pad) < prompts.length[:, None])[:, None], (rows, config.group_size, pad))
    context = (Context(cache=prompt_cache, visible=seen),)
    head = decoder.head(model, params).astype(model.dtype)

    def running(state):
        return (state.position < end) & ~jnp.all(state.traces.ended | state.traces.eos)

    def step(state):
        t, old = state.position, state.traces
        logits = jnp.matmul(state.hidden, head, preferred_element_type=jnp.float32)
        token, logprob = _sample_rows(logits, keys, t, config.sample)
        active = ~(old.ended | old.eos)
        token, logprob = jnp.where(active, token, 0), jnp.where(active, logprob, 0.0)
        traces = Traces(
            tokens=old.tokens.at[:, t].set(token),
            logprob=old.logprob.at[:, t].set(logprob),
            length=old.length + active,
            ended=old.ended | (active & (token == config.think_end)),
            eos=old.eos | (active & (token == config.eos)),
        )
        visible = jnp.broadcast_to(jnp.arange(config.trace_pad) <= t, (token.shape[0], 1, config.trace_pad))
        hidden, cache = decoder.decode(
            model, params, token[:, None], (prompt_length + t)[:, None], state.cache, t, visible, context
        )
        return ThinkState(position=t + 1, hidden=hidden[:, 0], traces=traces, cache=cache)

    state = jax.lax.while_loop(running, step, state)
    return state, jnp.all(state.traces.ended | state.traces.eos)


def _sample_rows(logits, keys, position, options):
    """One token a row: the uniform is drawn from the row's key folded with the position.

    On a mesh the logits are made in parts of the vocabulary, then every device gathers those of its rows: of the two,
    the head and the logits, they are smaller by far.
    """
    logits = sharding.constrain(sharding.constrain(logits, sharding.ROWS, "tensor"), sharding.ROWS)
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position)))(keys)
    draw = functools.partial(sampling.sample, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    return jax.vmap(draw)(logits, uniform)


cut = jax.jit(budgets.forks_at_budgets)  # between the two: lengths i32[N], schedule -> forks i32[N,S]


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample_answers(
    model: ModelConfig, config: RolloutConfig, params: Params, trunk: Trunk, traces: Traces, forks: Array, key: Array
) -> Answers:
    """Force an answer `config.answers` times at each fork, from the cached trace: no second prefill.

    Args:
      trunk, traces: of `sample_traces`. forks: i32[N,S], tokens of the trace before each cut.
      key: the one given to `sample_traces` (phases differ by tag).

    Returns:
      Answers [N,S,A,E] with E = forced pad + answer cap.
    """
    rows, size = forks.shape
    number = config.answers
    forced, length = _forced_tokens(config, traces, forks)
    begin = jnp.repeat(trunk.prompts.length, config.group_size)[:, None] + forks  # position of the first inserted token
    hidden, forced_cache = _feed_forced(model, config, params, trunk, traces, forks, forced, begin)
    last = jnp.take_along_axis(hidden, (config.refed + length - 1)[..., None, None], axis=2)[:, :, 0]  # [N,S,M]
    keys = row_keys(key, trunk.prompts, config.group_size, trunk.first_trace)
    keys = _answer_keys(keys.answering, size, number)

    branches = rows * size * number
    spread = lambda x: jnp.repeat(x.reshape(rows * size, *x.shape[2:]), number, axis=0)  # noqa: E731
    index = jnp.arange(forced_cache.capacity) - config.refed  # of the inserted token; the one fed again is in the trunk
    seen = (index >= 0) & (index < length.reshape(-1, 1, 1))
    context = (
        *_trunk_context(trunk, jnp.repeat(begin, number, axis=1)),
        Context(cache=forced_cache, visible=jnp.broadcast_to(seen, (rows * size, number, forced_cache.capacity))),
    )
    position = spread(begin + length)
    head = decoder.head(model, params).astype(model.dtype)

    def draw(hidden, e, done):
        token, logprob = _sample_rows(
            jnp.matmul(hidden, head, preferred_element_type=jnp.float32), keys, e, config.sample
        )
        return jnp.where(done, 0, token), jnp.where(done, 0.0, logprob)

    def step(e, carry):
        tokens, logprob, length, done, cache = carry
        visible = jnp.broadcast_to(jnp.arange(config.answer_cap) <= e - 1, (branches, 1, config.answer_cap))
        hidden, cache = decoder.decode(
            model, params, tokens[:, e - 1][:, None], (position + e - 1)[:, None], cache, e - 1, visible, context
        )
        token, token_logprob = draw(hidden[:, 0], e, done)
        tokens, logprob = tokens.at[:, e].set(token), logprob.at[:, e].set(token_logprob)
        return tokens, logprob, length + ~done, done | (token == config.eos), cache

    token, token_logprob = draw(spread(last), 0, jnp.zeros(branches, bool))
    empty = jnp.zeros((branches, config.answer_cap))
    carry = (
        empty.astype(jnp.int32).at[:, 0].set(token),
        empty.at[:, 0].set(token_logprob),
        jnp.ones(branches, jnp.int32),
        token == config.eos,
        Cache.empty(model, branches, config.answer_cap),
    )
    if config.answer_cap > 1:
        running = lambda loop: (loop[0] < config.answer_cap) & ~jnp.all(loop[1][3])  # noqa: E731
        _, carry = jax.lax.while_loop(running, lambda loop: (loop[0] + 1, step(*loop)), (jnp.int32(1), carry))
    tokens, logprob, sampled, done, _ = carry
    return _assemble(config, forced, length, tokens, logprob, sampled, done)


def _forced_tokens(config, traces, forks):
    """Inserted tokens i32[N,S,F] and their number i32[N,S]: a column that holds `</think>` needs no other."""
    pad = lambda ids: np.pad(np.asarray(ids, np.int32), (0, config.forced_pad - len(ids)))  # noqa: E731
    ended = traces.ended[:, None] & (forks == traces.length[:, None])
    tokens = jnp.where(ended[..., None], pad(config.elicit_ended), pad(config.elicit_cut))
    return tokens, jnp.where(ended, len(config.elicit_ended), len(config.elicit_cut)).astype(jnp.int32)


def _feed_forced(model, config, params, trunk, traces, forks, forced, begin):
    """Hidden states [N,S,F,M] of the inserted tokens, once for the A answers of a fork, and their cache (N*S rows).

    With `config.refed` the token before the fork comes first (F is one more).
    """
    if config.refed:
        before = jnp.take_along_axis(traces.tokens, jnp.maximum(forks - 1, 0), axis=1)
        last = jnp.take_along_axis(trunk.prompts.tokens, (trunk.prompts.length - 1)[:, None], axis=1)
        before = jnp.where(forks > 0, before, jnp.repeat(last, config.group_size, axis=0))
        forced, begin = jnp.concatenate([before[..., None], forced], axis=-1), begin - 1
    rows, size, pad = forced.shape
    slot = jnp.arange(pad)
    causal = jnp.broadcast_to(slot[None, :] <= slot[:, None], (rows * size, pad, pad))
    position = (begin[..., None] + slot).reshape(rows * size, pad)
    context = _trunk_context(trunk, jnp.repeat(begin, pad, axis=1))
    cache = Cache.empty(model, rows * size, pad)
    hidden, cache = decoder.decode(model, params, forced.reshape(rows * size, pad), position, cache, 0, causal, context)
    return hidden.reshape(rows, size, pad, -1), cache


def _trunk_context(trunk, end):
    """Prompt and trace as context of queries that see the trunk's positions before `end` i32[N,Q]."""
    problems = trunk.prompts.length.shape[0]
    length, of_prompt = trunk.prompts.length[:, None], end.reshape(problems, -1)
    in_prompt = jnp.arange(trunk.prompt_cache.capacity) < jnp.minimum(length, of_prompt)[..., None]
    in_trace = jnp.arange(trunk.trace_cache.capacity) < (of_prompt - length).reshape(*end.shape, 1)
    return (
        Context(cache=trunk.prompt_cache, visible=in_prompt),
        Context(cache=trunk.trace_cache, visible=in_trace),
    )


def _answer_keys(keys, size, number):
    """key[N] -> key[N*S*A], folded with column and answer."""
    fold = lambda key, column, answer: jax.random.fold_in(jax.random.fold_in(key, column), answer)  # noqa: E731
    fold = jax.vmap(jax.vmap(jax.vmap(fold, (None, None, 0)), (None, 0, None)), (0, None, None))
    return fold(keys, jnp.arange(size), jnp.arange(number)).reshape(-1)


def _assemble(config, forced, forced_length, tokens, logprob, sampled, done):
    """Inserted tokens followed at once by the sampled ones: [N,S,A,E]."""
    rows, size, pad = forced.shape
    lead = (rows, size, config.answers)
    slot = jnp.arange(pad + config.answer_cap)
    index = slot - forced_length[..., None, None]  # of the sampled token
    inside = jnp.clip(index, 0, config.answer_cap - 1)
    inside = jnp.broadcast_to(inside, (*lead, slot.size))
    is_sampled = (index >= 0) & (index < sampled.reshape(*lead, 1))
    gather = lambda x: jnp.take_along_axis(x.reshape(*lead, -1), inside, axis=-1)  # noqa: E731
    inserted = jnp.pad(forced, ((0, 0), (0, 0), (0, config.answer_cap)))[:, :, None]
    return Answers(
        tokens=jnp.where(index < 0, inserted, jnp.where(is_sampled, gather(tokens), 0)),
        logprob=jnp.where(is_sampled, gather(logprob), 0.0),
        length=forced_length[..., None] + sampled.reshape(lead),
        forced=forced_length,
        ended=done.reshape(lead),
    )
