"""Attention of new tokens over a cache in parts against loops: every query looks its parts' rows up by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax.kernels.branch_decode import IMPLEMENTATIONS, CachePart, branch_decode

M, D = 12, 4
jitted = jax.jit(branch_decode, static_argnums=2)


def random_part(rng, rows, kv_heads, capacity, seen=0.5):
    return CachePart(
        k=rng.normal(size=(rows, kv_heads, D, capacity)).astype(np.float32),
        v=rng.normal(size=(rows, kv_heads, capacity, D)).astype(np.float32),
        visible=rng.random((rows, M // rows, capacity)) < seen,
    )


def random_parts(kv_heads, seed=0):
    """A row for 6 queries, a row for 3 and a row for each; every query sees its own first slot."""
    rng = np.random.default_rng(seed)
    parts = [random_part(rng, *sizes) for sizes in ((2, kv_heads, 5), (4, kv_heads, 3), (12, kv_heads, 7))]
    parts[-1].visible[..., 0] = True
    return rng.normal(size=(M, 4, D)).astype(np.float32), parts


def oracle(q, parts):
    group = q.shape[1] // parts[0].k.shape[1]
    out = np.zeros(q.shape)
    for m in range(len(q)):
        for h in range(q.shape[1]):
            scores, values = [], []
            for part in parts:
                each = len(q) // len(part.k)
                row, index = m // each, m % each
                for slot in range(part.k.shape[3]):
                    if part.visible[row, index, slot]:
                        key = part.k[row, h // group, :, slot].astype(np.float64)
                        scores.append(np.exp(float(q[m, h] @ key) / np.sqrt(q.shape[2])))
                        values.append(part.v[row, h // group, slot])
            out[m, h] = sum(score / sum(scores) * value for score, value in zip(scores, values))
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_oracle(implementation, kv_heads):
    q, parts = random_parts(kv_heads)
    expected = oracle(q, parts)
    np.testing.assert_allclose(jitted(q, parts, implementation), expected, atol=2e-6)
    np.testing.assert_allclose(jitted(q, parts[::-1], implementation), expected, atol=2e-6)


def test_an_unseen_part_and_unseen_slots_change_nothing():
    q, parts = random_parts(2)
    base = jitted(q, parts)
    unseen = random_part(np.random.default_rng(9), 3, 2, 6, seen=0.0)
    np.testing.assert_allclose(jitted(q, [unseen, *parts]), base, atol=1e-6)
    # Row 0 of the first part serves queries 0..5: hide slot 2 from them, then put anything there.
    parts[0].visible[0, :, 2] = False
    hidden = jitted(q, parts)
    parts[0].k[0, :, :, 2], parts[0].v[0, :, 2] = 50.0, -50.0
    np.testing.assert_array_equal(jitted(q, parts), hidden)


def test_shared_rows_equal_copied_rows():
    """One row for six queries is the same as six rows with the same content."""
    q, parts = random_parts(2)
    shared = parts[0]
    copied = CachePart(
        k=np.repeat(shared.k, 6, axis=0), v=np.repeat(shared.v, 6, axis=0), visible=shared.visible.reshape(M, 1, -1)
    )
    expected = jitted(q, parts)
    np.testing.assert_allclose(jitted(q, [copied, *parts[1:]]), expected, atol=1e-6)


def test_visible_is_broadcast():
    q, parts = random_parts(2)
    narrow = np.asarray([True, True, False, True, False])
    wide = np.broadcast_to(narrow, parts[0].visible.shape)
    expected = oracle(q, [CachePart(k=parts[0].k, v=parts[0].v, visible=wide)])
    actual = jitted(q, [CachePart(k=parts[0].k, v=parts[0].v, visible=narrow[None, None])])
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_bfloat16_in_bfloat16_out():
    q, parts = random_parts(2)
    low = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    actual = jitted(low(q), [CachePart(k=low(p.k), v=low(p.v), visible=p.visible) for p in parts])
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(actual, np.float32), oracle(q, parts), atol=0.05)


def test_misuse_is_refused():
    q, parts = random_parts(2)
    with pytest.raises(ValueError, match=r"implementation='paged' is unknown: choose one of \('reference'"):
        branch_decode(q, parts, "paged")
    for bad in (q[:9], q[:, :3], q[..., :2]):
        with pytest.raises(ValueError, match="rows must divide the queries"):
            branch_decode(bad, parts)
