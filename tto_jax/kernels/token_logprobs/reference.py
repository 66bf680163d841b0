"""The specification: all logits at once. For tests and small shapes."""

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array


def token_logprobs(
    hidden: Array,
    head: Array,
    target: Array,
    temperature: float,
    vocabulary_axis: str | None = None,
    vocabulary: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """hidden [M,D], head [D,V], target i32[M] -> log-prob f32[M] of the target and entropy f32[M] at a temperature.

    The product is in hidden's dtype, accumulated in float32; the head's gradient comes in the head's dtype. Inside a
    `shard_map` over `vocabulary_axis` the head is one part of the vocabulary, the targets count from its start.
    Columns at and beyond `vocabulary` (counted over all parts) are padding: their logit is -inf.
    """
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32) / temperature
    first = 0 if vocabulary_axis is None else jax.lax.axis_index(vocabulary_axis) * logits.shape[-1]
    column = first + jnp.arange(logits.shape[-1])
    real = column < vocabulary if vocabulary is not None else jnp.ones(column.shape, bool)
    logits = jnp.where(real, logits, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    total = lambda x: jnp.sum(x, axis=-1)  # noqa: E731
    if vocabulary_axis is not None:
        largest = jax.lax.pmax(largest, vocabulary_axis)
        total = lambda x: jax.lax.psum(jnp.sum(x, axis=-1), vocabulary_axis)  # noqa: E731
    shifted = logits - largest[:, None]
    logprobs = shifted - jnp.log(total(jnp.exp(shifted)))[:, None]
    logprob = total(jnp.where(column == target[:, None], logprobs, 0.0))
    finite = jnp.where(real, logprobs, 0.0)  # 0 log 0 = 0, in the gradient too
    return logprob, -total(jnp.where(real, jnp.exp(finite), 0.0) * finite)
