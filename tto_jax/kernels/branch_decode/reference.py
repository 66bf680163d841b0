"""The specification: one softmax over the concatenated parts; each part is read once for all queries that share it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array, pytree


@pytree
class CachePart:
    """Keys and values of R rows with capacity C; the layouts make both products contiguous.

    M queries are dealt to the rows in order: row r serves queries [r M/R, (r+1) M/R).
    """

    k: Array  # [R, K, D, C]
    v: Array  # [R, K, C, D]
    visible: Array  # bool[R, M / R, C], or broadcastable to it


def branch_decode(q: Array, parts: Sequence[CachePart]) -> jax.Array:
    """q [M,H,D] -> [M,H,D]; softmax in float32. A query must see at least one key."""
    number, heads, width = q.shape
    kv_heads = parts[0].k.shape[1]
    grouped = q.reshape(number, kv_heads, heads // kv_heads, width)
    logits = jnp.concatenate([_scores(grouped, part) for part in parts], axis=-1) * width**-0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    out, begin = 0.0, 0
    for part in parts:
        capacity = part.k.shape[-1]
        out = out + _mix(weights[..., begin : begin + capacity], part)
        begin += capacity
    return out.reshape(number, heads, width)


def _scores(q, part):
    """q [M,K,g,D] -> masked scores f32[M,K,g,C]."""
    capacity = part.k.shape[-1]
    scores = _undeal(_batched(_deal(q, part), part.k, jnp.float32), q.shape[1:3], part)
    return jnp.where(part.visible[:, :, None, None, :], scores, -jnp.inf).reshape(*q.shape[:-1], capacity)


def _mix(weights, part):
    """weights [M,K,g,C] -> [M,K,g,D]."""
    mixed = _undeal(_batched(_deal(weights, part), part.v, weights.dtype), weights.shape[1:3], part)
    return mixed.reshape(*weights.shape[:-1], part.v.shape[-1])


def _deal(x, part):
    """[M,K,g,X] -> [R*K, M/R*g, X]: one batch dimension, as not every backend multiplies bf16 under two."""
    rows, (_, kv_heads, group, width) = part.k.shape[0], x.shape
    x = x.reshape(rows, -1, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    return x.reshape(rows * kv_heads, -1, width)


def _undeal(x, heads, part):
    """[R*K, M/R*g, X] -> [R, M/R, K, g, X]."""
    (kv_heads, group), rows = heads, part.k.shape[0]
    return x.reshape(rows, kv_heads, -1, group, x.shape[-1]).transpose(0, 2, 1, 3, 4)


def _batched(x, cache, dtype):
    """x [R*K, m, X], cache [R,K,X,Y] -> [R*K, m, Y]."""
    return jnp.matmul(x, cache.reshape(-1, *cache.shape[2:]), preferred_element_type=dtype)
