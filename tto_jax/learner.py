"""The update: log-probs of packed rows, the clipped objective, one optimizer step. Pure; jitted with donated state."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from tto_jax import sharding
from tto_jax.core import losses
from tto_jax.core.types import Array, TokenTree, pytree
from tto_jax.kernels.token_logprobs import token_logprobs
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params

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


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Static options of the objective."""

    num_targets: int  # most trained tokens in a row
    num_states: int  # leading tokens of a row that are computed; the rest are targets only
    constant: float  # divisor of the summed objective, where `aggregate` is `constant`
    temperature: float = 1.0  # the sampler's: log-probs are of the distribution that was sampled from
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0  # weight of the KL to the reference
    kl_estimator: str = "k3"
    objective: str = "ppo"  # of losses.OBJECTIVES
    dual_clip: float = 0.0  # a negative advantage counts so many times at most; 0: off
    aggregate: str = "constant"  # of losses.AGGREGATES
    importance: str = "none"  # of losses.IMPORTANCE, against the sampler's log-probs
    importance_cap: float = 2.0
    num_sequences: int = 0  # thinking blocks and answers of a row; only where one is meant as a whole
    attention: str = "reference"
    logprobs: str = "chunked"
    micro_rows: int = 0  # rows whose gradient is computed at a time, 0: the whole minibatch

    def __post_init__(self):
        for name, choices in (
            ("kl_estimator", losses.KL_KINDS),
            ("objective", losses.OBJECTIVES),
            ("aggregate", losses.AGGREGATES),
            ("importance", losses.IMPORTANCE),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {choices}")
        whole = self.objective == "gspo" or "sequence" in self.aggregate + self.importance
        if whole and self.num_sequences < 1:
            raise ValueError(
                f"num_sequences={self.num_sequences}: objective={self.objective!r}, aggregate={self.aggregate!r}, "
                f"importance={self.importance!r} need the number of sequences in a row"
            )
        if self.dual_clip and not (self.dual_clip > 1 and self.objective != "cispo"):
            raise ValueError(
                f"dual_clip={self.dual_clip} with {self.objective!r}: a bound above 1 on the ratio, such as 3.0, or 0; "
                "cispo has none, as it bounds the ratio by itself"
            )
        if not self.importance_cap > 0:
            raise ValueError(f"importance_cap={self.importance_cap}: the largest weight is positive, such as 2.0")
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(
                f"clip_low={self.clip_low}, clip_high={self.clip_high}: choose 0 <= low <= 1 and high >= 0"
            )
        if not self.kl >= 0:
            raise ValueError(f"kl={self.kl}: the weight of the KL is 0 or positive")
        if not self.constant > 0:
            raise ValueError(f"constant={self.constant}: the loss is divided by a positive constant")


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


def init_state(
    params: Params, optimizer: OptimizerConfig, mesh: jax.sharding.Mesh | None = None, kv_heads: int = 1
) -> TrainState:
    """Step 0 with fresh moments, born where the parameters lie. The parameters are taken over (donated later)."""

    def rest(params):
        return TrainState(step=jnp.int32(0), params=None, opt_state=make_optimizer(optimizer).init(params))

    if mesh is not None:
        rest = jax.jit(rest, out_shardings=sharding.shardings(mesh, jax.eval_shape(rest, params), kv_heads))
    return dataclasses.replace(rest(params), params=params)


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig) -> TrainState:
    """Shapes and dtypes of the state, for a restore."""
    return jax.eval_shape(lambda: init_state(decoder.init_params(model, 0), optimizer))


