"""The TPU kernels of tree attention: run by JAX's interpreters, and compiled by libtpu for chips that are not there."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tree_rows import assert_equals_reference, packed_rows, random_arrays, random_rows

from tto_jax import compile_tpu, hlo_cost, sharding
from tto_jax.kernels import tree_attention as door
from tto_jax.kernels.tree_attention import blocks, pallas_tpu, pallas_tpu_plan, tree_attention

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # there is no such device
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'tto-jax[tpu]'")
plan_of = jax.jit(pallas_tpu.plan, static_argnums=(1, 2))
KERNELS = {f"tree_attention_{name}": 1 for name in ("forward", "backward_queries", "backward_keys")}


def attend(query_block, key_block, interpret=True):
    """The op in small blocks; jitted once, so that rows of one shape share a program."""

    @jax.jit
    def run(q, k, v, rows):
        plan = pallas_tpu.plan(rows, query_block, key_block)
        return pallas_tpu.tree_attention(q, k, v, plan, interpret=interpret)

    return run


@pytest.mark.parametrize(("kv_heads", "sizes"), [(2, (8, 16)), (1, (16, 8)), (4, (8, 8))])
def test_equals_the_reference(kv_heads, sizes):
    """Values and gradients, on packed trees and on any vectors at all; rows need different numbers of steps."""
    run = attend(*sizes)
    for rows in (packed_rows(), random_rows(1)) if kv_heads == 2 else (packed_rows(),):
        assert_equals_reference(run, rows, random_arrays(rows, 4, kv_heads, 8), 2e-6)


def test_bfloat16():
    rows = packed_rows()
    assert_equals_reference(attend(16, 16), rows, random_arrays(rows, 4, 2, 8, jnp.bfloat16), 0.02)


@pytest.mark.slow
def test_equals_the_reference_in_a_tpu_s_memory():
    """What was not written is NaN, copies are copies, and reads beyond an array are errors."""
    run = attend(8, 16, pltpu.InterpretParams(uninitialized_memory="nan"))
    for rows in (packed_rows(), random_rows(1)):
        assert_equals_reference(run, rows, random_arrays(rows, 4, 2, 8), 2e-6)


def test_rows_and_heads_on_a_mesh(monkeypatch):
    """With a plan made by row on 2 devices along the rows and 2 along the heads, and through the door."""
    # The interpreters do not know the types of arrays inside a checked shard_map; Mosaic does (below).
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    rows, heads, per_row = packed_rows(), P(sharding.ROWS, None, "tensor"), P(sharding.ROWS)
    name = "pallas_tpu_interpret"

    def run(q, k, v, rows):
        plan = sharding.split(lambda rows, _axis: door.plan(rows, name), rows, per_row, per_row)
        local = lambda arrays, _axis: tree_attention(*arrays, name)  # noqa: E731
        return sharding.split(local, (q, k, v, plan), (heads, heads, heads, per_row), heads)

    with sharding.use(sharding.make_mesh((2, 1, 2), jax.devices()[:4])):
        assert_equals_reference(run, rows, random_arrays(rows, 4, 2, 8), 2e-6)


def test_steps_are_the_needed_blocks_in_order():
    rows = packed_rows()
    plan = jax.tree.map(np.asarray, plan_of(rows, 8, 16))
    found = jax.tree.map(np.asarray, jax.jit(lambda rows: blocks.block_map(blocks.fill(rows, 16), 8, 16))(rows))
    for n, count in enumerate(plan.steps):
        for steps, own in ((plan.by_query[n], 0), (plan.by_key[n], 1)):
            pairs = np.stack([pallas_tpu_plan.query_of(steps), pallas_tpu_plan.key_of(steps)], axis=1)
            listed = pairs[:count].tolist()
            assert listed == sorted(np.argwhere(found.needed[n]).tolist(), key=lambda pair: pair[::-1] if own else pair)
            first, last, masked, idle = (
                (steps & getattr(pallas_tpu_plan, flag)) > 0 for flag in ("FIRST", "LAST", "MASKED", "IDLE")
            )
            # Each block is begun once and ended once, and what lies behind the last step moves nothing.
            block = pairs[:count, own]
            np.testing.assert_array_equal(np.flatnonzero(first), np.unique(block, return_index=True)[1])
            ends = count - 1 - np.unique(block[::-1], return_index=True)[1]
            np.testing.assert_array_equal(np.flatnonzero(last), ends)
            np.testing.assert_array_equal(masked[:count], [not found.full[n, q, k] for q, k in listed])
            np.testing.assert_array_equal(idle, np.arange(steps.size) >= count)
            assert (pairs[count:] == pairs[count - 1]).all() and not masked[count:].any()
    assert plan.steps.max() > plan.steps.min() and (np.asarray(plan.steps) < found.needed[0].size).all()


@pytest.mark.parametrize(("length", "sizes"), [(24, (128, 128)), (1500, (128, 128)), (2048, (256, 256))])
def test_block_sizes(length, sizes):
    assert pallas_tpu_plan.block_sizes(length) == sizes
    assert pallas_tpu_plan.block_sizes(9728) == (256, 512)


def test_misuse_is_refused():
    rows = packed_rows()
    shape = lambda heads, width, dtype: jax.ShapeDtypeStruct((*rows.tree.shape, heads, width), dtype)  # noqa: E731
    q, k = shape(4, 8, jnp.float32), shape(2, 8, jnp.float32)
    planned = plan_of(rows, 128, 128)
    with pytest.raises(
        ValueError, match=r"q float32, k bfloat16, v float32: pallas_tpu takes one dtype of \('float32'"
    ):
        pallas_tpu.tree_attention(q, shape(2, 8, jnp.bfloat16), k, planned)
    with pytest.raises(ValueError, match="pallas_tpu takes one dtype of"):
        pallas_tpu.tree_attention(*[shape(2, 8, jnp.float16)] * 3, planned)
    with pytest.raises(ValueError, match="blocks of 8 queries and 16 keys: on a TPU they are multiples of 128"):
        pallas_tpu.tree_attention(q, k, k, plan_of(rows, 8, 16))
    with pytest.raises(ValueError, match=r"128 query heads of 256 on 1 KV heads in float32.*bytes of VMEM"):
        pallas_tpu.tree_attention(shape(128, 256, jnp.float32), *[shape(1, 256, jnp.float32)] * 2, planned)
    long = jax.tree.map(lambda x: jax.ShapeDtypeStruct((64, 40_000), x.dtype), rows)
    with pytest.raises(ValueError, match=r"64 rows of 40448 tokens.*the list of blocks takes 3,195,392 bytes"):
        jax.eval_shape(pallas_tpu.plan, long)


def test_on_another_machine_nothing_else_runs_in_its_place():
    arrays = random_arrays(rows := packed_rows(), 4, 2, 8)[:3]
    with pytest.raises(ValueError, match="interpret mode"):
        jax.jit(tree_attention, static_argnums=4).lower(*arrays, rows, "pallas_tpu")


def compiled(topology, rows, length, heads, kv_heads, width, dtype=jnp.bfloat16):
    """The gradient of the op under a mesh of 4 chips, `rows` rows a chip, and the HLO's text."""
    pod = compile_tpu.describe(topology, 1, (1, -1, 1))
    per_row = P(sharding.ROWS)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((rows * pod.mesh.size, *shape), dtype, sharding=NamedSharding(pod.mesh, per_row))

    def loss(q, k, v, rows):
        local = lambda arrays, _axis: tree_attention(*arrays, "pallas_tpu")  # noqa: E731
        return sharding.split(local, (q, k, v, rows), per_row, per_row).astype(jnp.float32).sum()

    given = [array(length, count, width) for count in (heads, kv_heads, kv_heads)]
    given.append(blocks.Vectors(*[array(length, dtype=jnp.int32)] * 4))
    with jax.set_mesh(pod.mesh):
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*given).compile()
    return program, program.as_text()


