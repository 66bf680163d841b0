"""What an update minimises: options, log-probs of trained tokens, the loss of packed rows. Pure."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tto_jax import buckets, sharding
from tto_jax.core import losses
from tto_jax.core.types import Array, TokenTree
from tto_jax.kernels.token_logprobs import token_logprobs
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params


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
    buckets: int = 1  # row lengths at which rows are computed, see `buckets.lengths`
    micro_tokens: int = 0  # tokens of each part of the mesh whose gradient is computed at a time; 0: all rows

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
        if self.buckets < 1 or self.micro_tokens < 0:
            raise ValueError(
                f"buckets={self.buckets}, micro_tokens={self.micro_tokens}: choose at least one bucket, and tokens of "
                "some rows, or 0 for all rows at a time"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the buckets, the longest first."""
        return buckets.lengths(self.num_states, self.buckets)

    def micro_rows(self, rows: int, bucket: int = 0) -> int:
        """How many of a part's `rows` rows are computed at a time in a bucket."""
        return buckets.micro_rows(rows, self.lengths[bucket], self.micro_tokens)

    def in_bucket(self, bucket: int, row_length: int) -> "LossConfig":
        """These options for compact rows of a bucket, stored with `row_length` tokens."""
        length = self.lengths[bucket]
        most = length + row_length - self.num_states  # targets without a state are beside them
        return dataclasses.replace(self, num_states=length, buckets=1, num_targets=min(self.num_targets, most))


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


def loss(
    model: ModelConfig, config: LossConfig, params: Params, rows: TokenTree, weight: Array | None = None
) -> tuple[jax.Array, dict]:
    """Minus the objective (plus KL), summed with what each token counts; and sums for the metrics.

    weight: f32[N,L] of `losses.token_weights` of the whole minibatch; None: these rows are all of it.
    """
    if weight is None:
        weight = token_weights(config, rows)
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


def negative_loglik(
    model: ModelConfig, config: LossConfig, params: Params, rows: TokenTree, weight: Array
) -> tuple[jax.Array, dict]:
    """Minus the log-likelihood of the trained tokens, each times its weight f32[N,L]; and sums for the metrics."""
    index, logprob, _ = target_logprobs(model, config, params, rows)
    mask, weight = (jnp.take_along_axis(x, index, axis=-1) for x in (rows.loss_mask, weight))
    total = -jnp.sum(jnp.where(mask, logprob * weight, 0.0))
    return total, {"total": total}


RATIOS = {"ratio_min": jnp.minimum, "ratio_max": jnp.maximum}  # of a minibatch; the others are sums
SUMS = {  # of what is minimised, beside its gradient
    loss: ("total", "tokens", "kl_ref", "kl_old", "clipped", *RATIOS, "weight", "weight_answers"),
    negative_loglik: ("total",),
}


def token_weights(config: LossConfig, rows: TokenTree) -> jax.Array:
    """What each trained token counts in the loss of a minibatch, f32[N,L]."""
    return losses.token_weights(rows.loss_mask, rows.sequence, config.num_sequences, config.aggregate, config.constant)


def trusted(config: LossConfig, rows: TokenTree) -> TokenTree:
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
