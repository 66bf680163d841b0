"""For NVIDIA GPUs: three Pallas kernels (Triton) that visit only the pairs of blocks with a visible pair of tokens.

The forward and dq have a program for each block of queries of a head, dk and dv one for each block of keys; each goes
through a list of the blocks that it needs, first those that are seen wholly, then those that need a mask
(FlashAttention-2, arXiv 2307.08691). Key heads are read by their whole group; dk and dv are made for each query head in
float32 and summed over the group, so that no two programs add to one place and results are the same in each run.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tto_jax.core.types import Array, TokenTree
from tto_jax.kernels.tree_attention import blocks
from tto_jax.kernels.varying import vary_together

DTYPES = ("bfloat16", "float16", "float32")  # products of float32 are TF32, as XLA's are on a GPU
WIDTHS = (16, 32, 64, 128)  # of a head
MOST_BYTES = 256  # a head of a token: then the blocks below take up to 132,096 bytes of shared memory
QUERY_BLOCK, KEY_BLOCK = 128, 64
# Rows of `Plan.vectors`. A query sees a key of its tree that is of its branch and not later, or that is on the trunk
# and not beyond the query's reach.
_TREE, _POSITION, _BRANCH, _TRUNK_POSITION, _REACH = range(5)
_NEVER = jnp.iinfo(jnp.int32).max
_HIDDEN = -1e30  # a logit that no maximum keeps: every token sees itself
_COUNTS = 2  # numbers before the blocks in a list


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows [N,L] for the kernels; P is L, filled up to whole blocks: Q blocks of queries, K of keys.

    A list: how many blocks are seen wholly, how many at all, then the blocks, wholly seen ones first.
    """

    vectors: Array  # i32[N, 5, P]
    by_query: Array  # i32[N, Q, 2 + K], lists of key blocks
    by_key: Array  # i32[N, K, 2 + Q], lists of query blocks
    query_block: int = dataclasses.field(metadata={"static": True})
    key_block: int = dataclasses.field(metadata={"static": True})


def plan(rows: TokenTree, query_block: int = QUERY_BLOCK, key_block: int = KEY_BLOCK) -> Plan:
    """The plan of rows. rows: tree, position, branch, fork i32[N,L].

    Block sizes are powers of 2, of 32 queries and 16 keys or more on a GPU (the interpreter takes any even ones); a
    query block is worked on in halves where keys have the programs.
    """
    rows = blocks.fill(rows, math.lcm(query_block, key_block))
    found = blocks.block_map(rows, query_block, key_block)
    trunk_position = jnp.where(rows.branch == 0, rows.position, _NEVER)
    vectors = [rows.tree, rows.position, rows.branch, trunk_position, jnp.minimum(rows.position, rows.fork - 1)]
    by_query = _lists(found.needed, found.full)
    by_key = _lists(found.needed.swapaxes(1, 2), found.full.swapaxes(1, 2))
    return Plan(jnp.stack(vectors, axis=1), by_query, by_key, query_block, key_block)


def _lists(needed, full):
    """bool[N,A,B] twice -> i32[N, A, 2 + B]."""
    full &= needed
    order = jnp.argsort(jnp.where(needed, jnp.where(full, 0, 1), 2), axis=-1, stable=True)
    counts = [x.sum(-1, keepdims=True) for x in (full, needed)]
    return jnp.concatenate([*counts, order], axis=-1).astype(jnp.int32)


def tree_attention(q: Array, k: Array, v: Array, plan: Plan) -> jax.Array:
    """q [N,L,H,D], k and v [N,L,K,D] -> [N,L,H,D]; softmax and sums in float32, products of q's dtype.

    Raises ValueError for dtypes and widths of heads that the kernels are not made for.
    """
    return _run(q, k, v, plan, interpret=False)


def interpreted(q: Array, k: Array, v: Array, plan: Plan) -> jax.Array:
    """The same by JAX's interpreter: slow, on any platform, for tests. Any width of heads."""
    return _run(q, k, v, plan, interpret=True)


def _run(q, k, v, plan, interpret):
    _check(q, k, v, plan, interpret)
    length = q.shape[1]
    q, k, v, plan = vary_together((q, k, v, plan))
    fill = ((0, 0), (0, plan.vectors.shape[2] - length), (0, 0), (0, 0))
    return _attend(*(jnp.pad(x, fill) for x in (q, k, v)), plan, interpret)[:, :length]


