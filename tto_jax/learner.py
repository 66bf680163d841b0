"""The update: scores of packed rows, gradients of an objective, one optimizer step. Pure; jitted with donated state.

The gradient of a minibatch is summed over micro-batches, bucket by bucket (`buckets`), by one program a bucket, whose
loop ends by the rows' lengths on the device. Every step calls every program, so the first one compiles all there is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tto_jax import buckets, objectives, sharding
from tto_jax.buckets import Sorted
from tto_jax.core.types import Array, TokenTree, pytree
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params
from tto_jax.objectives import RATIOS, SUMS, LossConfig, loss, negative_loglik, target_logprobs

OPTIMIZER_SCHEDULES = ("constant", "cosine")


@pytree
class TrainState:
    """All that an update changes. Parameters and moments are float32."""

    step: Array  # i32[], optimizer steps taken or skipped
    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW after a global-norm clip; linear warm-up, then constant or cosine to zero."""

    learning_rate: float
    schedule: str = "constant"
    warmup_steps: int = 0  # optimizer steps
    decay_steps: int = 0  # optimizer steps of the whole cosine
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    grad_clip: float = 1.0

    def __post_init__(self):
        if self.schedule not in OPTIMIZER_SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is unknown: choose one of {OPTIMIZER_SCHEDULES}")
        if not (0 < self.learning_rate < math.inf and self.grad_clip > 0):
            raise ValueError(
                f"learning_rate={self.learning_rate}, grad_clip={self.grad_clip}: both must be positive, "
                "the rate finite, such as 1e-6 and 1.0"
            )
        if not (self.warmup_steps >= 0 and self.weight_decay >= 0 and 0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(
                f"warmup_steps={self.warmup_steps}, weight_decay={self.weight_decay}, b1={self.b1}, b2={self.b2}: "
                "the first two are at least 0, the others lie in [0, 1)"
            )
        if self.schedule == "cosine" and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps}: a cosine must last longer than warmup_steps={self.warmup_steps}"
            )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer; steps with a gradient that is not finite are skipped and counted (`apply_if_finite`)."""
    rate = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, rate, config.warmup_steps, config.decay_steps)
    elif config.warmup_steps:
        rate = optax.warmup_constant_schedule(rate / config.warmup_steps, rate, config.warmup_steps)
    update = optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )
    return optax.apply_if_finite(update, max_consecutive_errors=2**31 - 1)


@pytree
class LaggingState(TrainState):
    """A state that remembers the parameters of some steps ago, for rollouts of an earlier policy."""

    stale: Params


def init_state(
    params: Params, optimizer: OptimizerConfig, mesh: jax.sharding.Mesh | None = None, kv_heads: int = 1
) -> TrainState:
    """Step 0 with fresh moments, born where the parameters lie. The parameters are taken over (donated later)."""

    def rest(params):
        return TrainState(step=jnp.int32(0), params=None, opt_state=make_optimizer(optimizer).init(params))

    if mesh is not None:
        rest = jax.jit(rest, out_shardings=sharding.shardings(mesh, jax.eval_shape(rest, params), kv_heads))
    return dataclasses.replace(rest(params), params=params)


def lagging(state: TrainState) -> LaggingState:
    """The state with a copy of its parameters as those of some steps ago."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(TrainState)}
    return LaggingState(**fields, stale=jax.tree.map(jnp.copy, state.params))


def catch_up(state: LaggingState, due: Array) -> LaggingState:
    """The state with its present parameters as the stale ones, if due (bool[]). The stale ones are donated."""
    return dataclasses.replace(state, stale=_chosen(state.stale, state.params, due))


@functools.partial(jax.jit, donate_argnums=0)
def _chosen(stale, params, due):
    return jax.tree.map(lambda old, new: jnp.where(due, new, old), stale, params)


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig, lags: bool = False) -> TrainState:
    """Shapes and dtypes of the state, of a `LaggingState` if it lags, for a restore."""

    def make():
        state = init_state(decoder.init_params(model, 0), optimizer)
        return lagging(state) if lags else state

    return jax.eval_shape(make)


