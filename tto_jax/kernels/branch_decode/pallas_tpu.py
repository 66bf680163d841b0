"""On a TPU: a Mosaic kernel a part, then the parts merged.

The kernel's grid is (row, block of slots). A step takes one block of keys and values of all KV heads, and all queries
that the row serves, with all the heads of their groups: what lies in HBM is read once for them. The blocks of a row
run from the first to the last slot that one of its queries sees; what lies outside is not read (its steps point to the
block that is there already).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tto_jax.core.types import Array
from tto_jax.kernels.branch_decode.merged import LOWEST, merge
from tto_jax.kernels.branch_decode.parts import CachePart, Interval, deal, undeal
from tto_jax.kernels.varying import vary_together

DTYPES = ("float32", "bfloat16")
LANES = 128
WHOLE = 512  # slots: a part up to this capacity is one block
BLOCK_BYTES = 2**20  # of keys, and of values, at most, unless one block of 128 slots takes more


def branch_decode(q: Array, parts: Sequence[CachePart], interpret: bool = False) -> jax.Array:
    """As the reference, for parts whose `visible` is an `Interval`.

    Args:
      q: f32 or bf16 [M,H,D].
      parts: of the same dtype; above 512 slots a capacity is a multiple of 128.
      interpret: run by JAX's interpreter, on any platform.

    Raises:
      ValueError: a mask instead of an interval, keys in tiles, another dtype or capacity.
    """
    for part in parts:
        _check(q, part)
    kv_heads = parts[0].kv_heads
    grouped = q.reshape(q.shape[0], kv_heads, -1, q.shape[2])
    return merge([_attend(grouped, part, interpret) for part in parts]).reshape(q.shape).astype(q.dtype)


interpreted = functools.partial(branch_decode, interpret=True)


def _check(q, part):
    if not isinstance(part.visible, Interval):
        raise ValueError("pallas_tpu skips the slots that no query sees: give `visible` as an Interval, not as a mask")
    if part.k.ndim != 4:
        raise ValueError(f"k {part.k.shape}: pallas_tpu takes keys as [R,K,D,C], not in tiles")
    if q.dtype.name not in DTYPES or not q.dtype == part.k.dtype == part.v.dtype:
        raise ValueError(f"q {q.dtype}, k {part.k.dtype}, v {part.v.dtype}: pallas_tpu takes one dtype of {DTYPES}")
    if part.capacity > WHOLE and part.capacity % LANES:
        raise ValueError(f"capacity={part.capacity}: above {WHOLE} slots it must be a multiple of {LANES}")


def block_slots(part: CachePart) -> int:
    """Slots a block: the largest divisor of the capacity that is a multiple of 128 and keeps to `BLOCK_BYTES`."""
    if part.capacity <= WHOLE:
        return part.capacity
    most = max(LANES, BLOCK_BYTES // (part.kv_heads * part.width * part.k.dtype.itemsize))
    return max(n for n in range(LANES, part.capacity + 1, LANES) if part.capacity % n == 0 and n <= most)


def _attend(q, part, interpret):
    """q [M,K,g,D] -> of this part (a f32[M,K,g,D], m f32[M,K,g,1], s f32[M,K,g,1])."""
    group, queries = q.shape[2], q.shape[0] // part.rows
    begin, end = (_by_query(x, part.rows, queries) for x in (part.visible.begin, part.visible.end))
    begin, end = jnp.maximum(begin, 0), jnp.minimum(end, part.capacity)
    size, count = block_slots(part), queries * group
    pad = -count % (32 // q.dtype.itemsize)  # to whole tiles of registers; what is added sees nothing
    rows = lambda x: jnp.pad(jnp.repeat(x, group, axis=1), ((0, 0), (0, pad)))[..., None]  # noqa: E731
    dealt = jnp.pad(deal(q, part), ((0, 0), (0, 0), (0, pad), (0, 0)))
    first, blocks = _blocks(begin, end, size)
    found = _call(first, blocks, rows(begin), rows(end), dealt, part.k, part.v, size=size, interpret=interpret)
    return [undeal(x[:, :, :count], part, group) for x in found]


def _by_query(x, rows, queries):
    return jnp.broadcast_to(jnp.asarray(x, jnp.int32), (rows, queries))


def _blocks(begin, end, size):
    """First block that a row needs, and how many (0 where its queries see nothing): i32[R] each."""
    sees = end > begin
    low = jnp.min(jnp.where(sees, begin, jnp.iinfo(jnp.int32).max), axis=1) // size
    high = -(-jnp.max(jnp.where(sees, end, 0), axis=1) // size)
    some = high > 0
    return jnp.where(some, low, 0), jnp.where(some, high - low, 0)


def _call(first, blocks, begin, end, q, k, v, *, size, interpret):
    rows, kv_heads, count, width = q.shape
    steps = k.shape[-1] // size
    *arrays, begin, end, q, k, v = vary_together((first, blocks, begin, end, q, k, v))
    # Steps beyond the last block stay where they are: nothing is fetched for them.
    block = lambda r, c, first, blocks: first[r] + jnp.minimum(c, jnp.maximum(blocks[r] - 1, 0))  # noqa: E731
    of_row = lambda *shape: pl.BlockSpec((1, *shape), lambda r, c, *_: (r, *(0 for _ in shape)))  # noqa: E731
    keys = pl.BlockSpec((1, kv_heads, width, size), lambda r, c, *at: (r, 0, 0, block(r, c, *at)))
    values = pl.BlockSpec((1, kv_heads, size, width), lambda r, c, *at: (r, 0, block(r, c, *at), 0))
    shape = lambda n: jax.ShapeDtypeStruct(  # noqa: E731
        (rows, kv_heads, count, n), jnp.float32, manual_axis_type=jax.typeof(q).manual_axis_type
    )
    item, pairs = k.dtype.itemsize, rows * kv_heads * count * k.shape[-1]
    return pl.pallas_call(
        functools.partial(_kernel, size=size, scale=width**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, steps),
            in_specs=[of_row(count, 1), of_row(count, 1), of_row(kv_heads, count, width), keys, values],
            out_specs=[of_row(kv_heads, count, n) for n in (width, 1, 1)],
        ),
        out_shape=[shape(width), shape(1), shape(1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * width,
            transcendentals=pairs,
            bytes_accessed=2 * rows * kv_heads * k.shape[-1] * width * item,
        ),
        interpret=interpret,
        name="branch_decode",
    )(*arrays, begin, end, q, k, v)


def _kernel(first, blocks, begin, end, q, k, v, mixed, largest, total, *, size, scale):
    """Running sums of a row (FlashAttention-2, algorithm 1, without the division); one block of slots a step."""
    row, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        mixed[...] = jnp.zeros_like(mixed)
        largest[...] = jnp.full_like(largest, LOWEST)
        total[...] = jnp.zeros_like(total)

    @pl.when(step < blocks[row])
    def _():
        count = q.shape[2]
        slot = (first[row] + step) * size + jax.lax.broadcasted_iota(jnp.int32, (count, size), 1)
        seen = (slot >= begin[0]) & (slot < end[0])
        product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        for head in range(q.shape[1]):
            scores = jnp.where(seen, product(q[0, head], k[0, head]) * scale, LOWEST)
            old = largest[0, head]
            new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
            shrink = jnp.exp(old - new)
            largest[0, head] = new
            total[0, head] = shrink * total[0, head] + jnp.sum(weights, axis=1, keepdims=True)
            mixed[0, head] = shrink * mixed[0, head] + product(weights.astype(v.dtype), v[0, head])