def _check(q, k, v, plan, interpret):
    if q.dtype.name not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: gpu takes one dtype of {DTYPES}")
    width = q.shape[3]
    if not interpret and (width not in WIDTHS or width * q.dtype.itemsize > MOST_BYTES):
        raise ValueError(
            f"heads of {width} in {q.dtype}: gpu takes widths of {WIDTHS} and at most {MOST_BYTES} bytes a head: "
            "choose bfloat16, or another implementation"
        )
    sizes = plan.query_block, plan.key_block
    if not interpret and (sizes[0] < 32 or sizes[1] < 16 or any(size & (size - 1) for size in sizes)):
        raise ValueError(
            f"blocks of {sizes[0]} queries and {sizes[1]} keys: on a GPU they are powers of 2, at least 32 and 16"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, plan, interpret):
    return _forward(q, k, v, plan, interpret)[0]


def _forward(q, k, v, plan, interpret):
    call = _Call(q, k, plan, interpret, by_key=False)
    given = [call.heads(q, own=True), call.kv_heads(k), call.kv_heads(v)]
    statistics = call.statistics(jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32), own=True)
    out, lse = call.run(_forward_kernel, given, [call.heads(q, own=True), statistics])
    return out, (q, k, v, plan, out, lse)


def _backward(interpret, residuals, d_out):
    q, k, v, plan, out, lse = residuals
    delta = jnp.einsum("nlhd,nlhd->nhl", out, d_out, preferred_element_type=jnp.float32)

    call = _Call(q, k, plan, interpret, by_key=False)
    given = [call.heads(q, own=True), call.kv_heads(k), call.kv_heads(v), call.heads(d_out, own=True)]
    given += [call.statistics(lse, own=True), call.statistics(delta, own=True)]
    (d_q,) = call.run(_queries_kernel, given, [call.heads(q, own=True)])

    call = _Call(q, k, plan, interpret, by_key=True)
    given = [call.heads(q), call.kv_heads(k, own=True), call.kv_heads(v, own=True), call.heads(d_out)]
    given += [call.statistics(lse), call.statistics(delta)]
    each_head = call.heads(jax.ShapeDtypeStruct(q.shape, jnp.float32), own=True)
    of_heads = call.run(_keys_kernel, given, [each_head, each_head])
    split = (*k.shape[:3], -1, k.shape[3])
    d_k, d_v = (x.reshape(split).sum(3).astype(k.dtype) for x in of_heads)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


class _Call:
    """The grid of a kernel (blocks, query heads, rows) and what a program sees: its own block of an array, or all."""

    def __init__(self, q, k, plan, interpret, by_key):
        self.rows, self.length, self.query_heads, self.width = q.shape
        self.group, self.plan, self.interpret, self.by_key = q.shape[2] // k.shape[2], plan, interpret, by_key
        self.size = plan.key_block if by_key else plan.query_block
        self.number = self.length // self.size
        self.type = jax.typeof(q).manual_axis_type

    def block(self, program):
        """The longest lists first: those of the last queries, of the first keys."""
        return program if self.by_key else self.number - 1 - program

    def _tokens(self, own):
        return (self.size, self.block) if own else (self.length, lambda _: 0)

    def heads(self, x, own=False):
        """[N,P,H,D], one head."""
        size, at = self._tokens(own)
        return x, pl.BlockSpec((None, size, None, self.width), lambda i, h, n: (n, at(i), h, 0))

    def kv_heads(self, x, own=False):
        """[N,P,K,D], the head that a query head reads."""
        size, at = self._tokens(own)
        return x, pl.BlockSpec((None, size, None, self.width), lambda i, h, n: (n, at(i), lax.div(h, self.group), 0))

    def statistics(self, x, own=False):
        """[N,H,P], one head."""
        size, at = self._tokens(own)
        return x, pl.BlockSpec((None, None, size), lambda i, h, n: (n, h, at(i)))

    def vectors(self, own):
        """The int vectors of a row."""
        size, at = self._tokens(own)
        return self.plan.vectors, pl.BlockSpec((None, 5, size), lambda i, h, n: (n, 0, at(i)))

    def run(self, kernel, given, results):
        """The kernel on: its list, its own and all int vectors, then `given`, then `results`."""
        steps = self.plan.by_key if self.by_key else self.plan.by_query
        lists = steps, pl.BlockSpec((None, None, steps.shape[2]), lambda i, h, n: (n, self.block(i), 0))
        arrays, specs = zip(lists, self.vectors(own=True), self.vectors(own=False), *given)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=self.type) for x, _ in results]
        sizes = {"query_block": self.plan.query_block, "key_block": self.plan.key_block}
        return pl.pallas_call(
            functools.partial(kernel, **sizes),
            shapes,
            grid=(self.number, self.query_heads, self.rows),
            in_specs=specs,
            out_specs=[spec for _, spec in results],
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
            interpret=self.interpret,
            name=f"tree_attention{kernel.__name__.removesuffix('_kernel')}",
        )(*arrays)


