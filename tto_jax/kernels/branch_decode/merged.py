"""Each part by itself, then the parts' results merged: out = sum_i e^(m_i - m) a_i / sum_i e^(m_i - m) s_i.

Of part i, m_i is the largest score, s_i = sum e^(score - m_i) and a_i = sum e^(score - m_i) v. No scores are moved
between parts, and none is wider than its part. The queries that share a row are one matrix. Both products have rows and
heads as two batch dimensions and take the cache as it is: a reshape between a cache's update and its product made XLA's
CPU compiler copy the cache, 7 times slower.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array
from tto_jax.kernels.branch_decode.parts import CachePart, deal, mask, undeal, untiled

FEW = 8  # rows of a query matrix, queries of a row times heads of a group: up to here they are few
LOWEST = -1e30  # the largest score of a query that sees nothing of a part: finite, so that no inf - inf appears


def branch_decode(q: Array, parts: Sequence[CachePart]) -> jax.Array:
    """As the reference; weights are rounded to q's dtype before their sum is divided out, results in float32."""
    kv_heads = parts[0].kv_heads
    grouped = q.reshape(q.shape[0], kv_heads, -1, q.shape[2])
    return merge([attend(grouped, part) for part in parts]).reshape(q.shape).astype(q.dtype)


def attend(q: Array, part: CachePart) -> list[jax.Array]:
    """q [M,K,g,D] -> of this part (a f32[M,K,g,D], m f32[M,K,g,1], s f32[M,K,g,1])."""
    group = q.shape[2]
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    scores = _scores(deal(q, part), part) * q.shape[3] ** -0.5
    by_query = scores.reshape(part.rows, part.kv_heads, -1, group, part.capacity)
    scores = jnp.where(mask(part)[:, None, :, None], by_query, -jnp.inf).reshape(scores.shape)
    largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = product(weights.astype(q.dtype), part.v)
    return [undeal(x, part, group) for x in (mixed, largest, total)]


def _scores(q, part):
    """q [R,K,m,D] -> f32[R,K,m,C]."""
    if part.k.ndim == 4 or q.shape[2] > FEW:
        return jnp.matmul(q, untiled(part.k), preferred_element_type=jnp.float32)
    q, k = (x.astype(jnp.float32) for x in (q[:, :, :, None, :, None], part.k[:, :, None]))
    return jnp.sum(q * k, axis=4).reshape(*q.shape[:3], part.capacity)


def merge(results: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """Attention over all parts of each part's (a [..., D], m [..., 1], s [..., 1])."""
    largest = functools.reduce(jnp.maximum, (m for _, m, _ in results))
    shares = [jnp.exp(m - largest) for _, m, _ in results]
    mixed = sum(share * a for share, (a, _, _) in zip(shares, results))
    return mixed / sum(share * s for share, (_, _, s) in zip(shares, results))
