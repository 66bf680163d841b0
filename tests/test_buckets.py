"""Lengths of buckets, rows at a time, and sorted rows on one device and on parts of a mesh, against loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax import buckets, sharding
from tto_jax.core import token_tree

N, L = 8, 12


@pytest.mark.parametrize(
    ("longest", "number", "expected"),
    [
        (11_040, 3, (11_040, 7680, 4096)),
        (11_040, 1, (11_040,)),
        (512, 4, (512, 384, 256, 128)),
        (58, 3, (58, 40, 24)),
        (20, 4, (20, 16, 8)),  # three shares of 5: 5 and 10 tokens are blocks of 8 and 16, 15 tokens are 16, too
        (5, 3, (5,)),
    ],
)
def test_lengths(longest, number, expected):
    assert buckets.lengths(longest, number) == expected


@pytest.mark.parametrize(
    ("rows", "length", "tokens", "expected"),
    [(16, 384, 1536, 4), (16, 100, 500, 4), (7, 10, 35, 3), (7, 10, 9, 1), (7, 10, 0, 7), (7, 10, 10**6, 7)],
)
def test_micro_rows(rows, length, tokens, expected):
    assert buckets.micro_rows(rows, length, tokens) == expected


def random_rows():
    """Rows with gaps, the last two columns targets only; every array tells where it was."""
    rng = np.random.default_rng(0)
    tree = np.where(rng.random((N, L)) < np.linspace(0, 1, N)[rng.permutation(N), None], 0, -1)
    index = np.arange(N * L, dtype=np.float32).reshape(N, L)
    rows = token_tree.sequences(index.astype(np.int32), np.full(N, L), tree == 0)
    return dataclasses.replace(rows, tree=jnp.asarray(tree, jnp.int32), advantage=jnp.asarray(index))


@pytest.mark.parametrize("mesh", [None, (2, 2, 1), (4, 1, 2)], ids=str)
def test_rows_are_sorted_in_each_part_and_go_back(mesh):
    rows, states = random_rows(), L - 2
    mesh = mesh and sharding.make_mesh(mesh, jax.devices()[: int(np.prod(mesh))])
    parts = sharding.row_shards(mesh) if mesh else 1
    each = N // parts
    with sharding.use(mesh):
        placed = sharding.put_rows(jax.device_get(rows))
        batch = jax.jit(buckets.sort, static_argnums=2)(placed, placed.advantage + 1, states)
        back = jax.jit(buckets.restore)(batch, batch.weight)
        first, weight = jax.jit(buckets.take, static_argnums=2)(batch, jnp.int32(1), each)
        stored = jax.jit(buckets.store)(jnp.zeros((N, L)), weight, jnp.int32(1))
    np.testing.assert_array_equal(back, rows.advantage + 1)
    number = (np.asarray(rows.tree)[:, :states] >= 0).sum(1)
    longest = np.zeros(each, int)
    for part in range(parts):
        own = range(part * each, (part + 1) * each)
        order = sorted(own, key=lambda n: (-number[n], n))
        longest = np.maximum(longest, number[order])
        for place, n in zip(own, order):
            assert batch.row[place] == n - part * each
            front = [t for t in range(states) if rows.tree[n, t] >= 0]
            np.testing.assert_array_equal(batch.rows.advantage[place][: len(front)], rows.advantage[n, front])
            np.testing.assert_array_equal(batch.rows.advantage[place][states:], rows.advantage[n, states:])
        # From position 1 on, and behind the end an empty row.
        begin, end = part * each, (part + 1) * each
        np.testing.assert_array_equal(first.tokens[begin : end - 1], batch.rows.tokens[begin + 1 : end])
        assert (np.asarray(first.tree[end - 1]) == -1).all() and not np.asarray(first.loss_mask[end - 1]).any()
        assert not np.asarray(stored[begin]).any()
        np.testing.assert_array_equal(stored[begin + 1 : end], batch.weight[begin + 1 : end])
    np.testing.assert_array_equal(batch.length, longest)