def target_logprobs(
    model: ModelConfig, config: LossConfig, params: Params, rows: TokenTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-prob and entropy of the trained tokens only, gathered: index i32[N,T], logprob f32[N,T], entropy f32[N,T].

    T = num_targets; only trained positions are projected on the vocabulary. Slots beyond a row's trained tokens hold
    other tokens of the row: their loss_mask is False.
    """
    states = jax.tree.map(lambda x: x[:, : config.num_states], rows)
    hidden = decoder.forward_rows(model, params, states, config.attention)
    index = jnp.argsort(~rows.loss_mask, axis=-1, stable=True)[:, : config.num_targets]
    source = jnp.take_along_axis(rows.source, index, axis=-1)
    target = jnp.take_along_axis(rows.tokens, index, axis=-1)
    hidden = jnp.take_along_axis(hidden, source[..., None], axis=1)
    # The head stays float32: its gradient is a sum over chunks. Columns that are added so that it can be split count as
    # tokens of probability 0.
    head = sharding.pad(decoder.head(model, params), "fsdp", "tensor")

    def local(arrays, vocabulary_axis):
        hidden, target, head = arrays
        flat = hidden.reshape(-1, hidden.shape[-1]), head, target.reshape(-1)
        logprobs = token_logprobs(*flat, config.temperature, config.logprobs, vocabulary_axis, model.vocab_size)
        return tuple(x.reshape(target.shape) for x in logprobs)

    per_row = P(sharding.ROWS)
    specs = (per_row, per_row, P(None, "tensor"))
    logprob, entropy = sharding.split(local, (hidden, target, head), specs, (per_row, per_row))
    return index, logprob, entropy


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_logprobs(
    model: ModelConfig, config: LossConfig, params: Params, rows: TokenTree
) -> tuple[jax.Array, jax.Array]:
    """The trainer's log-prob and entropy of every trained token, f32[N,L]; 0 elsewhere."""

    def score(part):
        index, logprob, entropy = target_logprobs(model, config, params, part)
        row = jnp.arange(index.shape[0])[:, None]
        scatter = lambda x: jnp.where(part.loss_mask, jnp.zeros(part.tokens.shape).at[row, index].set(x), 0.0)  # noqa: E731
        return scatter(logprob), scatter(entropy)

    scored = jax.lax.map(score, _micro_batches(config, rows))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows.tokens.shape), scored)


def loss(
    model: ModelConfig, config: LossConfig, params: Params, rows: TokenTree, weight: Array | None = None
) -> tuple[jax.Array, dict]:
    """Minus the objective (plus KL), summed with what each token counts; and sums for the metrics.

    weight: f32[N,L] of `losses.token_weights` of the whole minibatch; None: these rows are all of it.
    """
    if weight is None:
        weight = _token_weights(config, rows)
    index, logprob, _ = target_logprobs(model, config, params, rows)
    take = lambda x: jnp.take_along_axis(x, index, axis=-1)  # noqa: E731
    mask, advantage, old, weight = take(rows.loss_mask), take(rows.advantage), take(rows.old_logprob), take(weight)
    # Slots without a trained token are other tokens: give them ratio 1, so that nothing overflows in the gradient.
    logprob = jnp.where(mask, logprob, old)
    stands = logprob
    if config.objective == "gspo":
        stands = losses.sequence_logprob(logprob, old, mask, take(rows.sequence), config.num_sequences)
    clips = config.clip_low, config.clip_high
    if config.objective == "cispo":
        objective = losses.cispo_objective(logprob, old, advantage, *clips)
    else:
        objective = losses.clipped_objective(stands, old, advantage, *clips, config.dual_clip)
    count = lambda x: jnp.sum(jnp.where(mask, x * weight, 0.0))  # noqa: E731
    total = -count(objective)
    kl_ref = jnp.zeros_like(logprob)
    if config.kl:
        kl_ref = losses.kl_estimate(logprob, jnp.where(mask, take(rows.ref_logprob), logprob), config.kl_estimator)
        total += config.kl * count(kl_ref)
    ratio = jnp.exp(stands - old)
    pull = jnp.where(mask, jnp.abs(advantage), 0.0)
    add = lambda x: jnp.sum(jnp.where(mask, x, 0.0))  # noqa: E731
    return total, {
        "total": total,
        "tokens": mask.sum(),
        "kl_ref": add(kl_ref),
        "kl_old": add(losses.kl_estimate(logprob, old, "k3")),
        "clipped": add(losses.clip_active(stands, old, advantage, *clips)),
        "ratio_min": jnp.min(jnp.where(mask, ratio, 1.0)),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 1.0)),
        "weight": pull.sum(),
        "weight_answers": jnp.sum(jnp.where(take(rows.branch) > 0, pull, 0.0)),
    }


def _token_weights(config, rows):
    return losses.token_weights(rows.loss_mask, rows.sequence, config.num_sequences, config.aggregate, config.constant)


def _trusted(config, rows):
    """Rows whose advantages count as much as the sampler can be trusted to have sampled what the trainer would."""
    trust = losses.importance_weights(
        rows.old_logprob,
        rows.sampler_logprob,
        rows.loss_mask,
        rows.sequence,
        config.num_sequences,
        config.importance,
        config.importance_cap,
    )
    return dataclasses.replace(rows, advantage=rows.advantage * trust)


