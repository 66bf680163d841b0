"""The GPU kernels by the interpreter against the reference, and their lowering for CUDA. No GPU is used."""

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
    visible,
)

from tto_jax import sharding
from tto_jax.kernels.tree_attention import gpu, tree_attention


def attend(query_block, key_block):
    return lambda q, k, v, rows: gpu.interpreted(q, k, v, gpu.plan(rows, query_block, key_block))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_reference(kv_heads):
    """On packed trees and on any vectors at all."""
    for rows in (packed_rows(), random_rows(1)):
        assert_equals_reference(attend(16, 8), rows, random_arrays(rows, 4, kv_heads, 8), 2e-6)


def test_bfloat16():
    rows = packed_rows()
    arrays = random_arrays(rows, 4, 2, 16, jnp.bfloat16)
    assert_equals_reference(attend(16, 16), rows, arrays, 0.02)  # weights are rounded before their products


def test_lists_cover_what_is_visible():
    skipped = 0
    for rows in (packed_rows(), random_rows(0)):
        plan, mask = jax.jit(gpu.plan, static_argnums=(1, 2))(rows, 14, 10), visible(rows)
        skipped += assert_lists_cover(np.asarray(plan.by_query), mask, 14, 10)
        skipped += assert_lists_cover(np.asarray(plan.by_key), mask.swapaxes(1, 2), 10, 14)
    assert skipped > 40


def test_pairs_computed_at_8k():
    rows, pairs = eight_thousand()
    plan = jax.jit(gpu.plan)(rows)
    for lists in (plan.by_query, plan.by_key):
        assert pairs <= int(lists[..., 1].sum()) * plan.query_block * plan.key_block <= 1.1 * pairs


def lowered(width, dtype, heads=12, kv_heads=2, length=1000):
    """The program of forward and backward for CUDA, as text."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, length), x.dtype), packed_rows())
    loss = lambda q, k, v, rows: tree_attention(q, k, v, rows, "gpu").astype(jnp.float32).sum()  # noqa: E731
    arrays = struct(2, length, heads, width), *[struct(2, length, kv_heads, width)] * 2
    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays, rows).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("width", "dtype"), [(128, jnp.bfloat16), (64, jnp.float32)])
def test_lowers_for_cuda(width, dtype):
    text = lowered(width, dtype)
    for kernel in ("tree_attention_forward", "tree_attention_queries", "tree_attention_keys"):
        assert text.count(f'name = "{kernel}"') == 1, kernel
    assert text.count("@__gpu$xla.gpu.triton") == 3
    assert "1024x1024x" not in text and "1000x1000x" not in text  # no array over all pairs of tokens


def test_on_a_mesh():
    """Rows and heads on 8 devices, by the interpreter."""
    rows = random_rows(3, number=4)
    arrays = random_arrays(rows, 4, 2, 8)
    heads = P(sharding.ROWS, None, "tensor")

    def attend(q, k, v, rows):
        local = lambda arrays, _axis: gpu.interpreted(*arrays)  # noqa: E731
        plan = gpu.plan(rows, 16, 16)
        return sharding.split(local, (q, k, v, plan), (heads, heads, heads, P(sharding.ROWS)), heads)

    with sharding.use(sharding.make_mesh((2, 2, 2))):
        assert_equals_reference(attend, rows, arrays, 2e-6)


def test_misuse_is_refused():
    rows = packed_rows()
    q, k, v, _ = random_arrays(rows, 4, 2, 64)
    plan = gpu.plan(rows)
    with pytest.raises(ValueError, match=r"q int32.*gpu takes one dtype of \('bfloat16'"):
        gpu.tree_attention(*(x.astype(jnp.int32) for x in (q, k, v)), plan)
    with pytest.raises(ValueError, match=r"q float32, k bfloat16.*one dtype"):
        gpu.tree_attention(q, k.astype(jnp.bfloat16), v, plan)
    for width, dtype in ((48, jnp.bfloat16), (8, jnp.bfloat16), (256, jnp.bfloat16), (128, jnp.float32)):
        arrays = random_arrays(rows, 4, 2, width, dtype)[:3]
        with pytest.raises(ValueError, match=rf"heads of {width} in .*gpu takes widths of \(16, 32, 64, 128\)"):
            gpu.tree_attention(*arrays, plan)
    with pytest.raises(ValueError, match="blocks of 48 queries and 64 keys: on a GPU they are powers of 2"):
        gpu.tree_attention(q, k, v, gpu.plan(rows, 48, 64))