@needs_libtpu
def test_compiles_for_v5e():
    """As three Mosaic kernels inside a checked shard_map; heads of 64 are padded to 128."""
    _, text = compiled("v5e:2x2", 1, 300, 4, 2, 64)
    assert 'custom_call_target="tpu_custom_call"' in text
    assert hlo_cost.count(text, 1).kernels == KERNELS


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_at_8k(topology):
    """The heads of the 1.5B model; no array over all pairs of tokens, which would be 4.5 GB."""
    program, text = compiled(topology, 1, 9728, 12, 2, 128)
    cost = hlo_cost.count(text, 1)
    assert cost.kernels == KERNELS and not cost.uncounted
    products = (2 + 3 + 4) * 2 * 12 * 128 * 9728 * 9729 // 2
    assert products <= cost.flops < 1.01 * products
    assert program.memory_analysis().temp_size_in_bytes < 200e6


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "shape", "dtype"),
    [
        ("v5e:2x2", (2, 2048, 14, 2, 64), jnp.float32),
        ("v5p:2x2x1", (2, 4096, 32, 8, 128), jnp.bfloat16),
        ("v6e:2x2", (1, 4096, 24, 1, 128), jnp.float32),
    ],
)
def test_compiles_for_other_heads(topology, shape, dtype):
    """The last one takes more VMEM than Mosaic gives unasked."""
    assert hlo_cost.count(compiled(topology, *shape, dtype=dtype)[1], 1).kernels == KERNELS
