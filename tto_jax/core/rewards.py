"""Scores that are reshaped before credit: length penalties, the baselines that budgets are compared with."""

import chex
import jax
import jax.numpy as jnp

from tto_jax.core.types import Array


def length_penalty(correct: Array, length: Array, budget: Array | int, coefficient: float) -> jax.Array:
    """correct * (1 - coefficient |z| / b_S): a right answer is worth less after a long trace, a wrong one stays 0.

    correct f32[B,G,S,A]; length i32[B,G], tokens of the trace; budget: b_S in tokens -> f32[B,G,S,A].
    Raises ValueError for a coefficient outside [0, 1], where a right answer could be worth less than a wrong one.
    """
    if not 0 <= coefficient <= 1:
        raise ValueError(
            f"length_penalty={coefficient}: the coefficient lies in [0, 1]; choose 0.2 as in the literature"
        )
    chex.assert_rank([correct, length], [4, 2])
    return correct * (1.0 - coefficient * jnp.asarray(length, jnp.float32) / budget)[:, :, None, None]


def relative_length_penalty(correct: Array, length: Array, alpha: float) -> jax.Array:
    """Arora and Zanette (arXiv 2502.04463): correct * (1 - alpha sigmoid((|z| - mean) / std)), a wrong answer stays 0.

    Mean and (population) deviation are those of the lengths of the group's correct traces: those with a right answer in
    the last column. One length only: the sigmoid is 1/2.
    correct f32[B,G,S,A]; length i32[B,G], tokens of the trace -> f32[B,G,S,A]. Raises ValueError unless 0 <= alpha < 1.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"relative_length_penalty={alpha}: the coefficient lies in [0, 1); choose 0.2 as in the paper")
    chex.assert_rank([correct, length], [4, 2])
    right, length = jnp.any(correct[:, :, -1] > 0, axis=-1), jnp.asarray(length, jnp.float32)
    number = jnp.maximum(right.sum(axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(right, length, 0.0), axis=1, keepdims=True) / number
    variance = jnp.sum(jnp.where(right, (length - mean) ** 2, 0.0), axis=1, keepdims=True) / number
    scaled = jnp.where(variance > 0, (length - mean) / jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return correct * (1.0 - alpha * jax.nn.sigmoid(scaled))[:, :, None, None]


def overlong_penalty(correct: Array, length: Array, cap: int, margin: int) -> jax.Array:
    """DAPO (arXiv 2503.14476, eq. 13): correct + 0 up to cap - margin tokens, from there linearly down to -1 at `cap`.

    correct f32[B,G,S,A]; length i32[B,G], tokens of the trace; cap, margin: tokens -> f32[B,G,S,A].
    Raises ValueError unless 0 < margin <= cap.
    """
    if not 0 < margin <= cap:
        raise ValueError(f"overlong_margin={margin}: it lies in [1, {cap}], the tokens of the longest trace")
    chex.assert_rank([correct, length], [4, 2])
    over = (jnp.asarray(length, jnp.float32) - (cap - margin)) / margin
    return correct - jnp.clip(over, 0.0, 1.0)[:, :, None, None]


def serial_decay(correct: Array) -> jax.Array:
    """S-GRPO (arXiv 2505.07686): the n-th right answer along a trace's forks earns 2^(1-n), a wrong one stays 0.

    Answers with the same number at different forks are one series; forks at one place count as one each.
    correct: 0 or 1, f32[B,G,S,A] -> f32[B,G,S,A].
    """
    chex.assert_rank(correct, 4)
    correct = jnp.asarray(correct, jnp.float32)
    return correct * jnp.exp2(1.0 - jnp.cumsum(correct, axis=2))
