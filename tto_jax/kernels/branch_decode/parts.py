"""What the op attends to: caches in parts, each read once for all queries that share its rows."""

import math
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
    """

    k: Array  # [R, K, D, C], or in tiles of T slots: [R, K, C / T, D, T]
    v: Array  # [R, K, C, D]
    visible: Array | Interval  # bool[R, M / R, C], or broadcastable to it; or the slots as an interval

    @property
    def rows(self) -> int:
        """R."""
        return self.v.shape[0]

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.v.shape[1]

    @property
    def width(self) -> int:
        """D."""
        return self.v.shape[3]

    @property
    def capacity(self) -> int:
        """C."""
        return self.v.shape[2]


def untiled(k: Array) -> Array:
    """Keys as [R,K,D,C], of tiles, too."""
    return k if k.ndim == 4 else k.swapaxes(2, 3).reshape(*k.shape[:2], k.shape[3], -1)


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
        if part.v.ndim != 4 or part.k.ndim not in (4, 5) or not _fit(part):
            raise ValueError(
                f"a part with k {part.k.shape}, v {part.v.shape}: k must be [R,K,D,C], or [R,K,C/T,D,T] in tiles, and "
                "v [R,K,C,D]"
            )
        if q.shape[0] % part.rows or q.shape[1] % part.kv_heads or q.shape[2] != part.width:
            raise ValueError(
                f"q {q.shape} and a part with k {part.k.shape}: rows must divide the queries, KV heads the "
                "heads, and head sizes agree"
            )
    if len({part.kv_heads for part in parts}) > 1:
        raise ValueError(f"parts with {[part.kv_heads for part in parts]} KV heads: they must have the same number")


def _fit(part):
    """Whether keys are those of the values' rows, heads and slots."""
    *lead, capacity, width = part.v.shape
    tiles = () if part.k.ndim == 4 else (part.k.shape[2],)
    whole = part.k.shape[-1] * math.prod(tiles)
    return part.k.shape == (*lead, *tiles, width, part.k.shape[-1]) and whole == capacity


def deal(x: Array, part: CachePart) -> jax.Array:
    """[M,K,g,X] -> [R, K, M/R*g, X]: the queries of a row as one matrix."""
    _, kv_heads, group, width = x.shape
    x = x.reshape(part.rows, -1, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    return x.reshape(part.rows, kv_heads, -1, width)


def undeal(x: Array, part: CachePart, group: int) -> jax.Array:
    """[R, K, M/R*g, X] -> [M,K,g,X]."""
    x = x.reshape(part.rows, part.kv_heads, -1, group, x.shape[-1]).transpose(0, 2, 1, 3, 4)
    return x.reshape(-1, part.kv_heads, group, x.shape[-1])