def score_logprobs(
    model: ModelConfig, config: LossConfig, params: Params, rows: TokenTree
) -> tuple[jax.Array, jax.Array]:
    """The trainer's log-prob and entropy of every trained token, f32[N,L]; 0 elsewhere."""
    batch, found = begin_scores(config, rows)
    for bucket in range(len(config.lengths)):
        found = score_bucket(model, config, bucket, params, batch, found)
    return end_scores(batch, found)


@pytree
class Scores:
    """Log-probs of sorted rows while they are computed."""

    position: Array  # i32[], rows of each part that are done
    logprob: Array  # f32[N, L]
    entropy: Array  # f32[N, L]


@functools.partial(jax.jit, static_argnums=0)
def begin_scores(config: LossConfig, rows: TokenTree) -> tuple[Sorted, Scores]:
    """Sorted rows, and no scores."""
    nothing = sharding.constrain(jnp.zeros(rows.tokens.shape), sharding.ROWS)
    return buckets.sort(rows, None, config.num_states), Scores(jnp.int32(0), nothing, nothing)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def score_bucket(
    model: ModelConfig, config: LossConfig, bucket: int, params: Params, batch: Sorted, found: Scores
) -> Scores:
    """The scores with those of a bucket's rows."""

    def step(found, cut, number):
        part, _ = buckets.take(batch, found.position, number)
        index, logprob, entropy = target_logprobs(model, cut, params, part)
        row = jnp.arange(index.shape[0])[:, None]
        scatter = lambda x: jnp.where(part.loss_mask, jnp.zeros(part.tokens.shape).at[row, index].set(x), 0.0)  # noqa: E731
        put = lambda old, x: buckets.store(old, scatter(x), found.position)  # noqa: E731
        return Scores(found.position + number, put(found.logprob, logprob), put(found.entropy, entropy))

    return _over_bucket(step, config, bucket, batch, found)


