"""Rows of unlike lengths, computed at a few static lengths: compacted, the longest first, some rows at a time.

Each part of a mesh sorts its own rows. The length at a position is that of the longest row which any part has there, so
that all parts compute the same; beside that maximum nothing crosses parts. A sorted row may be computed at any bucket's
length that it fits, so which rows share a micro-batch changes rounding only.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tto_jax import sharding
from tto_jax.core import token_tree
from tto_jax.core.types import Array, TokenTree, pytree

_PER_ROW = P(sharding.ROWS)


@pytree
class Sorted:
    """A minibatch of compact rows (`token_tree.compact`), those of each part sorted by length, the longest first."""

    rows: TokenTree  # [N, L]
    weight: Array | None  # f32[N, L], what each token counts in the loss
    length: Array  # i32[N / parts], computed tokens of the longest row at each position, over the parts
    row: Array  # i32[N], where a row was within its part
    token: Array  # i32[N, L], where a token was within its row


def lengths(longest: int, number: int) -> tuple[int, ...]:
    """Lengths of the buckets, the longest first: `number` even shares of `longest` tokens, rounded up to blocks.

    A block is a power of 2, an eighth of the longest row at most (but at least 8) and never above 512, as attention
    cuts rows on all platforms. Lengths that are the same count once.
    """
    block = 2 ** min(max((longest // 8).bit_length() - 1, 3), 9)
    shares = (-(-longest * share // number) for share in range(1, number + 1))
    return tuple(sorted({min(longest, -(-share // block) * block) for share in shares}, reverse=True))


def micro_rows(rows: int, length: int, tokens: int) -> int:
    """Of `rows` rows how many are computed at a time: as many as hold `tokens` (at least one; all where it is 0).

    Fewer where as many micro-batches do: 16 rows, at most 5 at a time, are computed as 4 times 4.
    """
    most = max(tokens // length, 1) if tokens else rows
    return -(-rows // -(-rows // most))


def sort(rows: TokenTree, weight: Array | None, num_states: int) -> Sorted:
    """Compact and sort rows [N,L], of which the first `num_states` tokens are computed; weight f32[N,L] goes along."""

    def local(arrays, axis):
        rows, weight = arrays
        rows, token = token_tree.compact(rows, num_states)
        length = jnp.sum(rows.tree[:, :num_states] >= 0, axis=1, dtype=jnp.int32)
        row = jnp.argsort(-length, stable=True)
        weight = weight if weight is None else jnp.take_along_axis(weight, token, axis=1)
        rows, weight, length, token = jax.tree.map(lambda x: x[row], (rows, weight, length, token))
        length = length if axis is None else jax.lax.pmax(length, sharding.ROWS)
        return Sorted(rows, weight, length, row.astype(jnp.int32), token)

    layout = Sorted(_PER_ROW, _PER_ROW, P(), _PER_ROW, _PER_ROW)
    return sharding.split(local, (rows, weight), (_PER_ROW, _PER_ROW), layout)


def take(batch: Sorted, position: Array, number: int) -> tuple[TokenTree, Array | None]:
    """Rows and weights of each part from a position (i32[]) on, `number` of them; behind the last one empty rows."""

    def local(arrays, _axis):
        (rows, weight), position = arrays
        index, last = position + jnp.arange(number), rows.tokens.shape[0] - 1
        rows, weight = jax.tree.map(lambda x: x[jnp.minimum(index, last)], (rows, weight))
        return token_tree.empty_rows(rows, index > last), weight

    return sharding.split(local, ((batch.rows, batch.weight), position), (_PER_ROW, P()), _PER_ROW)


def store(values: Array, part: Array, position: Array) -> jax.Array:
    """`values` [N,L] with the rows of `part`, as they were taken from a position on; empty ones are dropped."""

    def local(arrays, _axis):
        values, part, position = arrays
        return values.at[position + jnp.arange(part.shape[0])].set(part, mode="drop")

    return sharding.split(local, (values, part, position), (_PER_ROW, _PER_ROW, P()), _PER_ROW)


def restore(batch: Sorted, values: Array) -> jax.Array:
    """Values [N,L] of sorted rows, where the rows and their tokens were."""

    def local(arrays, _axis):
        values, row, token = arrays
        return jnp.zeros_like(values).at[row[:, None], token].set(values, unique_indices=True)

    return sharding.split(local, (values, batch.row, batch.token), (_PER_ROW,) * 3, _PER_ROW)
