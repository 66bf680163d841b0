"""For CPUs: loops over the pairs of blocks that hold a visible pair of tokens, with a running softmax.

No array of the size L x L is made, forward or backward: a step holds one block of queries against one of keys, all
heads, and the backward recomputes it from the log of the softmax's denominator (as in FlashAttention-2,
arXiv 2307.08691). Every product of a step contracts as XLA's matrix products on CPU like it, without a transposed copy.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from tto_jax.core import token_tree
from tto_jax.core.types import Array, TokenTree
from tto_jax.kernels.tree_attention import blocks, reference

DENSE = 96  # tokens of a row up to which it is one block: there is too little to skip for what a loop's step costs
SHORT = 512  # tokens of a row up to which the small block is used
SMALL_BLOCK, LARGE_BLOCK = 64, 128
_HIDDEN = -1e30  # a logit that no maximum keeps: every token sees itself


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What each of the R blocks of queries of N rows does."""

    vectors: Array  # i32[N, R, 4, block]
    keys: Array  # i32[N, R, R], key blocks: those that are seen wholly, then those seen in part, then the others
    whole: Array  # i32[N, R], how many are seen wholly
    needed: Array  # i32[N, R], how many are seen at all


def block_size(length: int) -> int:
    """Tokens a block for rows of this length; a row of one block is attended to densely, as the reference does."""
    if length <= DENSE:
        return max(length, 1)
    return SMALL_BLOCK if length <= SHORT else LARGE_BLOCK


def plan(rows: TokenTree, block: int = 0) -> Plan | blocks.Vectors:
    """What `tree_attention` reads of rows: their int vectors alone if they are one block.

    rows: tree, position, branch, fork i32[N,L]. block: tokens a block; 0: by `block_size`.
    """
    block = block or block_size(rows.tree.shape[1])
    if block >= rows.tree.shape[1]:
        return blocks.vectors(rows)
    rows = blocks.fill(rows, block)
    found = blocks.block_map(rows, block, block)
    order = jnp.argsort(jnp.where(found.needed, jnp.where(found.full, 0, 1), 2), axis=-1, stable=True)
    stacked = [getattr(rows, name).reshape(rows.tree.shape[0], -1, block) for name in blocks.FIELDS]
    count = lambda x: x.sum(-1, dtype=jnp.int32)  # noqa: E731
    whole, needed = count(found.needed & found.full), count(found.needed)
    return Plan(jnp.stack(stacked, axis=2), order.astype(jnp.int32), whole, needed)


def tree_attention(q: Array, k: Array, v: Array, plan: Plan | blocks.Vectors) -> jax.Array:
    """q [N,L,H,D], k and v [N,L,K,D] -> [N,L,H,D]; arithmetic in float32, except that of rows of one block."""
    if isinstance(plan, blocks.Vectors):
        return reference.tree_attention(q, k, v, plan)
    return _attend(q, k, v, plan)


def _flat(plan):
    """The plan with its first two dimensions as one, and its key blocks numbered among those of all rows."""
    first = jnp.arange(plan.keys.shape[0], dtype=jnp.int32)[:, None, None] * plan.keys.shape[1]
    plan = dataclasses.replace(plan, keys=plan.keys + first)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), plan)


def _visible(query, key):
    """bool[block, block] from two i32[4, block]."""
    return token_tree.visible(blocks.Vectors(*query), blocks.Vectors(*key))


def _over_keys(step, carry, plan, some):
    """`step(carry, key block, visible)` for the key blocks of a query block; `visible` is None where all is seen."""

    def whole(j, carry):
        return step(carry, some.keys[j], None)

    def visible(j):
        return _visible(some.vectors, plan.vectors[some.keys[j]])

    def part(j, state):
        carry, seen = state
        return step(carry, some.keys[j], seen), visible(j + 1)

    # What is seen is carried from the step before: XLA would compute it anew for every head and every use of it.
    state = lax.fori_loop(0, some.whole, whole, carry), visible(some.whole)
    return lax.fori_loop(some.whole, some.needed, part, state)[0]


