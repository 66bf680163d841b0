"""Progress and cumulative regret of one trace (arXiv 2503.07572); vmap over traces."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core.types import Array


def block_progress(values: Array, start: Array) -> jax.Array:
    """progress[s] = J[s] - J[s-1] with J[-1] = start; its sum telescopes to J[S-1] - start. f32[S], f32[] -> f32[S]."""
    chex.assert_rank([values, start], [1, 0])
    previous = jnp.concatenate([jnp.asarray(start, values.dtype)[None], values[:-1]])
    return values - previous


def discounted_progress(progress: Array, weight: Array, gamma: float) -> jax.Array:
    """A[s] = sum_{k>=s} gamma^(k-s) c[k] progress[k]. progress, weight f32[S] -> f32[S].

    gamma = 0, c = 1 is MRT's progress; gamma = 1, c = tail is BRPO's return minus tail[s] J[s-1]; gamma = 1, c = 1 is
    potential-based shaping, J[last] - J[s-1].
    """
    chex.assert_rank([progress, weight], 1)
    chex.assert_equal_shape([progress, weight])
    size = progress.shape[0]
    distance = np.arange(size)[None, :] - np.arange(size)[:, None]
    kernel = np.where(distance >= 0, float(gamma) ** np.maximum(distance, 0), 0.0).astype(np.float32)
    return jnp.einsum("sk,k->s", kernel, weight * progress, precision=jax.lax.Precision.HIGHEST)


def cumulative_regret(values: Array, optimal: Array) -> jax.Array:
    """Delta[k] = sum_{j<=k} (J* - J[j]), in episodes. values f32[S], optimal f32[] or f32[S] -> f32[S]."""
    chex.assert_rank(values, 1)
    return jnp.cumsum(optimal - values)


def normalized_regret(accuracy: Array, tokens: Array, limit: Array) -> jax.Array:
    """1 - (area under the accuracy-token curve up to `limit` tokens) / limit, f32[].

    The curve starts at (0, 0), is linear between points, cut at `limit` by interpolation, and flat beyond its last
    point.
    accuracy f32[K]; tokens f32[K], increasing, positive; limit f32[] tokens.
    """
    chex.assert_rank([accuracy, tokens], 1)
    chex.assert_equal_shape([accuracy, tokens])
    x = jnp.concatenate([jnp.zeros(1), jnp.asarray(tokens, jnp.float32)])
    y = jnp.concatenate([jnp.zeros(1), jnp.asarray(accuracy, jnp.float32)])
    at_limit = jnp.interp(limit, x, y)
    inside = x < limit
    x = jnp.append(jnp.where(inside, x, limit), limit)
    y = jnp.append(jnp.where(inside, y, at_limit), at_limit)
    return 1.0 - jnp.trapezoid(y, x) / limit
