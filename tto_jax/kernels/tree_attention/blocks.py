"""Which blocks of a row's attention hold a visible pair, from summaries of its int vectors.

A row is cut into granules of a few tokens. A granule is summed up by minima and maxima, granules are compared in pairs,
and a pair of blocks is needed where a pair of their granules is. Nothing of the size L x L is made; at 32 tokens a
granule a row of 9,728 tokens takes 304 x 304 comparisons. The rule holds for any int vectors, packed by
`core.token_tree` or not: every visible pair lies in a needed pair of blocks. (Not every needed pair has a visible one.)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array

GRANULE = 32  # most tokens a granule
_NONE = jnp.iinfo(jnp.int32).max  # beyond every position and branch: the minimum of nothing
FIELDS = ("tree", "position", "branch", "fork")
OUTSIDE = -2  # tree of tokens that only fill the last block up: no token of a row has it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vectors:
    """The four int vectors that decide visibility; all of a `TokenTree` that attention reads."""

    tree: Array  # i32[N, L]
    position: Array  # i32[N, L]
    branch: Array  # i32[N, L]
    fork: Array  # i32[N, L]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMap:
    """What to do with each (query block, key block) of a row."""

    needed: Array  # bool[N, Q, K]: some pair may be visible; False: none is
    full: Array  # bool[N, Q, K]: every pair is visible, no mask is needed; False: some may not be


def vectors(rows) -> Vectors:
    """The four int vectors of anything that has them, such as a `TokenTree`; i32[N,L] each."""
    return Vectors(*(jnp.asarray(getattr(rows, name), jnp.int32) for name in FIELDS))


def fill(rows, multiple: int) -> Vectors:
    """Vectors of rows made longer, to a multiple: each token that is added sees itself only and is seen by no other."""
    rows = vectors(rows)
    length = rows.tree.shape[1]
    extra = -length % multiple
    added = {"tree": OUTSIDE, "position": 0, "branch": 1 + jnp.arange(extra), "fork": 0}
    join = lambda name: jnp.concatenate(  # noqa: E731
        [x := getattr(rows, name), jnp.broadcast_to(added[name], (x.shape[0], extra)).astype(x.dtype)], axis=1
    )
    return rows if not extra else Vectors(*(join(name) for name in FIELDS))


def block_map(rows, query_block: int, key_block: int) -> BlockMap:
    """The map of rows of L tokens, which both block sizes divide.

    Args:
      rows: tree, position, branch, fork i32[N,L], such as a `TokenTree`.
      query_block, key_block: tokens a block; the map is bool[N, L / query_block, L / key_block].

    Raises:
      ValueError: a block size that does not divide L (`fill` makes rows longer).
    """
    rows = vectors(rows)
    length = rows.tree.shape[1]
    if query_block < 1 or key_block < 1 or length % query_block or length % key_block:
        raise ValueError(f"blocks of {query_block} queries and {key_block} keys: both must divide the length {length}")
    granule = math.gcd(query_block, key_block)
    granule = max(size for size in range(1, min(granule, GRANULE) + 1) if granule % size == 0)
    return jax.vmap(lambda row: _map_of_row(row, granule, query_block // granule, key_block // granule))(rows)


def _map_of_row(row, granule, query_granules, key_granules):
    row = jax.tree.map(lambda x: x.reshape(-1, granule), row)
    blocks = lambda x, how: how(  # noqa: E731
        x.reshape(x.shape[0] // query_granules, query_granules, x.shape[1] // key_granules, key_granules), axis=(1, 3)
    )
    return BlockMap(blocks(_some_visible(row), jnp.any), blocks(_all_visible(row), jnp.all))


def _some_visible(row):
    """bool[R,R]: False where no query of a granule sees a key of another. Vectors [R, granule]."""
    trunk, real = row.branch == 0, row.tree >= 0
    # A token sees the trunk up to its reach: the fork, or, on the trunk, itself.
    reach = jnp.where(trunk, row.position, jnp.minimum(row.position, row.fork - 1))
    found = False
    # Of tokens and of padding apart: a granule with both would else be seen from everywhere.
    for one_kind in (real, ~real):
        low = lambda x, where, kind=one_kind: jnp.where(kind & where, x, _NONE).min(1)  # noqa: E731
        high = lambda x, where, kind=one_kind: jnp.where(kind & where, x, -_NONE).max(1)  # noqa: E731
        same_tree = _overlap(low(row.tree, True), high(row.tree, True))
        sees_trunk = high(reach, True)[:, None] >= low(row.position, trunk)[None, :]
        same_branch = _overlap(low(row.branch, ~trunk), high(row.branch, ~trunk))
        earlier = high(row.position, ~trunk)[:, None] >= low(row.position, ~trunk)[None, :]
        found |= same_tree & (sees_trunk | (same_branch & earlier))
    return found


def _overlap(low, high):
    """bool[R,R]: ranges [low, high] have something in common."""
    return (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])


def _all_visible(row):
    """bool[R,R]: every query sees every key: one tree, and all keys on the trunk before all reaches."""
    trunk = row.branch == 0
    reach = jnp.where(trunk, row.position, jnp.minimum(row.position, row.fork - 1))
    low, high = row.tree.min(1), row.tree.max(1)
    one_tree = (low[:, None] == high[None, :]) & (low[None, :] == high[:, None])
    return one_tree & trunk.all(1)[None, :] & (row.position.max(1)[None, :] <= reach.min(1)[:, None])


def computed_pairs(needed: Array, query_block: int, key_block: int) -> jax.Array:
    """How many (query, key) pairs the needed blocks of each row have: bool[N,Q,K] -> i32[N]."""
    return needed.sum((-1, -2), dtype=jnp.int32) * (query_block * key_block)