def _combine(sums: dict) -> dict:
    """Metrics of a minibatch from those of its micro-batches."""
    tokens = jnp.maximum(sums["tokens"].sum(), 1)
    weight, answers = sums["weight"].sum(), sums["weight_answers"].sum()
    share = lambda part: jnp.where(weight > 0, part / jnp.maximum(weight, 1e-30), jnp.nan)  # noqa: E731
    return {
        "loss/total": sums["total"].sum(),
        "loss/kl_ref": sums["kl_ref"].sum() / tokens,
        "loss/kl_old": sums["kl_old"].sum() / tokens,
        "loss/clip_fraction": sums["clipped"].sum() / tokens,
        "loss/ratio_min": sums["ratio_min"].min(),
        "loss/ratio_max": sums["ratio_max"].max(),
        "loss/share_thinking": share(weight - answers),
        "loss/share_answers": share(answers),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3,))
def train_step(
    model: ModelConfig, config: LossConfig, optimizer: OptimizerConfig, state: TrainState, rows: TokenTree
) -> tuple[TrainState, dict]:
    """One optimizer step on one minibatch of packed rows; the state is donated."""
    parts = _trusted(config, rows), _token_weights(config, rows)
    grads, metrics = _accumulate(
        lambda params, part: loss(model, config, params, *part), model, config, state.params, parts
    )
    state, applied = _apply(optimizer, state, grads, model.num_kv_heads)
    return state, _combine(metrics) | applied


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3,))
def supervised_step(
    model: ModelConfig, config: LossConfig, optimizer: OptimizerConfig, state: TrainState, rows: TokenTree
) -> tuple[TrainState, dict]:
    """One optimizer step of maximum likelihood on the trained tokens: minus the mean log-prob. The state is donated."""
    tokens = jnp.maximum(rows.loss_mask.sum(), 1)

    def negative_loglik(params, part):
        index, logprob, _ = target_logprobs(model, config, params, part)
        value = -losses.aggregate(logprob, jnp.take_along_axis(part.loss_mask, index, axis=-1), tokens)
        return value, {"loss/total": value}

    grads, metrics = _accumulate(negative_loglik, model, config, state.params, rows)
    state, applied = _apply(optimizer, state, grads, model.num_kv_heads)
    return state, {"loss/total": metrics["loss/total"].sum(), **applied}


def _micro_batches(config, rows):
    """A tree of [N, L] -> [N / micro_rows, micro_rows, L]; strided, so that each has rows of every device."""
    total = jax.tree.leaves(rows)[0].shape[0]
    micro = config.micro_rows or total
    if total % micro:
        raise ValueError(f"micro_rows={micro} does not divide the {total} rows: choose a divisor, or 0 for all at once")
    split = jax.tree.map(lambda x: x.reshape(micro, total // micro, *x.shape[1:]).swapaxes(0, 1), rows)
    return sharding.constrain(split, None, sharding.ROWS)


def _accumulate(function, model, config, params, rows):
    """Sum of the gradients of micro-batches (their sums share one constant) and their metrics, stacked.

    Beside memory, this is for speed: on a CPU the activations of a few rows stay in its cache.
    """

    def body(grads, part):
        (_, metrics), grad = jax.value_and_grad(function, has_aux=True)(params, part)
        return split(jax.tree.map(jnp.add, grads, grad)), metrics

    split = functools.partial(sharding.constrain_params, kv_heads=model.num_kv_heads)
    return jax.lax.scan(body, split(jax.tree.map(jnp.zeros_like, params)), _micro_batches(config, rows))


def _apply(optimizer, state, grads, kv_heads):
    updates, opt_state = make_optimizer(optimizer).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"update/grad_norm": optax.tree.norm(grads), "update/skipped": opt_state.total_notfinite}
    state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    return sharding.constrain_params(state, kv_heads), metrics


@functools.partial(jax.jit, static_argnums=(1,))
def minibatch(rows: TokenTree, number: int, index: Array) -> TokenTree:
    """Minibatch `index` of `number` equal, consecutive ones."""
    size = rows.tokens.shape[0] // number
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), rows)
    return sharding.constrain(part, sharding.ROWS)
