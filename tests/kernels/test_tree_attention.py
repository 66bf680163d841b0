"""Attention of packed rows against loops over the visibility rule, in float64; and the maps of their blocks."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax.core import token_tree
from tto_jax.kernels import tree_attention as door
from tto_jax.kernels.tree_attention import IMPLEMENTATIONS, blocks, pallas_tpu_plan, tree_attention

N, L, D = 2, 24, 4
jitted = jax.jit(tree_attention, static_argnums=4)
HERE = ("reference", "blocked")  # the kernels of other machines have tests of their own
block_map = jax.jit(blocks.block_map, static_argnums=(1, 2))


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


def seen(rows):
    """bool[N,L,L] by the loops."""
    length = range(rows.tree.shape[1])
    return np.array([[[sees(rows, n, q, k) for k in length] for q in length] for n in range(rows.tree.shape[0])])


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


@pytest.mark.parametrize("implementation", HERE)
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


@pytest.mark.parametrize("implementation", HERE)
def test_only_visible_values_have_gradients_and_none_is_nan(implementation):
    rows = packed_rows()
    q, k, v = random_qkv(4, 2)
    weights = np.zeros(q.shape, np.float32)
    weights[0, 11] = 1.0  # the last token of a branch
    total = lambda *qkv: jnp.sum(weights * tree_attention(*qkv, rows, implementation))  # noqa: E731
    gradient = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(x).all() for x in gradient)
    for x in gradient[1:]:
        assert np.flatnonzero(np.abs(x[0]).sum((-1, -2))).tolist() == [0, 1, 9, 10, 11] and not x[1].any()


@pytest.mark.parametrize("implementation", HERE)
def test_bfloat16_in_bfloat16_out(implementation):
    rows = packed_rows()
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(4, 2))
    actual = jitted(q, k, v, rows, implementation)
    assert actual.dtype == jnp.bfloat16
    expected = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), rows)
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=0.03)


@pytest.mark.parametrize("implementation", HERE)
def test_a_plan_stands_for_its_rows(implementation):
    """And so does a part of a plan for the same part of the rows: it is split as they are."""
    rows = packed_rows()
    qkv = random_qkv(4, 2)
    planned = jax.jit(door.plan, static_argnums=1)(rows, implementation)
    whole = jitted(*qkv, rows, implementation)
    np.testing.assert_array_equal(jitted(*qkv, planned, implementation), whole)
    second = jitted(*(x[1:] for x in qkv), jax.tree.map(lambda x: x[1:], planned), implementation)
    np.testing.assert_allclose(second, whole[1:], atol=1e-6)


def test_misuse_is_refused():
    q, k, v = random_qkv(4, 2)
    rows = packed_rows()
    with pytest.raises(ValueError, match=r"implementation='flash' is unknown: choose one of \('reference'"):
        tree_attention(q, k, v, rows, "flash")
    with pytest.raises(ValueError, match=r"implementation='reference' cannot use the plan of 'pallas_tpu'"):
        tree_attention(q, k, v, jax.eval_shape(lambda: door.plan(rows, "pallas_tpu")), "reference")
    with pytest.raises(ValueError, match=r"platform='abacus' has no tree_attention of its own: choose one of \('tpu'"):
        door.choose("abacus")
    for arguments in (
        (q[:, :-1], k, v, rows),
        (q, k, v[:, :, :1], rows),
        (q[:, :, :3], k, v, rows),
        (q[..., :2], k, v, rows),
        (q[:1], k[:1], v[:1], rows),
        (q[0], k[0], v[0], rows),
    ):
        for given in (arguments, (*arguments[:3], door.plan(rows))):
            with pytest.raises(ValueError, match=r"\[N,L,H,D\]"):
                tree_attention(*given)


def test_every_platform_has_an_implementation():
    for platform in ("cpu", "gpu", "tpu"):
        assert door.choose(platform) in IMPLEMENTATIONS
    assert door.choose("tpu") == "pallas_tpu"


# The maps of blocks.


@pytest.mark.parametrize("sizes", [(1, 1), (4, 4), (3, 8), (24, 2)])
def test_a_map_misses_no_visible_pair(sizes):
    """Of whatever int vectors. With a token a block it is the mask itself."""
    query_block, key_block = sizes
    for rows in (packed_rows(), *(random_rows(seed) for seed in range(10))):
        mask = seen(rows).reshape(N, L // query_block, query_block, L // key_block, key_block)
        found = block_map(rows, query_block, key_block)
        needed, full = np.asarray(found.needed), np.asarray(found.full)
        assert needed[mask.any((2, 4))].all() and mask.all((2, 4))[full].all() and needed[full].all()
        if sizes == (1, 1):
            np.testing.assert_array_equal(needed, mask[:, :, 0, :, 0])


def test_blocks_must_divide_the_row():
    for sizes in ((5, 4), (4, 5), (0, 4)):
        with pytest.raises(ValueError, match="both must divide the length 24"):
            blocks.block_map(packed_rows(), *sizes)


def test_what_fills_a_row_up_sees_itself_only():
    rows = packed_rows()
    filled = jax.tree.map(np.asarray, blocks.fill(rows, 16))
    mask = seen(Rows(**vars(filled)))
    assert mask.shape == (N, 32, 32)
    np.testing.assert_array_equal(mask[:, :L, :L], seen(rows))
    np.testing.assert_array_equal(mask[:, L:, L:], np.broadcast_to(np.eye(32 - L, dtype=bool), (N, 32 - L, 32 - L)))
    assert not mask[:, L:, :L].any() and not mask[:, :L, L:].any()


def tree_row(prompt, prompt_pad, forks, number, seed):
    """A tree as `core.token_tree` packs it: a whole trace, at each fork `number` answers of 20 inserted and 5 to 118
    sampled tokens, each in its place of 138. The row [1,L], and its visible pairs, padding's left out."""
    width, trace = 138, forks[-1]
    length = 20 + np.random.default_rng(seed).integers(5, 119, len(forks) * number)
    cut = prompt + np.repeat(forks, number)
    p, c, e = np.arange(prompt_pad), np.arange(trace), np.arange(width)
    branch = lambda x: np.concatenate([p * 0, c * 0, np.repeat(x, width)])  # noqa: E731
    row = Rows(
        tree=np.concatenate([np.where(p < prompt, 0, -1), c * 0, np.where(e < length[:, None], 0, -1).ravel()]),
        position=np.concatenate([p, prompt + c, (cut[:, None] + e).ravel()]),
        branch=branch(1 + np.arange(length.size)),
        fork=branch(cut),
    )
    causal = lambda n: n * (n + 1) // 2  # noqa: E731
    visible = causal(prompt + trace) + int((length * cut + causal(length)).sum())
    return jax.tree.map(lambda x: x[None].astype(np.int32), row), visible


