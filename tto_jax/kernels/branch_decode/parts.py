"""What the op attends to: caches in parts, each read once for all queries that share its rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array, pytree


@pytree
class Interval:
    """Slots [begin, end) of a row, for each query that it serves. Empty ones are allowed."""

    begin: Array  # i32[R, M / R], or broadcastable to it
    end: Array  # i32[R, M / R], or broadcastable to it


@pytree
class CachePart:
    """Keys and values of R rows with capacity C; the layouts make both products contiguous.

    M queries are dealt to the rows in order: row r serves queries [r M/R, (r+1) M/R).
    With `layer` both arrays are stacks, [layers, R, ...], of which that one is read: an implementation with a kernel of
    its own then reads it where it lies.
    """

    k: Array  # [R, K, D, C]
    v: Array  # [R, K, C, D]
    visible: Array | Interval  # bool[R, M / R, C], or broadcastable to it; or the slots as an interval
    layer: Array | None = None  # i32[]

    @property
    def rows(self) -> int:
        """R."""
        return self.k.shape[-4]

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.k.shape[-3]

    @property
    def width(self) -> int:
        """D."""
        return self.k.shape[-2]

    @property
    def capacity(self) -> int:
        """C."""
        return self.k.shape[-1]


def of_layer(part: CachePart) -> CachePart:
    """The part without a stack."""
    if part.layer is None:
        return part
    at = lambda x: jax.lax.dynamic_index_in_dim(x, part.layer, keepdims=False)  # noqa: E731
    return CachePart(k=at(part.k), v=at(part.v), visible=part.visible)


def mask(part: CachePart) -> jax.Array:
    """Who sees what: bool[R, M/R, C], or broadcastable to it."""
    if not isinstance(part.visible, Interval):
        return part.visible
    slot, seen = jnp.arange(part.capacity), part.visible
    return (slot >= jnp.asarray(seen.begin)[..., None]) & (slot < jnp.asarray(seen.end)[..., None])


def check(q: Array, parts: Sequence[CachePart]) -> None:
    """Raises ValueError where queries and parts do not fit."""
    if q.ndim != 3 or not parts:
        raise ValueError(f"q {q.shape} and {len(parts)} parts: q is [M,H,D], and there is at least one part")
    for part in parts:
        stacked = part.layer is not None
        ranks = part.k.ndim == part.v.ndim == 4 + stacked
        if not ranks or part.v.shape != (*part.k.shape[:-2], part.capacity, part.width):
            raise ValueError(
                f"a part with k {part.k.shape}, v {part.v.shape} {'with' if stacked else 'without'} a layer: they must "
                f"be {'[layers,R,K,D,C] and [layers,R,K,C,D]' if stacked else '[R,K,D,C] and [R,K,C,D]'}"
            )
        if q.shape[0] % part.rows or q.shape[1] % part.kv_heads or q.shape[2] != part.width:
            raise ValueError(
                f"q {q.shape} and a part with k {part.k.shape}: rows must divide the queries, KV heads the "
                "heads, and head sizes agree"
            )
    if len({part.kv_heads for part in parts}) > 1:
        raise ValueError(f"parts with {[part.kv_heads for part in parts]} KV heads: they must have the same number")


def deal(x: Array, part: CachePart) -> jax.Array:
    """[M,K,g,X] -> [R, K, M/R*g, X]: the queries of a row as one matrix."""
    _, kv_heads, group, width = x.shape
    x = x.reshape(part.rows, -1, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    return x.reshape(part.rows, kv_heads, -1, width)


def undeal(x: Array, part: CachePart, group: int) -> jax.Array:
    """[R, K, M/R*g, X] -> [M,K,g,X]."""
    x = x.reshape(part.rows, part.kv_heads, -1, group, x.shape[-1]).transpose(0, 2, 1, 3, 4)
    return x.reshape(-1, part.kv_heads, group, x.shape[-1])
