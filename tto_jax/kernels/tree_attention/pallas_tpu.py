"""Attention of packed trees on a TPU: Mosaic kernels that run over the needed pairs of blocks only.

The kernels' grid is (row, KV head, step); a step is one pair of a query block and a key block, read from a list that
lies in scalar memory (`pallas_tpu_plan`). What is not in the list costs no step, no copy and no product. A step takes
all query heads of its KV head: K and V are read once for the group, and the mask is made once.

Scores stand transposed, [keys, queries]. Maxima, sums, log-sum-exps and the queries' int vectors are then rows of
registers, as they lie in memory, and maxima and sums go down the sublanes.

Forward: o = softmax(q k^T / sqrt(D)) v by blocks with running maxima and sums in float32 (Dao, 2023, FlashAttention-2,
algorithm 1); beside o it leaves the log-sum-exp of every query. Backward: dq over the keys of each query block; dk and
dv over the queries of each key block (algorithm 2 as two kernels: no block is added up in memory).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tto_jax.core.types import Array
from tto_jax.kernels.tree_attention import pallas_tpu_kernels as kernels
from tto_jax.kernels.tree_attention import pallas_tpu_plan
from tto_jax.kernels.tree_attention.pallas_tpu_plan import LANES, SUBLANES, Plan, key_of, query_of
from tto_jax.kernels.varying import vary_together

plan = pallas_tpu_plan.plan
NAME = "tree_attention"  # of what the backward keeps of the forward, for `jax.checkpoint_policies`
DTYPES = ("float32", "bfloat16")
VMEM_USUAL = 16 * 2**20  # what Mosaic gives a kernel unless asked for more
VMEM_MOST = 48 * 2**20  # of 64 MiB on v5p and 128 MiB on v5e and v6e: XLA uses the rest


def tree_attention(q: Array, k: Array, v: Array, plan: Plan, interpret: Any = False) -> jax.Array:
    """The op on a TPU. Any head size; it is padded in memory to a multiple of 128.

    Args:
      q: f32 or bf16 [N,L,H,D]. k, v: of the same dtype, [N,L,K,D].
      plan: of the rows.
      interpret: run by JAX's interpreter, on any platform; or `pltpu.InterpretParams`, which imitates a TPU's memory.
        Neither knows the varying axes of a `shard_map` with check_vma.

    Returns:
      [N,L,H,D] in q's dtype.

    Raises:
      ValueError: other dtypes, or a group of heads so wide that a step needs more than `VMEM_MOST`.
    """
    _check(q, k, v, plan, interpret)
    _, length, _, width = q.shape
    rows = plan.vectors.shape[2] - length
    columns = -width % (1 if interpret else LANES)
    padded = (jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) for x in (q, k, v))
    out = _attend(*vary_together((*padded, plan)), width**-0.5, interpret)
    return out[:, :length, :, :width]


interpreted = functools.partial(tree_attention, interpret=True)


def _check(q, k, v, plan, interpret):
    if q.dtype.name not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: pallas_tpu takes one dtype of {DTYPES}")
    sizes = plan.query_block, plan.key_block
    if not interpret and any(size % LANES for size in sizes):
        raise ValueError(f"blocks of {sizes[0]} queries and {sizes[1]} keys: on a TPU they are multiples of {LANES}")
    needed = vmem_bytes(*sizes, q.shape[2] // k.shape[2], q.shape[3], q.dtype.itemsize)
    if needed > VMEM_MOST:
        raise ValueError(
            f"{q.shape[2]} query heads of {q.shape[3]} on {k.shape[2]} KV heads in {q.dtype}: with blocks of "
            f"{sizes[0]} queries and {sizes[1]} keys a step takes {needed:,} bytes of VMEM, and it may take "
            f"{VMEM_MOST:,}: choose smaller blocks in `plan`, more KV heads (copies of them), or bfloat16"
        )


def vmem_bytes(query_block: int, key_block: int, group: int, width: int, itemsize: int) -> int:
    """What a step of the kernel that needs most (dq) takes: blocks twice, as they are copied ahead; scratch; scores."""
    width += -width % LANES
    blocks = 3 * query_block * group * width + 2 * key_block * width
    statistics = 2 * 4 * query_block * -(-group // SUBLANES) * SUBLANES
    vectors = 4 * SUBLANES * (query_block + key_block)
    scores = 6 * 4 * query_block * key_block  # of one head at a time, as values, not arrays: an estimate
    return 2 * (blocks * itemsize + statistics + vectors) + 4 * query_block * group * width + scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, plan, slope, interpret):
    return _forward(q, k, v, plan, slope, interpret)[0]


def _forward(q, k, v, plan, slope, interpret):
    call = _Call(q, k, plan, slope, interpret)
    out, lse = call.run(
        kernels.forward,
        plan.by_query,
        _read(q, k, v, plan),
        [("queries", q.dtype), ("statistics", jnp.dtype("float32"))],
        ["mixed", "running", "running"],
        products=2,
    )
    # Where layers are computed again in the backward, a policy that keeps these by name saves this kernel's second run.
    out, lse = (checkpoint_name(x, NAME) for x in (out.reshape(q.shape), lse))
    return out, (q, k, v, plan, out, lse)


def _backward(slope, interpret, kept, dout):
    q, k, v, plan, out, lse = kept
    call = _Call(q, k, plan, slope, interpret)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1)
    delta = delta.reshape(*k.shape[:3], -1).transpose(0, 2, 3, 1)
    given = [*_read(q, k, v, plan), ("statistics", lse), ("statistics", delta), ("queries", _flat(dout))]
    (dq,) = call.run(kernels.backward_queries, plan.by_query, given, [("queries", q.dtype)], ["mixed"], products=3)
    dk, dv = call.run(
        kernels.backward_keys, plan.by_key, given, [("keys", k.dtype)] * 2, ["summed", "summed"], products=4
    )
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), None


_attend.defvjp(_forward, _backward)


def _flat(x):
    """[N,P,H,D] -> [N,P,H*D]: the heads of a group lie beside each other."""
    return x.reshape(*x.shape[:2], -1)


def _read(q, k, v, plan):
    """What every kernel reads, with the kind of its blocks."""
    vectors = [("query vectors", plan.vectors), ("key vectors", plan.vectors)]
    return [("queries", _flat(q)), ("keys", _flat(k)), ("keys", _flat(v)), *vectors]


class _Call:
    """What the kernels of one call have in common: shapes by kind, for N rows of P tokens, K heads of G queries, D."""

    def __init__(self, q, k, plan, slope, interpret):
        (rows, length, heads, width), kv_heads = q.shape, k.shape[2]
        group, queries, keys = heads // kv_heads, plan.query_block, plan.key_block
        self.plan, self.interpret, self.slope, self.width = plan, interpret, slope, width
        self.grid = (rows, kv_heads, plan.steps.max())  # rows that have fewer steps are idle in the end
        self.capacity = plan.by_query.shape[1]
        self.group, self.type = group, jax.typeof(q).manual_axis_type
        self.itemsize = q.dtype.itemsize
        self.shapes = {
            "queries": (rows, length, heads * width),
            "keys": (rows, length, kv_heads * width),
            "statistics": (rows, kv_heads, group, length),
        }
        self.scratch = {"mixed": (group, width, queries), "running": (group, queries), "summed": (keys, width)}
        # Which block of an array a step works on: by row, head, query block and key block.
        self.blocks = {
            "queries": ((1, queries, group * width), lambda n, h, i, j: (n, i, h)),
            "keys": ((1, keys, width), lambda n, h, i, j: (n, j, h)),
            "statistics": ((1, 1, group, queries), lambda n, h, i, j: (n, h, 0, i)),
            "query vectors": ((1, SUBLANES, queries), lambda n, h, i, j: (n, 0, i)),
            "key vectors": ((1, SUBLANES, keys), lambda n, h, i, j: (n, 0, j)),
        }

    def spec(self, kind):
        """The blocks of an array of a kind; which of them, the list of steps says."""
        shape, place = self.blocks[kind]

        def index(n, h, t, steps):
            step = steps[n * self.capacity + t]
            return place(n, h, query_of(step), key_of(step))

        return pl.BlockSpec(shape, index)

    def run(self, kernel, steps, given, results, scratch, products):
        """A kernel over a list of steps: `given` and `results` are (kind, array) and (kind, dtype)."""
        kinds, arrays = zip(*given)
        limit = vmem_bytes(self.plan.query_block, self.plan.key_block, self.group, self.width, self.itemsize)
        return pl.pallas_call(
            functools.partial(kernel, capacity=self.capacity, group=self.group, slope=self.slope),
            [jax.ShapeDtypeStruct(self.shapes[kind], dtype, manual_axis_type=self.type) for kind, dtype in results],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=self.grid,
                in_specs=[self.spec(kind) for kind in kinds],
                out_specs=[self.spec(kind) for kind, _ in results],
                scratch_shapes=[pltpu.VMEM(self.scratch[kind], jnp.float32) for kind in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=max(limit, VMEM_USUAL),
            ),
            cost_estimate=self.cost(products, arrays, results),
            interpret=self.interpret,
            name=f"{NAME}_{kernel.__name__}",
        )(steps.reshape(-1), *arrays)

    def cost(self, products, arrays, results):
        """For the compiler's schedule, and for whoever counts what a program does: as if rows were plain sequences.

        How many pairs are visible is known when it runs; of packed trees at most those of a sequence of that length.
        """
        rows, length, size = self.shapes["queries"]
        pairs = rows * length * (length + 1) // 2
        moved = sum(x.nbytes for x in arrays) + sum(
            math.prod(self.shapes[kind]) * dtype.itemsize for kind, dtype in results
        )
        return pl.CostEstimate(
            flops=2 * products * pairs * size, bytes_accessed=moved, transcendentals=pairs * size // self.width
        )