def test_visible_pairs_of_a_tree_by_hand():
    """Of a small one, against the loops; padding sees padding, which is not counted."""
    row, visible = tree_row(3, 4, (2, 5), 1, 0)
    assert (seen(row)[0] & (row.tree[0] >= 0)).sum() == visible


def test_the_cost_of_an_8k_tree_is_within_1_3_of_its_visible_pairs():
    """With the block sizes of the TPU kernels, and smaller ones come closer."""
    for prompt, seed in ((512, 0), (500, 1), (470, 2)):
        row, visible = tree_row(prompt, 512, (2048, 4096, 6144, 8192), 4, seed)
        sizes = pallas_tpu_plan.block_sizes(row.tree.shape[1])
        assert sizes == (256, 512)
        row, cost = blocks.fill(row, 512), {}
        for query_block, key_block in (sizes, (128, 128)):
            needed = block_map(row, query_block, key_block).needed
            cost[query_block] = int(blocks.computed_pairs(needed, query_block, key_block)[0]) / visible
        assert 1 < cost[128] < cost[256] < 1.3, (prompt, cost)


def test_trees_beside_each_other_cost_about_what_they_cost_alone():
    """4 trees of 1,024 trunk tokens in a row, each token of padding a branch of its own: what it sees is itself."""
    rows, visible = zip(*(tree_row(120, 128, (256, 512, 1024), 2, seed) for seed in range(4)))
    for index, row in enumerate(rows):
        padding, place = row.tree < 0, index * row.tree.size + np.arange(row.tree.size)
        row.tree = np.where(padding, -1, index)
        row.branch, row.fork = np.where(padding, -1 - place, row.branch), np.where(padding, 0, row.fork)
    cost = lambda row: int(blocks.computed_pairs(block_map(row, 128, 128).needed, 128, 128)[0])  # noqa: E731
    alone = sum(cost(blocks.fill(row, 128)) for row in rows)
    beside = Rows(*(np.concatenate([getattr(row, name) for row in rows], axis=1) for name in vars(rows[0])))
    assert cost(blocks.fill(beside, 128)) < 1.15 * alone and alone < 2 * sum(visible)
