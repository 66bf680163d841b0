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


@pytest.mark.parametrize("kv_heads", [1, 4])
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


def lowered(loss, width, dtype, heads=12, kv_heads=2, length=1000):
    """The program of forward and backward of 4 rows for CUDA, as text."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, length), x.dtype), packed_rows())
    arrays = struct(4, length, heads, width), *[struct(4, length, kv_heads, width)] * 2
    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays, rows).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("width", "dtype"), [(128, jnp.bfloat16), (64, jnp.float32)])
def test_lowers_for_cuda(width, dtype):
    loss = lambda q, k, v, rows: tree_attention(q, k, v, rows, "gpu").astype(jnp.float32).sum()  # noqa: E731
    text = lowered(loss, width, dtype)
    for kernel in ("tree_attention_forward", "tree_attention_queries", "tree_attention_keys"):
        assert text.count(f'name = "{kernel}"') == 1, kernel
    assert text.count("@__gpu$xla.gpu.triton") == 3
    assert "1024x1024x" not in text and "1000x1000x" not in text  # no array over all pairs of tokens


def test_lowers_for_a_mesh():
    """Each of 8 devices has its own rows and heads. (The interpreter cannot run where arrays vary over a mesh.)"""
    heads = P(sharding.ROWS, None, "tensor")

    def loss(q, k, v, rows):
        local = lambda arrays, _axis: gpu.tree_attention(*arrays)  # noqa: E731
        arrays = q, k, v, gpu.plan(rows)
        out = sharding.split(local, arrays, (heads, heads, heads, P(sharding.ROWS)), heads)
        return out.astype(jnp.float32).sum()

    with sharding.use(sharding.make_mesh((2, 2, 2))):
        text = lowered(loss, 64, jnp.bfloat16)
    calls = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    assert len(calls) == 3 and all("tensor<1x1024x6x64xbf16>" in call for call in calls)  # of 4 rows and 12 heads


def test_misuse_is_refused():
    rows = packed_rows()

    def run(*dtypes, width=64, query_block=128):
        plan = jax.eval_shape(lambda rows: gpu.plan(rows, query_block), rows)
        arrays = [jax.ShapeDtypeStruct((2, 70, heads, width), dtype) for heads, dtype in zip((4, 2, 2), dtypes)]
        return jax.eval_shape(gpu.tree_attention, *arrays, plan)

    assert run(*["bfloat16"] * 3).shape == (2, 70, 4, 64)
    with pytest.raises(ValueError, match=r"q int32.*gpu takes one dtype of \('bfloat16'"):
        run(*["int32"] * 3)
    with pytest.raises(ValueError, match=r"q float32, k bfloat16.*one dtype"):
        run("float32", "bfloat16", "float32")
    for width, dtype in ((48, "bfloat16"), (8, "bfloat16"), (256, "bfloat16"), (128, "float32")):
        with pytest.raises(ValueError, match=rf"heads of {width} in {dtype}: gpu takes widths of \(16, 32, 64, 128\)"):
            run(*[dtype] * 3, width=width)
    with pytest.raises(ValueError, match="blocks of 48 queries and 64 keys: on a GPU they are powers of 2"):
        run(*["bfloat16"] * 3, query_block=48)
