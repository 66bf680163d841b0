"""Rows for the tests of blocked attention, and what every implementation is held to."""

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core import token_tree
from tto_jax.kernels.tree_attention import blocks, reference


def tree(index, prompt, forks, answers, number=1):
    """Tokens (tree, position, branch, fork) of one tree: a trunk up to the last fork, `number` branches a fork."""
    tokens = [(index, t, 0, 0) for t in range(prompt + forks[-1])]
    cuts = [prompt + fork for fork in forks for _ in range(number)]
    for branch, (fork, length) in enumerate(zip(cuts, answers, strict=True)):
        tokens += [(index, fork + t, 1 + branch, fork) for t in range(length)]
    return tokens


def padding(length):
    return [(-1, t, 0, 0) for t in range(length)]


def stack(*rows):
    """Rows of equal length, as the vectors that attention reads."""
    return blocks.Vectors(*np.asarray(rows, np.int32).transpose(2, 0, 1))


def packed_rows():
    """70 tokens: two trees with padding between and behind; one tree whose padding fills whole blocks."""
    first = tree(0, 9, (6, 14), (5, 3), 1) + padding(4) + tree(1, 3, (4, 8, 16), (4, 2, 3)) + padding(7)
    return stack(first, tree(0, 12, (5,), (3, 4), 2) + padding(46))


def random_rows(seed, number=2, length=70):
    """Any vectors at all: every token sees itself, whatever they are."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(low, high, size=(number, length)).astype(np.int32)  # noqa: E731
    return blocks.Vectors(tree=draw(-1, 2), position=draw(0, 30), branch=draw(0, 3), fork=draw(0, 20))


def sequences(number, length):
    return stack(*[[(0, t, 0, 0) for t in range(length)]] * number)


def random_arrays(rows, heads, kv_heads, width, dtype=jnp.float32, seed=0):
    """q, k, v and the weights of a loss."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: jnp.asarray(rng.normal(size=(*rows.tree.shape, heads, width)), dtype)  # noqa: E731
    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)


def outcome(attend, rows, q, k, v, weights):
    """Output and gradients of q, k, v under a weighted sum, as float32."""

    def loss(q, k, v, rows, weights):
        out = attend(q, k, v, rows)
        return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v, rows, weights)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_equals_reference(attend, rows, arrays, atol):
    exact = outcome(reference.tree_attention, rows, *(x.astype(jnp.float32) for x in arrays))
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), outcome(attend, rows, *arrays), exact):
        np.testing.assert_allclose(actual, expected, atol=atol * max(1.0, np.abs(expected).max()), err_msg=name)


def visible(rows):
    """bool[N,L,L]."""
    return np.asarray(jax.vmap(token_tree.visible)(rows, rows))


def assert_lists_cover(lists, mask, query_block, key_block):
    """Lists i32[N, Q, 2 + K] (how many are seen wholly, how many at all, the blocks) hold what a mask [N,L,L] asks.

    Returns how many blocks they skip.
    """
    number, queries, _ = lists.shape
    keys = lists.shape[2] - 2
    size = queries * query_block, keys * key_block
    padded = np.zeros((number, *size), bool)
    padded[:, : mask.shape[1], : mask.shape[2]] = mask
    padded = padded.reshape(number, queries, query_block, keys, key_block)
    some, every = padded.any((2, 4)), padded.all((2, 4))
    skipped = 0
    for n, i in np.ndindex(number, queries):
        whole, needed, order = lists[n, i, 0], lists[n, i, 1], lists[n, i, 2:]
        assert sorted(order[:needed]) == sorted(set(order[:needed])) and every[n, i, order[:whole]].all()
        unseen = np.setdiff1d(np.arange(keys), order[:needed])
        assert not some[n, i, unseen].any()
        skipped += unseen.size
    return skipped


def eight_thousand():
    """A prompt of 500, a trace of 8,192, S=4, A=4 answers of 138 tokens: the row, and how many pairs are visible."""
    prompt, forks, number, answer = 500, (2048, 4096, 6144, 8192), 4, 138
    trunk = prompt + forks[-1]
    own = answer * (answer + 1) // 2
    pairs = trunk * (trunk + 1) // 2 + sum(number * ((prompt + fork) * answer + own) for fork in forks)
    return stack(tree(0, prompt, forks, (answer,) * 16, number)), pairs
