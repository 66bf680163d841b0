"""The specification: all logits at once. For tests and small shapes."""

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array


def token_logprobs(hidden: Array, head: Array, target: Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """hidden [M,D], head [D,V], target i32[M] -> log-prob f32[M] of the target and entropy f32[M] at a temperature.

    The product is in hidden's dtype, accumulated in float32; the head's gradient comes in the head's dtype.
    """
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32) / temperature
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    return jnp.take_along_axis(logprobs, target[:, None], axis=-1)[:, 0], entropy
