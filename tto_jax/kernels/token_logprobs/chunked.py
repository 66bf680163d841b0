"""Chunks of tokens under a scan, recomputed in the backward: temporaries are bounded by one chunk of logits."""

import functools

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array
from tto_jax.kernels.token_logprobs import reference

CHUNK_LOGITS = 2**25  # logits a chunk, 128 MiB in float32; a backward holds about three such arrays
LEAST_CHUNK = 128  # tokens


def chunk_tokens(vocabulary: int) -> int:
    """Tokens a chunk, for a vocabulary of this size."""
    return max(LEAST_CHUNK, CHUNK_LOGITS // vocabulary)


def token_logprobs(
    hidden: Array,
    head: Array,
    target: Array,
    temperature: float,
    vocabulary_axis: str | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As the reference. The head's gradient accumulates in the head's dtype over the scan: give it in float32."""
    tokens, width = hidden.shape
    chunk = chunk or chunk_tokens(head.shape[1])
    body = _chunk(temperature, vocabulary_axis)
    if tokens <= chunk:
        return body(hidden, head, target)
    pad = -tokens % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, width)
    target = jnp.pad(target, (0, pad)).reshape(-1, chunk)
    _, (logprob, entropy) = jax.lax.scan(lambda carry, xs: (carry, body(xs[0], head, xs[1])), None, (hidden, target))
    return logprob.reshape(-1)[:tokens], entropy.reshape(-1)[:tokens]


def _chunk(temperature, vocabulary_axis):
    function = functools.partial(reference.token_logprobs, temperature=temperature, vocabulary_axis=vocabulary_axis)
    return jax.checkpoint(function)
