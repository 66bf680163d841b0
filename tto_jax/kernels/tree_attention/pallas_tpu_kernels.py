"""The bodies of the TPU kernels: one step, a pair of a query block and a key block, for all query heads of a KV head.

Scores are [keys, queries]: see `pallas_tpu`. A block of q, o and their gradients is [queries, G * D], head beside head.
Static: `capacity`, the length of a row's list of steps; `group`, G; `slope`, the factor of the scores. The scores are
multiplied by log2(e), too: powers are of 2, as the hardware's, and the log-sum-exp is to base 2.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tto_jax.kernels.tree_attention import pallas_tpu_plan as at

LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # differences of two of them are finite
LOG2E = math.log2(math.e)


def _product(a, b, contract):
    """a and b with one dimension each summed over, in float32."""
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


_rows_by_rows = functools.partial(_product, contract=((1,), (1,)))  # [A,D], [B,D] -> [A,B]
_columns_by_rows = functools.partial(_product, contract=((0,), (0,)))  # [A,D], [A,B] -> [D,B]
_plain = functools.partial(_product, contract=((1,), (0,)))  # [A,B], [B,D] -> [A,D]


def _mask(q_ints, k_ints):
    """bool[keys, queries]: `core.token_tree.visible`, from blocks i32[8, queries] and i32[8, keys]."""
    q = lambda field: q_ints[field : field + 1, :]  # noqa: E731
    columns = k_ints.T
    k = lambda field: columns[:, field : field + 1]  # noqa: E731
    own = (k(at.BRANCH) == q(at.BRANCH)) & (k(at.POSITION) <= q(at.POSITION))
    return (k(at.TREE) == q(at.TREE)) & (own | (k(at.TRUNK_POSITION) <= q(at.REACH)))


def _when_needed(step, q_ints, k_ints, work):
    """`work(mask)` on a step; the mask is None where every pair is visible."""

    @pl.when((step & (at.MASKED | at.IDLE)) == at.MASKED)
    def _():
        work(_mask(q_ints[0], k_ints[0]))

    @pl.when((step & (at.MASKED | at.IDLE)) == 0)
    def _():
        work(None)


def _step(steps, capacity):
    return steps[pl.program_id(0) * capacity + pl.program_id(2)]


def forward(steps, q, k, v, q_ints, k_ints, out, lse, mixed, total, top, *, capacity, group, slope):
    """q, out [1,Q,G*D]; k, v [1,K,D]; lse f32[1,1,G,Q]; scratch f32: mixed [G,D,Q], total and top [G,Q]."""
    step, width = _step(steps, capacity), k.shape[2]

    @pl.when((step & at.FIRST) > 0)
    def _():
        mixed[...] = jnp.zeros_like(mixed)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, LOWEST)

    def work(mask):
        keys, values = k[0], v[0]
        for head in range(group):
            row = slice(head, head + 1)
            scores = _rows_by_rows(keys, q[0, :, head * width : (head + 1) * width]) * (slope * LOG2E)
            if mask is not None:
                scores = jnp.where(mask, scores, LOWEST)
            # A query that has seen nothing yet gathers rubbish here; the first key it sees scales it by 2^-huge = 0.
            highest = jnp.maximum(top[row], scores.max(0, keepdims=True))
            weights, kept = jnp.exp2(scores - highest), jnp.exp2(top[row] - highest)
            top[row] = highest
            total[row] = kept * total[row] + weights.sum(0, keepdims=True)
            mixed[head] = kept * mixed[head] + _columns_by_rows(values, weights.astype(values.dtype))

    _when_needed(step, q_ints, k_ints, work)

    @pl.when((step & at.LAST) > 0)
    def _():
        for head in range(group):
            row = slice(head, head + 1)
            out[0, :, head * width : (head + 1) * width] = (mixed[head] / total[row]).T.astype(out.dtype)
        lse[0, 0] = top[...] + jnp.log2(total[...])


def _weights(keys, queries, lse, mask, slope):
    """Attention weights f32[keys, queries] again, from the log-sum-exp [1, queries]."""
    weights = jnp.exp2(_rows_by_rows(keys, queries) * (slope * LOG2E) - lse)
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def backward_queries(steps, q, k, v, q_ints, k_ints, lse, delta, dout, dq, mixed, *, capacity, group, slope):
    """dq, blocks as in `forward`; delta f32[1,1,G,Q] is the sum of out * dout; scratch mixed f32[G,D,Q]."""
    step, width = _step(steps, capacity), k.shape[2]

    @pl.when((step & at.FIRST) > 0)
    def _():
        mixed[...] = jnp.zeros_like(mixed)

    def work(mask):
        keys, values = k[0], v[0]
        for head in range(group):
            row, part = slice(head, head + 1), slice(head * width, (head + 1) * width)
            weights = _weights(keys, q[0, :, part], lse[0, 0, row], mask, slope)
            dweights = _rows_by_rows(values, dout[0, :, part])
            dscores = weights * (dweights - delta[0, 0, row])
            mixed[head] += _columns_by_rows(keys, dscores.astype(keys.dtype))

    _when_needed(step, q_ints, k_ints, work)

    @pl.when((step & at.LAST) > 0)
    def _():
        for head in range(group):
            dq[0, :, head * width : (head + 1) * width] = (mixed[head] * slope).T.astype(dq.dtype)


def backward_keys(steps, q, k, v, q_ints, k_ints, lse, delta, dout, dk, dv, dkeys, dvalues, *, capacity, group, slope):
    """dk and dv [1,K,D], summed over the group; scratch dkeys and dvalues f32[K,D]."""
    step, width = _step(steps, capacity), k.shape[2]

    @pl.when((step & at.FIRST) > 0)
    def _():
        dkeys[...] = jnp.zeros_like(dkeys)
        dvalues[...] = jnp.zeros_like(dvalues)

    def work(mask):
        keys, values = k[0], v[0]
        for head in range(group):
            row, part = slice(head, head + 1), slice(head * width, (head + 1) * width)
            queries, douts = q[0, :, part], dout[0, :, part]
            weights = _weights(keys, queries, lse[0, 0, row], mask, slope)
            dvalues[...] += _plain(weights.astype(douts.dtype), douts)
            dscores = weights * (_rows_by_rows(values, douts) - delta[0, 0, row])
            dkeys[...] += _plain(dscores.astype(queries.dtype), queries)

    _when_needed(step, q_ints, k_ints, work)

    @pl.when((step & at.LAST) > 0)
    def _():
        dk[0] = (dkeys[...] * slope).astype(dk.dtype)
        dv[0] = dvalues[...].astype(dv.dtype)
