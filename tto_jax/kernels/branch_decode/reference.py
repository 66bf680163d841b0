"""The specification: one softmax over the concatenated parts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array
from tto_jax.kernels.branch_decode.parts import CachePart, deal, mask, undeal, untiled


def branch_decode(q: Array, parts: Sequence[CachePart]) -> jax.Array:
    """q [M,H,D] -> [M,H,D]; softmax in float32. A query must see at least one key."""
    number, heads, width = q.shape
    kv_heads = parts[0].kv_heads
    grouped = q.reshape(number, kv_heads, heads // kv_heads, width)
    logits = jnp.concatenate([_scores(grouped, part) for part in parts], axis=-1) * width**-0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    out, begin = 0.0, 0
    for part in parts:
        out = out + _mix(weights[..., begin : begin + part.capacity], part)
        begin += part.capacity
    return out.reshape(number, heads, width)


def _scores(q, part):
    """q [M,K,g,D] -> masked scores f32[M,K,g,C]."""
    scores = undeal(jnp.matmul(deal(q, part), untiled(part.k), preferred_element_type=jnp.float32), part, q.shape[2])
    by_row = scores.reshape(part.rows, -1, *scores.shape[1:])
    return jnp.where(mask(part)[:, :, None, None, :], by_row, -jnp.inf).reshape(scores.shape)


def _mix(weights, part):
    """weights [M,K,g,C] -> [M,K,g,D]."""
    mixed = jnp.matmul(deal(weights, part), part.v, preferred_element_type=weights.dtype)
    return undeal(mixed, part, weights.shape[2])
