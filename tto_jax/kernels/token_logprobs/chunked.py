"""Tiles of tokens by columns of the vocabulary: one tile of logits at a time, recomputed in the backward.

The forward keeps running sums a token: the largest logit so far m, sum exp(l - m), sum exp(l - m) (l - m) and the
target's logit. Of them log-prob = l[target] - L and entropy H = L - sum p l follow, with L = log sum exp l. Only L and
H are saved. The backward makes each tile of logits again and of it

    dl = g (1[target] - p) - h p (log p + H),  p = exp(l - L),

where g and h are the cotangents of log-prob and entropy; then dhidden += dl head' and dhead += hidden' dl, both summed
in float32 whatever the dtypes of the operands. Columns are the outer loop, so that each part of the head is cast once,
and its gradient is complete, and written, once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array
from tto_jax.kernels.varying import vary_together

# 4 MiB of logits in float32: a tile passes through a CPU's cache, and on a TPU XLA keeps it in VMEM. It is still large
# enough for products near the peak: with D = 1536, 256 multiply-adds for each byte of its operands.
TILE_TOKENS = 1024
TILE_COLUMNS = 1024
NO_COLUMN = -(2**31)
LOWEST = -1e30  # the logit of a column that does not count: finite, so that no inf - inf or 0 * inf appears


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static options."""

    temperature: float
    axis: str | None
    vocabulary: int | None
    columns: int  # of a tile


def token_logprobs(
    hidden: Array,
    head: Array,
    target: Array,
    temperature: float,
    vocabulary_axis: str | None = None,
    vocabulary: int | None = None,
    tile: tuple[int, int] = (TILE_TOKENS, TILE_COLUMNS),
) -> tuple[jax.Array, jax.Array]:
    """As the reference; tile: tokens and columns whose logits exist at a time."""
    tokens, width = hidden.shape
    plan = _Plan(temperature, vocabulary_axis, vocabulary, _even(head.shape[1], tile[1], 128))
    chunk = _even(tokens, tile[0], 8)
    pad = -tokens % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, width)
    target = jnp.pad(target, (0, pad)).reshape(-1, chunk)
    logprob, entropy = _logprobs(plan, *vary_together((hidden, head, target)))
    return logprob.reshape(-1)[:tokens], entropy.reshape(-1)[:tokens]


def _even(total, most, multiple):
    """Size of the parts of `total` that are at most `most`, as equal as a size that is such a multiple can be."""
    if total <= most:
        return total
    size = -(-total // -(-total // most))
    return min(-(-size // multiple) * multiple, most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(plan, hidden, head, target):
    """hidden [n,c,D], head [D,V], target [n,c] -> log-prob and entropy f32[n,c]."""
    return _forward(plan, hidden, head, target)[0]


def _forward(plan, hidden, head, target):
    target = target - _offset(plan, head)

    def block(index, sums):
        weights, column = _block(plan, head, index, hidden.dtype)

        def chunk(xs):
            x, target, (largest, total, moment, chosen) = xs
            logits = _logits(plan, x, weights, column)
            new = jnp.maximum(largest, jnp.max(logits, axis=-1))
            shifted = logits - new[:, None]
            weight = jnp.exp(shifted)
            total, moment = _shift(total, moment, largest - new)
            return (
                new,
                total + jnp.sum(weight, axis=-1),
                moment + jnp.sum(weight * shifted, axis=-1),
                chosen + jnp.sum(jnp.where(column == target[:, None], logits, 0.0), axis=-1),
            )

        return jax.lax.map(chunk, (hidden, target, sums))

    zero = jnp.zeros_like(target, jnp.float32)
    sums = jax.lax.fori_loop(0, _blocks(plan, head), block, (zero + LOWEST, zero, zero, zero))
    largest, total, moment, chosen = _over_parts(plan, *sums)
    log_total = jnp.log(total)
    entropy = log_total - moment / total
    return (chosen - largest - log_total, entropy), (hidden, head, target, largest + log_total, entropy)


def _backward(plan, saved, cotangents):
    hidden, head, *of_token = saved
    of_token += cotangents

    def block(index, carry):
        d_hidden, d_head = carry
        weights, column = _block(plan, head, index, hidden.dtype)

        def chunk(at, carry):
            d_hidden, d_weights = carry
            x, (target, log_total, entropy, g, h) = hidden[at], (y[at][:, None] for y in of_token)
            logprobs = _logits(plan, x, weights, column) - log_total
            d_logits = jnp.where(column == target, g, 0.0) - jnp.exp(logprobs) * (g + h * (logprobs + entropy))
            d_logits = (d_logits / plan.temperature).astype(x.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_weights += product("cd,cv->dv", x, d_logits)
            return d_hidden.at[at].add(product("cv,dv->cd", d_logits, weights)), d_weights

        zero = jnp.zeros_like(weights, jnp.float32)
        d_hidden, d_weights = jax.lax.fori_loop(0, hidden.shape[0], chunk, (d_hidden, zero))
        begin = _begin(plan, head, index)
        if head.shape[1] % plan.columns:
            # The last block begins in the one before: what they share has gradient 0 the second time.
            d_weights += jax.lax.dynamic_slice_in_dim(d_head, begin, plan.columns, axis=1).astype(jnp.float32)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_weights.astype(head.dtype), begin, axis=1)

    carry = (jnp.zeros_like(hidden, jnp.float32), jnp.zeros_like(head))
    d_hidden, d_head = jax.lax.fori_loop(0, _blocks(plan, head), block, carry)
    return d_hidden.astype(hidden.dtype), d_head, None


_logprobs.defvjp(_forward, _backward)


def _offset(plan, head):
    """Columns before this part of the vocabulary."""
    return 0 if plan.axis is None else jax.lax.axis_index(plan.axis) * head.shape[1]


def _blocks(plan, head):
    return -(-head.shape[1] // plan.columns)


def _begin(plan, head, index):
    """First column of a block; the last block ends with the head."""
    return jnp.minimum(index * plan.columns, head.shape[1] - plan.columns)


def _block(plan, head, index, dtype):
    """Columns of the head [D,v] and their numbers i32[v] in this part; -2^31 where a column does not count."""
    begin = _begin(plan, head, index)
    column = begin + jnp.arange(plan.columns)
    counts = column >= index * plan.columns
    if plan.vocabulary is not None:
        counts &= column < plan.vocabulary - _offset(plan, head)
    weights = jax.lax.dynamic_slice_in_dim(head, begin, plan.columns, axis=1).astype(dtype)
    return weights, jnp.where(counts, column, NO_COLUMN)


def _logits(plan, x, weights, column):
    """f32[c,v] at the temperature."""
    logits = jnp.matmul(x, weights, preferred_element_type=jnp.float32) / plan.temperature
    return jnp.where(column == NO_COLUMN, LOWEST, logits)


def _shift(total, moment, by):
    """sum e^x and sum e^x x after x -> x + by."""
    scale = jnp.exp(by)
    return scale * total, scale * (moment + total * by)


def _over_parts(plan, largest, total, moment, chosen):
    """The sums over all parts of the vocabulary."""
    if plan.axis is None:
        return largest, total, moment, chosen
    new = jax.lax.pmax(largest, plan.axis)
    total, moment = _shift(total, moment, largest - new)
    return new, *(jax.lax.psum(x, plan.axis) for x in (total, moment, chosen))