@jax.jit
def end_scores(batch: Sorted, found: Scores) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies where the rows and tokens were."""
    return buckets.restore(batch, found.logprob), buckets.restore(batch, found.entropy)


def _over_bucket(step, config, bucket, batch, carry):
    """`step(carry, options, rows of a part)` for the micro-batches of a bucket: until the rest fits the next one.

    A micro-batch may reach into rows of shorter buckets.
    """
    rows, shorter = batch.length.shape[0], (*config.lengths, -1)[bucket + 1]
    cut, number = config.in_bucket(bucket, batch.rows.tokens.shape[1]), config.micro_rows(rows, bucket)

    def more(carry):
        return (carry.position < rows) & (batch.length[jnp.minimum(carry.position, rows - 1)] > shorter)

    return jax.lax.while_loop(more, lambda carry: step(carry, cut, number), carry)


@pytree
class Partial:
    """The gradient of a minibatch while it is summed over micro-batches."""

    position: Array  # i32[], rows of each part that are done
    grads: Params  # float32
    sums: dict  # f32[] each: those of SUMS, and tokens that were computed, with padding and without


def train_step(
    model: ModelConfig, config: LossConfig, optimizer: OptimizerConfig, state: TrainState, rows: TokenTree
) -> tuple[TrainState, dict]:
    """One optimizer step on one minibatch of packed rows; the state is donated."""
    return _step(loss, model, config, optimizer, state, rows)


def supervised_step(
    model: ModelConfig, config: LossConfig, optimizer: OptimizerConfig, state: TrainState, rows: TokenTree
) -> tuple[TrainState, dict]:
    """One optimizer step of maximum likelihood on the trained tokens: minus the mean log-prob. The state is donated."""
    config = dataclasses.replace(config, aggregate="token_mean")
    return _step(negative_loglik, model, config, optimizer, state, rows)


def _step(objective, model, config, optimizer, state, rows):
    batch, partial = begin(objective, model, config, state.params, rows)
    for bucket in range(len(config.lengths)):
        partial = accumulate(objective, model, config, bucket, state.params, batch, partial)
    return apply(model, optimizer, state, partial)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin(
    objective: Callable, model: ModelConfig, config: LossConfig, params: Params, rows: TokenTree
) -> tuple[Sorted, Partial]:
    """Sorted rows with what each token counts in the whole minibatch, and a gradient of zeros."""
    batch = buckets.sort(objectives.trusted(config, rows), objectives.token_weights(config, rows), config.num_states)
    sums = {name: jnp.float32(name in RATIOS) for name in (*SUMS[objective], "computed", "present")}
    zeros = sharding.constrain_params(jax.tree.map(jnp.zeros_like, params), model.num_kv_heads)
    return batch, Partial(jnp.int32(0), zeros, sums)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6)
def accumulate(
    objective: Callable,
    model: ModelConfig,
    config: LossConfig,
    bucket: int,
    params: Params,
    batch: Sorted,
    partial: Partial,
) -> Partial:
    """The gradient with that of a bucket's rows; `objective` is `loss` or `negative_loglik`, `partial` is donated.

    Beside memory, micro-batches are for speed: on a CPU the activations of a few rows stay in its cache.
    """

    def step(partial, cut, number):
        part, weight = buckets.take(batch, partial.position, number)
        function = lambda params: objective(model, cut, params, part, weight)  # noqa: E731
        (_, sums), grads = jax.value_and_grad(function, has_aux=True)(params)
        states = part.tree[:, : cut.num_states]
        sums |= {"computed": states.size, "present": jnp.sum(states >= 0)}
        sums = {name: RATIOS.get(name, jnp.add)(old, sums[name]) for name, old in partial.sums.items()}
        grads = sharding.constrain_params(jax.tree.map(jnp.add, partial.grads, grads), model.num_kv_heads)
        return Partial(partial.position + number, grads, sums)

    return _over_bucket(step, config, bucket, batch, partial)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def apply(
    model: ModelConfig, optimizer: OptimizerConfig, state: TrainState, partial: Partial
) -> tuple[TrainState, dict]:
    """The state after an optimizer step with the whole gradient, and the minibatch's metrics. The state is donated."""
    updates, opt_state = make_optimizer(optimizer).update(partial.grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"update/grad_norm": optax.tree.norm(partial.grads), "update/skipped": opt_state.total_notfinite}
    state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return sharding.constrain_params(state, model.num_kv_heads), _metrics(partial.sums) | metrics


def _metrics(sums: dict) -> dict:
    """Of a minibatch, from the sums over it."""
    found = {"loss/total": sums["total"], "update/padding_share": 1 - sums["present"] / sums["computed"]}
    if "weight" not in sums:
        return found
    tokens, weight = jnp.maximum(sums["tokens"], 1), sums["weight"]
    share = lambda part: jnp.where(weight > 0, part / jnp.maximum(weight, 1e-30), jnp.nan)  # noqa: E731
    return found | {
        "loss/kl_ref": sums["kl_ref"] / tokens,
        "loss/kl_old": sums["kl_old"] / tokens,
        "loss/clip_fraction": sums["clipped"] / tokens,
        "loss/ratio_min": sums["ratio_min"],
        "loss/ratio_max": sums["ratio_max"],
        "loss/share_thinking": share(weight - sums["weight_answers"]),
        "loss/share_answers": share(sums["weight_answers"]),
    }


@functools.partial(jax.jit, static_argnums=(1,))
def minibatch(rows: TokenTree, number: int, index: Array) -> TokenTree:
    """Minibatch `index` of `number` equal, consecutive ones."""
    size = rows.tokens.shape[0] // number
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), rows)
    return sharding.constrain(part, sharding.ROWS)