def _to_blocks(x, block, kv_heads):
    """[N,L,K*G,...] -> f32[N*R, K, G*block, ...], zeros at the end of the last block."""
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -x.shape[1] % block), *(((0, 0),) * (x.ndim - 2))))
    n, length, heads, *rest = x.shape
    x = x.reshape(n * (length // block), block, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(x, 1, 3).reshape(x.shape[0], kv_heads, -1, *rest)


def _from_blocks(x, like, block):
    """Back to the shape [N,L,heads,D] and the dtype of `like`."""
    n, length, heads, width = like.shape
    x = jnp.moveaxis(x.reshape(x.shape[0], x.shape[1], -1, block, width), 3, 1)
    return x.reshape(n, -1, heads, width)[:, :length].astype(like.dtype)


def _zeros(x):
    """Zeros that vary over a mesh as x does: inside `shard_map` a loop's carry must not change its type."""
    return jnp.where(False, x, 0.0)


@jax.custom_vjp
def _attend(q, k, v, plan):
    return _forward(q, k, v, plan)[0]


def _forward(q, k, v, rows):
    kv_heads, width = k.shape[2:]
    plan, block = _flat(rows), rows.vectors.shape[-1]
    queries, keys, values = (_to_blocks(x, block, kv_heads) for x in (q, k, v))

    def query_block(_, xs):
        some, query = xs
        query = query * width**-0.5
        number = _zeros(query[..., 0])

        def step(carry, j, visible):
            out, top, total = carry
            logits = _hide(jnp.einsum("kqd,ksd->kqs", query, keys[j]), visible)
            new_top = jnp.maximum(top, logits.max(-1))
            weights = jnp.exp(logits - new_top[..., None])
            old = jnp.exp(top - new_top)
            out = out * old[..., None] + jnp.einsum("kqs,ksd->kqd", weights, values[j])
            return out, new_top, total * old + weights.sum(-1)

        start = (_zeros(query), number + _HIDDEN, number)
        out, top, total = _over_keys(step, start, plan, some)
        return (), (out / total[..., None], top + jnp.log(total))

    _, (out, log_total) = lax.scan(query_block, (), (plan, queries))
    out = _from_blocks(out, q, block)
    return out, (q, k, v, rows, out, log_total)


def _hide(logits, visible):
    """Logits [K, G*block, block] with those of unseen keys out of the way. visible bool[block, block] or None."""
    if visible is None:
        return logits
    grouped = logits.reshape(logits.shape[0], -1, *visible.shape)
    return jnp.where(visible, grouped, _HIDDEN).reshape(logits.shape)


def _hide_transposed(logits, visible):
    """The same for logits [K, block, G*block], keys first."""
    if visible is None:
        return logits
    grouped = logits.reshape(*logits.shape[:2], -1, visible.shape[0])
    return jnp.where(visible.T[:, None], grouped, _HIDDEN).reshape(logits.shape)


def _backward(residuals, d_out):
    q, k, v, rows, out, log_total = residuals
    kv_heads, width = k.shape[2:]
    plan, block = _flat(rows), rows.vectors.shape[-1]
    queries, keys, values = (_to_blocks(x, block, kv_heads) for x in (q, k, v))
    along = _to_blocks(jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1), block, kv_heads)

    def query_block(carry, xs):
        some, query, d_out, log_total, along = xs
        query = query * width**-0.5

        def step(carry, j, visible):
            d_keys, d_values, d_query = carry
            key, value = keys[j], values[j]
            logits = _hide_transposed(jnp.einsum("kqd,ksd->ksq", query, key), visible)
            weights = jnp.exp(logits - log_total[:, None])
            d_logits = weights * (jnp.einsum("kqd,ksd->ksq", d_out, value) - along[:, None])
            d_keys = _add_at(d_keys, j, jnp.einsum("ksq,kqd->ksd", d_logits, query))
            d_values = _add_at(d_values, j, jnp.einsum("ksq,kqd->ksd", weights, d_out))
            return d_keys, d_values, d_query + jnp.einsum("ksq,ksd->kdq", d_logits, key)

        start = (*carry, _zeros(query.swapaxes(1, 2)))
        d_keys, d_values, d_query = _over_keys(step, start, plan, some)
        return (d_keys, d_values), d_query.swapaxes(1, 2) * width**-0.5

    xs = (plan, queries, _to_blocks(d_out, block, kv_heads), log_total, along)
    (d_keys, d_values), d_queries = lax.scan(query_block, (_zeros(keys), _zeros(values)), xs)
    gradients = zip((d_queries, d_keys, d_values), (q, k, v))
    return *(_from_blocks(d, like, block) for d, like in gradients), None


def _add_at(x, j, more):
    return lax.dynamic_update_index_in_dim(x, x[j] + more, j, 0)


_attend.defvjp(_forward, _backward)
