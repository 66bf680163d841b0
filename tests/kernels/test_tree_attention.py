"""Attention of packed rows against loops over the visibility rule, in float64."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax.core import token_tree
from tto_jax.kernels.tree_attention import IMPLEMENTATIONS, tree_attention

N, L, D = 2, 24, 4
jitted = jax.jit(tree_attention, static_argnums=4)


@dataclasses.dataclass
class Rows:
    """The four int vectors that decide visibility."""

    tree: np.ndarray
    position: np.ndarray
    branch: np.ndarray
    fork: np.ndarray


jax.tree_util.register_dataclass(Rows)


def packed_rows():
    """Row 0: two trees of different shapes, padding inside and between. Row 1: one tree, then padding to the end."""
    # (tree, position, branch, fork) of every token
    trunk = lambda tree, length: [(tree, t, 0, 0) for t in range(length)]  # noqa: E731
    branch = lambda tree, index, fork, length: [(tree, fork + t, index, fork) for t in range(length)]  # noqa: E731
    padding = lambda length: [(-1, t, 0, 0) for t in range(length)]  # noqa: E731
    first = trunk(0, 5) + padding(2) + branch(0, 1, 2, 2) + branch(0, 2, 2, 3) + padding(1)
    first += trunk(1, 4) + branch(1, 1, 4, 2) + branch(1, 2, 1, 3) + padding(2)
    second = trunk(0, 6) + branch(0, 1, 3, 1) + branch(0, 2, 6, 4) + padding(13)
    return Rows(*np.asarray([first, second], np.int32).transpose(2, 0, 1))


def random_rows(seed):
    """Any four int vectors: every token sees itself, whatever they are."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(low, high, size=(N, L)).astype(np.int32)  # noqa: E731
    return Rows(tree=draw(-1, 2), position=draw(0, 7), branch=draw(0, 3), fork=draw(0, 6))


def sees(rows, n, q, k):
    if rows.tree[n, q] != rows.tree[n, k]:
        return False
    if rows.position[n, k] > rows.position[n, q]:
        return False
    if rows.branch[n, k] == rows.branch[n, q]:
        return True
    return rows.branch[n, k] == 0 and rows.position[n, k] < rows.fork[n, q]


def oracle(q, k, v, rows):
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for n in range(q.shape[0]):
        for i in range(q.shape[1]):
            keys = [j for j in range(q.shape[1]) if sees(rows, n, i, j)]
            for h in range(q.shape[2]):
                scores = [np.exp(float(q[n, i, h] @ k[n, j, h // group]) / np.sqrt(q.shape[3])) for j in keys]
                for j, score in zip(keys, scores):
                    out[n, i, h] += score / sum(scores) * v[n, j, h // group]
    return out


def random_qkv(heads, kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(N, L, heads, D), (N, L, kv_heads, D), (N, L, kv_heads, D)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_oracle(implementation, kv_heads):
    q, k, v = random_qkv(4, kv_heads)
    for rows in (packed_rows(), random_rows(1), random_rows(2)):
        actual = jitted(q, k, v, rows, implementation)
        np.testing.assert_allclose(actual, oracle(q, k, v, rows), atol=2e-6)


def test_the_rule_by_hand():
    """A branch sees the trunk before its fork and itself; nobody sees another branch, another tree or padding."""
    rows = packed_rows()
    mask = np.asarray(token_tree.visible(*[types.SimpleNamespace(**{f: x[0] for f, x in vars(rows).items()})] * 2))
    for q in range(L):
        np.testing.assert_array_equal(mask[q], [sees(rows, 0, q, k) for k in range(L)])
    # trunk 0..4, padding 5 6, branch at 2: 7 8, branch at 2: 9..11, padding 12; trunk 13..16, branch at 4, branch at 1
    seen_by = {
        0: [0],
        4: [0, 1, 2, 3, 4],
        8: [0, 1, 7, 8],
        11: [0, 1, 9, 10, 11],
        13: [13],
        18: [13, 14, 15, 16, 17, 18],
    }
    seen_by |= {19: [13, 19], 21: [13, 19, 20, 21]}
    for q, keys in seen_by.items():
        assert np.flatnonzero(mask[q]).tolist() == keys, q


def test_only_visible_values_have_gradients_and_none_is_nan():
    rows = packed_rows()
    q, k, v = random_qkv(4, 2)
    weights = np.zeros(q.shape, np.float32)
    weights[0, 11] = 1.0  # the last token of a branch
    gradient = jax.jit(jax.grad(lambda *qkv: jnp.sum(weights * tree_attention(*qkv, rows)), (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(x).all() for x in gradient)
    for x in gradient[1:]:
        assert np.flatnonzero(np.abs(x[0]).sum((-1, -2))).tolist() == [0, 1, 9, 10, 11] and not x[1].any()


def test_bfloat16_in_bfloat16_out():
    rows = packed_rows()
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(4, 2))
    actual = jitted(q, k, v, rows)
    assert actual.dtype == jnp.bfloat16
    expected = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), rows)
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=0.03)


def test_misuse_is_refused():
    q, k, v = random_qkv(4, 2)
    rows = packed_rows()
    with pytest.raises(ValueError, match=r"implementation='flash' is unknown: choose one of \('reference'"):
        tree_attention(q, k, v, rows, "flash")
    for arguments in (
        (q[:, :-1], k, v, rows),
        (q, k, v[:, :, :1], rows),
        (q[:, :, :3], k, v, rows),
        (q[..., :2], k, v, rows),
        (q[:1], k[:1], v[:1], rows),
        (q[0], k[0], v[0], rows),
    ):
        with pytest.raises(ValueError, match=r"\[N,L,H,D\]"):
            tree_attention(*arguments)
