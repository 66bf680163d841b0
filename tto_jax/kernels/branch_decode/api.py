"""The only door to the op."""

from collections.abc import Sequence

import jax

from tto_jax.core.types import Array
from tto_jax.kernels.branch_decode import blocked, merged, pallas_tpu, reference
from tto_jax.kernels.branch_decode.parts import CachePart, check, untiled

IMPLEMENTATIONS = {
    "blocked": blocked.branch_decode,
    "merged": merged.branch_decode,
    "pallas_tpu": pallas_tpu.branch_decode,
    "reference": reference.branch_decode,
}
TILES = {"blocked": blocked.tile}
PLATFORMS = {"cpu": "blocked", "tpu": "merged", "gpu": "merged", "cuda": "merged", "rocm": "merged"}


def choose(platform: str) -> str:
    """The implementation for a platform, as devices name it. Raises ValueError for an unknown one."""
    if platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r} is unknown: choose one of {tuple(PLATFORMS)}")
    return PLATFORMS[platform]


def tile(implementation: str, queries: int, capacity: int) -> int:
    """T, if the implementation reads keys fastest in tiles of T slots, else 0.

    queries: how many share a row, times the heads of a group. capacity: slots of a row.
    """
    return TILES[implementation](queries, capacity) if implementation in TILES else 0


def lay_out(implementation: str, k: Array, queries: int) -> Array:
    """Keys of a part, [R,K,D,C] or in tiles, as the implementation reads them fastest; see `tile`."""
    size = tile(implementation, queries, k.shape[-1] if k.ndim == 4 else k.shape[2] * k.shape[4])
    if not size or k.ndim == 5:
        return k if size else untiled(k)
    return k.reshape(*k.shape[:3], -1, size).swapaxes(2, 3)


def branch_decode(q: Array, parts: Sequence[CachePart], implementation: str = "merged") -> jax.Array:
    """Attention of M new tokens over the union of cache parts.

    Args:
      q: [M,H,D], ordered so that every part's rows serve consecutive queries.
      parts: such as the prompt (a row a problem), the trace (a row a trace), the own branch (a row a branch).
      implementation: `merged` (each part by itself, in XLA), `blocked` (the same, long shared parts in blocks as far
        as they are filled), `pallas_tpu` (a Mosaic kernel as far as rows are filled; every `visible` is an `Interval`)
        or `reference` (one softmax over concatenated scores).

    Returns:
      [M,H,D] in q's dtype. A query that sees no key of any part has no attention: NaN.

    Raises:
      ValueError: unknown implementation, parts that do not fit the queries or each other, or that it does not take.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {tuple(IMPLEMENTATIONS)}")
    check(q, parts)
    return IMPLEMENTATIONS[implementation](q, parts)
