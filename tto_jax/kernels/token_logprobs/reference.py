"""The specification: all logits at once. For tests and small shapes."""

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array


def token_logprobs(
    hidden: Array, head: Array, target: Array, temperature: float, vocabulary_axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """hidden [M,D], head [D,V], target i32[M] -> log-prob f32[M] of the target and entropy f32[M] at a temperature.

    The product is in hidden's dtype, accumulated in float32; the head's gradient comes in the head's dtype. Inside a
    `shard_map` over `vocabulary_axis` the head is one part of the vocabulary, the targets count from its start.
    """
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32) / temperature
    if vocabulary_axis is not None:
        return _over_parts(logits, target, vocabulary_axis)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    return jnp.take_along_axis(logprobs, target[:, None], axis=-1)[:, 0], entropy


def _over_parts(logits, target, axis):
    """As above of logits [M, V / parts]: sums over the parts, shifted by the largest logit of all."""
    total = lambda x: jax.lax.psum(jnp.sum(x, axis=-1), axis)  # noqa: E731
    largest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), axis)
    shifted = logits - largest[:, None]
    log_sum = jnp.log(total(jnp.exp(shifted)))
    column = jax.lax.axis_index(axis) * logits.shape[-1] + jnp.arange(logits.shape[-1])
    logprob = total(jnp.where(column == target[:, None], shifted, 0.0)) - log_sum
    logprobs = shifted - log_sum[:, None]
    return logprob, -total(jnp.exp(logprobs) * logprobs)
