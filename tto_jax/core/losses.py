"""Per-token objectives from per-token log-probs, and their explicit aggregates. All shapes agree, usually f32[N, L]."""

import chex
import jax
import jax.numpy as jnp

from tto_jax.core.types import Array

KL_KINDS = ("k1", "k2", "k3")


def clipped_objective(
    logprob: Array, old_logprob: Array, advantage: Array, clip_low: float = 0.2, clip_high: float = 0.2
) -> jax.Array:
    """PPO's min(ratio A, clip(ratio, 1 - low, 1 + high) A), to be maximised; ratio = exp(logprob - old_logprob).

    Low and high differ in DAPO's clip-higher. Raises ValueError for a negative clip, or low above 1.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: choose 0 <= low <= 1 and high >= 0, such as 0.2")
    chex.assert_equal_shape([logprob, old_logprob, advantage])
    ratio = jnp.exp(logprob - old_logprob)
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage)


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