def _visible(query, key):
    """bool of vectors i32[...] that broadcast: five of queries, five of keys."""
    own = (key[_BRANCH] == query[_BRANCH]) & (key[_POSITION] <= query[_POSITION])
    return (key[_TREE] == query[_TREE]) & (own | (key[_TRUNK_POSITION] <= query[_REACH]))


def _over(list_ref, step, carry, parts=1):
    """`step(carry, index, masked)` for all blocks of a list, each in `parts`: index among the parts of all blocks."""

    def body(masked):
        def one(j, carry):
            block = list_ref[_COUNTS + lax.div(j, parts)]
            return step(carry, block * parts + lax.rem(j, parts), masked)

        return one

    whole, needed = list_ref[0] * parts, list_ref[1] * parts
    return lax.fori_loop(whole, needed, body(True), lax.fori_loop(0, whole, body(False), carry))


def _forward_kernel(list_ref, own_ref, all_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, query_block, key_block):
    query, width = q_ref[...], q_ref.shape[1]
    of_query = [own_ref[i, :][:, None] for i in range(5)]

    def step(carry, j, masked):
        out, top, total = carry
        at = pl.ds(j * key_block, key_block)
        value = v_ref[at, :]
        logits = triton.dot(query, k_ref[at, :], trans_b=True) * (width**-0.5 * math.log2(math.e))
        if masked:
            logits = jnp.where(_visible(of_query, [all_ref[i, at][None, :] for i in range(5)]), logits, _HIDDEN)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new_top[:, None])
        old = jnp.exp2(top - new_top)
        out = out * old[:, None] + triton.dot(weights.astype(value.dtype), value)
        return out, new_top, total * old + jnp.sum(weights, axis=1)

    zeros = jnp.zeros(query_block, jnp.float32)
    start = jnp.zeros((query_block, width), jnp.float32), zeros + _HIDDEN, zeros
    out, top, total = _over(list_ref, step, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)


def _queries_kernel(
    list_ref, own_ref, all_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_q_ref, *, query_block, key_block
):
    query, d_out, width = q_ref[...], d_out_ref[...], q_ref.shape[1]
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]
    of_query = [own_ref[i, :][:, None] for i in range(5)]

    def step(d_query, j, masked):
        at = pl.ds(j * key_block, key_block)
        key = k_ref[at, :]
        logits = triton.dot(query, key, trans_b=True) * (width**-0.5 * math.log2(math.e))
        if masked:
            logits = jnp.where(_visible(of_query, [all_ref[i, at][None, :] for i in range(5)]), logits, _HIDDEN)
        d_logits = jnp.exp2(logits - lse) * (triton.dot(d_out, v_ref[at, :], trans_b=True) - delta)
        return d_query + triton.dot(d_logits.astype(key.dtype), key)

    d_query = _over(list_ref, step, jnp.zeros((query_block, width), jnp.float32))
    d_q_ref[...] = (d_query * width**-0.5).astype(d_q_ref.dtype)


def _keys_kernel(
    list_ref,
    own_ref,
    all_ref,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    d_k_ref,
    d_v_ref,
    *,
    query_block,
    key_block,
):
    key, value, width = k_ref[...], v_ref[...], k_ref.shape[1]
    of_key = [own_ref[i, :][:, None] for i in range(5)]
    half = query_block // 2  # both gradients are in registers: blocks of queries are smaller here

    def step(carry, j, masked):
        d_key, d_value = carry
        at = pl.ds(j * half, half)
        query, d_out = q_ref[at, :], d_out_ref[at, :]
        # Keys first, so that no product needs a transposed result.
        logits = triton.dot(key, query, trans_b=True) * (width**-0.5 * math.log2(math.e))
        if masked:
            logits = jnp.where(_visible([all_ref[i, at][None, :] for i in range(5)], of_key), logits, _HIDDEN)
        weights = jnp.exp2(logits - lse_ref[at][None, :])
        d_value += triton.dot(weights.astype(value.dtype), d_out)
        d_logits = weights * (triton.dot(value, d_out, trans_b=True) - delta_ref[at][None, :])
        return d_key + triton.dot(d_logits.astype(key.dtype), query), d_value

    zeros = jnp.zeros((key_block, width), jnp.float32)
    d_key, d_value = _over(list_ref, step, (zeros, zeros), parts=2)
    d_k_ref[...] = d_key * width**-0.5
    d_v_ref[...] = d_value
