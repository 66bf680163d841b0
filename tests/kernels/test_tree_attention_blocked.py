"""Blocked attention: equal to the reference, its work and memory follow the visible pairs, and it composes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tree_rows import (
    assert_equals_reference,
    assert_lists_cover,
    eight_thousand,
    packed_rows,
    random_arrays,
    random_rows,
    sequences,
    visible,
)

from tto_jax import sharding
from tto_jax.kernels.tree_attention import blocked, blocks, reference, tree_attention
from tto_jax.kernels.tree_attention import plan as api_plan


def attend(block):
    return lambda q, k, v, rows: blocked.tree_attention(q, k, v, blocked.plan(rows, block))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_equals_the_reference(kv_heads):
    """On packed trees, on any vectors at all, and for logits whose maximum changes by far more than exp can hold."""
    for rows in (packed_rows(), random_rows(1)):
        arrays = random_arrays(rows, 4, kv_heads, 8)
        assert_equals_reference(attend(16), rows, arrays, 2e-6)
    q, k, v, weights = arrays
    growing = jnp.linspace(0.1, 10, 70)[None, :, None, None]  # logits up to 250: as floats they are exact to 1e-5
    assert_equals_reference(attend(16), rows, (q * 10, k * growing, v, weights), 1e-4)


def test_bfloat16():
    """Arithmetic is in float32; what is rounded is the results, and the output before the backward reads it."""
    rows = packed_rows()
    arrays = random_arrays(rows, 4, 2, 16, jnp.bfloat16)
    assert jax.eval_shape(attend(16), *arrays[:3], rows).dtype == jnp.bfloat16
    assert_equals_reference(attend(16), rows, arrays, 2**-7)


def test_lists_cover_what_is_visible():
    skipped = 0
    for rows in (packed_rows(), random_rows(0)):
        plan = jax.jit(blocked.plan, static_argnums=1)(rows, 10)
        lists = np.concatenate([plan.whole[..., None], plan.needed[..., None], plan.keys], axis=-1)
        skipped += assert_lists_cover(lists, visible(rows), 10, 10)
    assert skipped > 20


def test_what_is_not_listed_is_not_computed():
    """NaN times a weight of zero is NaN: values of skipped blocks must not be read at all, forward or backward."""
    rows = sequences(1, 64)
    q, k, v, weights = random_arrays(rows, 2, 1, 8)
    late = jnp.arange(64)[None, :, None, None] >= 32
    k, v = jnp.where(late, jnp.nan, k), jnp.where(late, jnp.nan, v)
    early = lambda q: jnp.where(late, 0, attend(16)(q, k, v, rows) * weights).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(early))(q)
    assert np.isfinite(gradient[:, :32]).all() and np.abs(gradient[:, :32]).min() > 0


def test_pairs_computed_at_8k():
    rows, pairs = eight_thousand()
    plan = jax.jit(blocked.plan)(rows)
    computed = int(plan.needed.sum()) * plan.vectors.shape[-1] ** 2
    assert pairs <= computed <= 1.1 * pairs


def test_no_array_over_all_pairs():
    """Temporaries of forward and backward, as the compiler counts them, against one byte for each pair of one head."""
    length = 4096
    rows, shape = sequences(1, length), jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
    loss = lambda q, k, v: blocked.tree_attention(q, k, v, blocked.plan(rows)).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    inputs = 3 * 4 * np.prod(shape.shape)
    assert compiled.memory_analysis().temp_size_in_bytes < min(length**2, 5 * inputs)


def test_short_rows_are_dense_and_blocks_grow_with_rows():
    rows = packed_rows()
    assert isinstance(blocked.plan(rows), blocks.Vectors)
    arrays = random_arrays(rows, 4, 2, 8)[:3]
    actual = tree_attention(*arrays, rows, implementation="blocked")
    np.testing.assert_array_equal(actual, reference.tree_attention(*arrays, rows))
    sizes = [blocked.block_size(length) for length in range(1, 12_000, 7)]
    assert blocked.block_size(blocked.DENSE) == blocked.DENSE > blocked.block_size(blocked.DENSE + 1)
    assert max(sizes) == 128


def test_composes_with_mesh_scan_map_and_checkpoint():
    """As in an update: micro-batches mapped, layers scanned and recomputed, rows and heads on 8 devices."""
    rows = jax.tree.map(lambda x: x.reshape(2, 4, 70), random_rows(3, number=8))
    width = 8
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 70, 4, width)), jnp.float32)
    scales = jnp.linspace(0.5, 1.5, 3)

    def loss(x, attend, make_plan):
        heads = P(sharding.ROWS, None, "tensor")
        local = lambda arrays, _axis: attend(*arrays)  # noqa: E731

        def micro_batch(arguments):
            x, rows = arguments
            plan = make_plan(rows)

            @jax.checkpoint
            def layer(x, scale):
                k, v = scale * x[:, :, ::2], x[:, :, 1::2]
                out = sharding.split(local, (x, k, v, plan), (heads, heads, heads, P(sharding.ROWS)), heads)
                return x + out, None

            return jnp.sum(jax.lax.scan(layer, x, scales)[0] ** 2)

        return jax.lax.map(micro_batch, (x, rows)).sum()

    run = lambda *how: jax.jit(jax.value_and_grad(lambda x: loss(x, *how)))(x)  # noqa: E731
    expected = run(reference.tree_attention, blocks.vectors)
    with sharding.use(sharding.make_mesh((2, 2, 2))):
        actual = run(blocked.tree_attention, lambda rows: blocked.plan(rows, 16))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-5 * np.abs(expected[1]).max())


def test_the_door_takes_its_plan():
    rows = sequences(1, blocked.DENSE + 10)
    q, k, v, _ = random_arrays(rows, 2, 1, 8)
    plan = jax.jit(api_plan, static_argnums=1)(rows, "blocked")
    assert isinstance(plan.arrays, blocked.Plan)
    actual = jax.jit(tree_attention, static_argnums=4)(q, k, v, plan, "blocked")
    np.testing.assert_allclose(actual, jax.jit(reference.tree_attention)(q, k, v, rows), atol=2e-6)
