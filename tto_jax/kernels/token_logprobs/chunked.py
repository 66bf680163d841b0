"""Chunks of tokens under a scan, recomputed in the backward: temporaries are bounded by one chunk of logits."""

import functools

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array
from tto_jax.kernels.token_logprobs import reference

CHUNK = 2048  # tokens


def token_logprobs(hidden: Array, head: Array, target: Array, temperature: float, chunk: int = CHUNK):
    """As the reference. The head's gradient accumulates in the head's dtype over the scan: keep it float32."""
    tokens, width = hidden.shape
    if tokens <= chunk:
        return _chunk(temperature)(hidden, head, target)
    pad = -tokens % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, width)
    target = jnp.pad(target, (0, pad)).reshape(-1, chunk)
    body = _chunk(temperature)
    _, (logprob, entropy) = jax.lax.scan(lambda carry, xs: (carry, body(xs[0], head, xs[1])), None, (hidden, target))
    return logprob.reshape(-1)[:tokens], entropy.reshape(-1)[:tokens]


def _chunk(temperature):
    return jax.checkpoint(functools.partial(reference.token_logprobs, temperature=temperature))
