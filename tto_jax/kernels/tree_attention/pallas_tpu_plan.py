"""What the TPU kernels read of rows: their int vectors, and the steps of their grid as lists of pairs of blocks."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array, TokenTree
from tto_jax.kernels.tree_attention import blocks

LANES = 128  # of a vector register: block sizes are multiples of it
NEVER = jnp.iinfo(jnp.int32).max
# Rows of `Plan.vectors`. A query sees a key of its tree that is of its branch and not later, or that is on the trunk
# and not beyond the query's reach.
TREE, POSITION, BRANCH, TRUNK_POSITION, REACH = range(5)
SUBLANES = 8  # the vectors are filled up to these, so that a block of them is whole registers
# Bits of a step: is it the first, the last of its block; does it need the mask; is it one too many. Then the blocks.
FIRST, LAST, MASKED, IDLE = (1 << bit for bit in range(4))
QUERY_SHIFT, KEY_SHIFT, BLOCK_BITS = 4, 17, 13
STEPS_LIMIT = 2**18  # bytes of scalar memory for the list of steps: a quarter of what v5e has


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows [N,L] for the kernels; P is L, filled up to whole blocks, T the number of all pairs of blocks."""

    vectors: Array  # i32[N, 8, P]
    by_query: Array  # i32[N, T], the steps of each query block behind each other
    by_key: Array  # i32[N, T], the steps of each key block behind each other
    steps: Array  # i32[N], how many of the T there are
    query_block: int = dataclasses.field(metadata={"static": True})
    key_block: int = dataclasses.field(metadata={"static": True})


def plan(rows: TokenTree, query_block: int = 0, key_block: int = 0) -> Plan:
    """The plan of rows.

    Args:
      rows: tree, position, branch, fork i32[N,L].
      query_block, key_block: tokens a block; 0: by `block_sizes`. Mosaic takes multiples of 128, the interpreter any.

    Raises:
      ValueError: rows whose list of steps is too long for the scalar memory.
    """
    chosen = block_sizes(rows.tree.shape[1])
    query_block, key_block = query_block or chosen[0], key_block or chosen[1]
    rows = blocks.fill(rows, math.lcm(query_block, key_block))
    number, length = rows.tree.shape
    _check_steps(number, length, query_block, key_block)
    found = blocks.block_map(rows, query_block, key_block)
    by_query, steps = jax.vmap(_steps)(found.needed, found.full)
    by_key, _ = jax.vmap(lambda needed, full: _steps(needed.T, full.T, by_key=True))(found.needed, found.full)
    return Plan(_vectors(rows), by_query, by_key, steps, query_block, key_block)


def block_sizes(length: int) -> tuple[int, int]:
    """(query block, key block) of rows of `length` tokens.

    An eighth of the row, so that the blocks follow its visible pairs, and at most 256 queries and 512 keys. For 6 query
    heads of 128 in a group, as of the 1.5B model, such a step is 0.4 GFLOP of products on 0.6 MB: longer than what a
    step of the grid costs (a third of a microsecond), its scores in 0.5 MB of VMEM. Twice the queries computes 6% more
    pairs of an 8k tree.
    """
    most = max(LANES, length // 8)
    key_block = max(size for size in (LANES, 2 * LANES, 4 * LANES) if size <= most)
    return min(key_block, 2 * LANES), key_block


def _check_steps(number, length, query_block, key_block):
    queries, keys = length // query_block, length // key_block
    size = 4 * number * queries * keys
    if max(queries, keys) >> BLOCK_BITS or size > STEPS_LIMIT:
        raise ValueError(
            f"{number} rows of {length} tokens in blocks of {query_block} queries and {key_block} keys: the list of "
            f"blocks takes {size:,} bytes, the scalar memory has {STEPS_LIMIT:,} for it: give fewer rows at a time, or "
            "larger blocks"
        )


def _vectors(rows):
    """i32[N,8,P]."""
    trunk_position = jnp.where(rows.branch == 0, rows.position, NEVER)
    reach = jnp.minimum(rows.position, rows.fork - 1)
    found = jnp.stack([rows.tree, rows.position, rows.branch, trunk_position, reach], axis=1)
    return jnp.pad(found, ((0, 0), (0, SUBLANES - found.shape[1]), (0, 0)))


def _steps(needed, full, by_key=False):
    """The needed pairs of a map [A,B] in order of its rows: i32[A*B], and their number.

    What lies behind them repeats the last as idle, so that nothing new is loaded for it.
    """
    count = needed.sum(dtype=jnp.int32)
    order = jnp.argsort(~needed.ravel(), stable=True)
    at = jnp.arange(order.size)
    order = order[jnp.minimum(at, count - 1)]
    block, other = order // needed.shape[1], order % needed.shape[1]
    differs = block[1:] != block[:-1]
    first = jnp.concatenate([jnp.array([True]), differs])
    last = jnp.concatenate([differs, jnp.array([True])]) | (at == count - 1)
    flags = FIRST * first + LAST * last + MASKED * ~full.ravel()[order]
    flags = jnp.where(at < count, flags, IDLE)
    query, key = (other, block) if by_key else (block, other)
    return (flags | (query << QUERY_SHIFT) | (key << KEY_SHIFT)).astype(jnp.int32), count


def query_of(step: Array) -> Array:
    """The query block of a step."""
    return (step >> QUERY_SHIFT) & (2**BLOCK_BITS - 1)


def key_of(step: Array) -> Array:
    """The key block of a step."""
    return step >> KEY_SHIFT
