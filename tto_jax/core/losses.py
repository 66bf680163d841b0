"""Per-token objectives from per-token log-probs, and their explicit aggregates. All shapes agree, usually f32[N, L].

A sequence, where one is meant as a whole, is a thinking block or an answer: `sequence` i32[N, L] numbers those of each
row from 0, `count` is their largest number (static). Only tokens in `mask` belong to it.
"""

import chex
import jax
import jax.numpy as jnp

from tto_jax.core.types import Array

KL_KINDS = ("k1", "k2", "k3")
OBJECTIVES = ("ppo", "gspo", "cispo")
AGGREGATES = ("constant", "token_mean", "sequence_mean")
IMPORTANCE = ("none", "token", "sequence")


def clipped_objective(
    logprob: Array,
    old_logprob: Array,
    advantage: Array,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
) -> jax.Array:
    """PPO's min(ratio A, clip(ratio, 1 - low, 1 + high) A), to be maximised; ratio = exp(logprob - old_logprob).

    Low and high differ in DAPO's clip-higher. With `dual_clip` c > 1 (arXiv 1912.09729, eq. 5) a negative advantage
    counts c A at most, however large the ratio; 0: off. Raises ValueError for clips that are none.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: choose 0 <= low <= 1 and high >= 0, such as 0.2")
    if dual_clip and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}: a bound on the ratio is above 1, such as 3.0, or 0 for none")
    chex.assert_equal_shape([logprob, old_logprob, advantage])
    ratio = jnp.exp(logprob - old_logprob)
    objective = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage)
    if dual_clip:
        objective = jnp.where(advantage < 0, jnp.maximum(objective, dual_clip * advantage), objective)
    return objective


def cispo_objective(
    logprob: Array, old_logprob: Array, advantage: Array, clip_low: float = 1.0, clip_high: float = 0.2
) -> jax.Array:
    """CISPO (arXiv 2506.13585, eq. 4): stop_gradient(clip(ratio, 1 - low, 1 + high)) A logprob, to be maximised.

    The ratio is clipped, the token is not: every trained token keeps a gradient. Low = 1: no lower bound.
    """
    chex.assert_equal_shape([logprob, old_logprob, advantage])
    ratio = jnp.clip(jnp.exp(logprob - old_logprob), 1.0 - clip_low, 1.0 + clip_high)
    return jax.lax.stop_gradient(ratio) * advantage * logprob


def over_sequence(values: Array, mask: Array, sequence: Array, count: int, mean: bool = True) -> jax.Array:
    """Mean (or sum) of `values` over the masked tokens of each token's sequence, at every masked token; 0 elsewhere."""
    chex.assert_rank([values, mask, sequence], 2)
    chex.assert_equal_shape([values, mask, sequence])

    def one(values, mask, sequence):
        add = lambda x: jax.ops.segment_sum(x, sequence, num_segments=count)  # noqa: E731
        total = add(jnp.where(mask, values, 0.0))
        if mean:
            total = total / jnp.maximum(add(mask.astype(jnp.float32)), 1.0)
        return jnp.where(mask, total[sequence], 0.0)

    return jax.vmap(one)(values, mask, sequence)


def sequence_logprob(logprob: Array, old_logprob: Array, mask: Array, sequence: Array, count: int) -> jax.Array:
    """What stands for `logprob` where the ratio is that of a sequence (GSPO, arXiv 2507.18071, eq. 7).

    old + mean over the sequence of (logprob - old): the ratio of all its tokens is the geometric mean of their ratios.
    """
    return old_logprob + over_sequence(logprob - old_logprob, mask, sequence, count)


def importance_weights(
    old_logprob: Array, sampler_logprob: Array, mask: Array, sequence: Array, count: int, kind: str, cap: float
) -> jax.Array:
    """Truncated importance sampling for a sampler that is not quite the trainer: min(ratio, cap), a constant.

    ratio = exp(old - sampler) of the token, or the product over its sequence; 1 for `none`. Raises ValueError for an
    unknown kind and a cap that is not positive.
    """
    if kind not in IMPORTANCE:
        raise ValueError(f"importance={kind!r} is unknown: choose one of {IMPORTANCE}")
    if not cap > 0:
        raise ValueError(f"importance_cap={cap}: the largest weight of a token is positive, such as 2.0")
    if kind == "none":
        return jnp.ones_like(old_logprob)
    gap = jnp.where(mask, old_logprob - sampler_logprob, 0.0)
    if kind == "sequence":
        gap = over_sequence(gap, mask, sequence, count, mean=False)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(gap), cap))


def token_weights(mask: Array, sequence: Array, count: int, kind: str, constant: float) -> jax.Array:
    """What each token of a minibatch counts in the loss, f32[N,L], 0 outside the mask.

    `constant`: 1 / constant (Dr.GRPO). `token_mean`: 1 / the number of trained tokens (DAPO). `sequence_mean`: each
    sequence alike, its tokens alike (GRPO, GSPO). Raises ValueError for an unknown kind.
    """
    if kind == "constant":
        return jnp.where(mask, 1.0 / constant, 0.0)
    if kind == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    if kind == "sequence_mean":
        length = over_sequence(mask.astype(jnp.float32), mask, sequence, count, mean=False)
        share = jnp.where(mask, 1.0 / jnp.maximum(length, 1.0), 0.0)
        return share / jnp.maximum(share.sum(), 1.0)  # the shares of a sequence sum to 1
    raise ValueError(f"aggregate={kind!r} is unknown: choose one of {AGGREGATES}")


def clip_active(logprob: Array, old_logprob: Array, advantage: Array, clip_low: float, clip_high: float) -> jax.Array:
    """bool: tokens whose gradient the clip removes."""
    ratio = jnp.exp(logprob - old_logprob)
    return jnp.where(advantage > 0, ratio > 1.0 + clip_high, (ratio < 1.0 - clip_low) & (advantage < 0))


def kl_estimate(logprob: Array, ref_logprob: Array, kind: str = "k3") -> jax.Array:
    """Estimate of KL(policy | reference) from the policy's tokens (Schulman's k1, k2, k3); ValueError if unknown.

    k1 = log p - log q, unbiased; k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1, unbiased and non-negative.
    """
    chex.assert_equal_shape([logprob, ref_logprob])
    difference = logprob - ref_logprob
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference**2
    if kind == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"KL estimator {kind!r} is unknown: choose one of {KL_KINDS}")


def aggregate(per_token: Array, mask: Array, constant: Array | float) -> jax.Array:
    """Sum over the masked tokens / an explicit constant. per_token f32, mask bool of one shape -> f32[].

    The constant does not depend on the data, so that the step of a token depends on nothing but its own advantage.
    """
    chex.assert_equal_shape([per_token, mask])
    return jnp.sum(jnp.where(mask, per_token, 0.0)) / constant


def released_constant(rows: int, padded_length: int) -> int:
    """The divisor of the released AnytimeReasoner: rows of the minibatch x padded response length, padding included."""
    return rows * padded_length
