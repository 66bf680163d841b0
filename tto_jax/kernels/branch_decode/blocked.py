"""As `merged`, but a long part that many queries share goes block by block, from the first to the last slot seen.

For CPUs: the work follows how full the rows are, not their capacity (a row half full takes half the time; a full one
the same as in `merged`). A block is copied out of the cache before its product. For few queries the reading is what
takes the time, and the copy would double it: then, and where `visible` is a mask, the part is one block.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array
from tto_jax.kernels.branch_decode import merged
from tto_jax.kernels.branch_decode.merged import FEW, LOWEST
from tto_jax.kernels.branch_decode.parts import CachePart, Interval, deal, undeal, untiled

BLOCK = 1024  # slots
TILE = 32  # slots of a tile of keys
TILED = 128  # slots from which on tiles are worth it


def branch_decode(q: Array, parts: Sequence[CachePart]) -> jax.Array:
    """As the reference; results in float32 until the end."""
    kv_heads = parts[0].kv_heads
    grouped = q.reshape(q.shape[0], kv_heads, -1, q.shape[2])

    def attend(part):
        few = q.shape[0] // part.rows * grouped.shape[2] <= FEW
        whole = few or part.capacity <= BLOCK or not isinstance(part.visible, Interval)
        return (merged.attend if whole else _attend)(grouped, part)

    return merged.merge([attend(part) for part in parts]).reshape(q.shape).astype(q.dtype)


def tile(queries: int, capacity: int) -> int:
    """T, slots of a tile of keys, for so many queries of a row, times the heads of a group. 0: none.

    A tile's scores stay in registers while its keys are read once, in order: at least twice as fast as the products of
    a few rows with a long matrix. One row alone XLA takes for a product again (and the sum of two such
    was wrong in jaxlib 0.10.2).
    """
    return TILE if 1 < queries <= FEW and capacity >= TILED and capacity % TILE == 0 else 0


def _attend(q, part):
    """q [M,K,g,D] -> of this part (a f32[M,K,g,D], m f32[M,K,g,1], s f32[M,K,g,1]); FlashAttention-2, algorithm 1."""
    group, queries = q.shape[2], q.shape[0] // part.rows
    begin, end = (
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), (part.rows, queries))
        for x in (part.visible.begin, part.visible.end)
    )
    sees = end > begin
    first = jnp.maximum(jnp.min(jnp.where(sees, begin, part.capacity)), 0) // BLOCK
    last = -(-jnp.minimum(jnp.max(jnp.where(sees, end, 0)), part.capacity) // BLOCK)
    begin, end = (jnp.repeat(x, group, axis=1)[:, None, :, None] for x in (begin, end))
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    dealt, k = deal(q, part), untiled(part.k)

    def block(index, carry):
        mixed, largest, total = carry
        at = jnp.minimum(index * BLOCK, part.capacity - BLOCK)  # the last block may begin in the one before
        slot = at + jnp.arange(BLOCK)
        scores = product(dealt, jax.lax.dynamic_slice_in_dim(k, at, BLOCK, axis=3)) * q.shape[3] ** -0.5
        seen = (slot >= jnp.maximum(begin, index * BLOCK)) & (slot < end)
        scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new), jnp.exp(largest - new)
        values = jax.lax.dynamic_slice_in_dim(part.v, at, BLOCK, axis=2)
        mixed = shrink * mixed + product(weights.astype(q.dtype), values)
        return mixed, new, shrink * total + jnp.sum(weights, axis=-1, keepdims=True)

    zero = jnp.zeros_like(dealt, jnp.float32)
    carry = jax.lax.fori_loop(first, last, block, (zero, zero[..., :1] + LOWEST, zero[..., :1]))
    return [undeal(x, part, group) for x in carry]
