"""Logits and one uniform number -> a token and its log-prob, by a two-level inverse CDF.

`jax.random.categorical` draws a Gumbel for every vocabulary entry; here one uniform a row is enough, and the log-prob
of the distribution that was sampled from (temperature, top-k and top-p included) comes with it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array

BLOCK = 512  # entries a block of the two-level search: about the square root of large vocabularies


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Static sampling options. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: it must be 0 (greedy) or positive, such as 1.0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: it must be 0 (all) or a positive number of entries")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it must lie in (0, 1]; choose 1.0 to keep all")


def sample(
    logits: Array, uniform: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Draw one token of one distribution; vmap over rows.

    Args:
      logits: f32[V]; -inf entries are never drawn.
      uniform: f32[] in [0, 1).
      temperature, top_k, top_p: static, see `SampleConfig`.

    Returns:
      token i32[] and its log-prob f32[] under the renormalised distribution; 0 when greedy.
    """
    options = SampleConfig(temperature, top_k, top_p)
    logits = jnp.asarray(logits, jnp.float32)
    if options.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32), jnp.zeros((), jnp.float32)
    logits = filter_logits(logits / options.temperature, options.top_k, options.top_p)
    weights = jnp.exp(logits - jnp.max(logits))
    token, total = _inverse_cdf(weights, uniform)
    return token, logits[token] - jnp.max(logits) - jnp.log(total)


def filter_logits(logits: Array, top_k: int, top_p: float) -> jax.Array:
    """Set everything outside the top-k entries, or outside the smallest set of mass >= top_p, to -inf. f32[V]."""
    size = logits.shape[-1]
    if (top_k == 0 or top_k >= size) and top_p >= 1:
        return logits
    # Ranks, not a threshold: ties are cut by index, so exactly k entries stay.
    order = jnp.argsort(-logits, stable=True)
    rank = jnp.zeros(size, jnp.int32).at[order].set(jnp.arange(size, dtype=jnp.int32))
    keep = rank < (top_k or size)
    if top_p < 1:
        ordered = jax.nn.softmax(jnp.where(keep, logits, -jnp.inf))[order]
        mass_before = jnp.cumsum(ordered) - ordered
        keep &= (mass_before < top_p)[rank]
    return jnp.where(keep, logits, -jnp.inf)


def _inverse_cdf(weights, uniform):
    """Index of the first entry whose cumulative weight exceeds uniform * total, and the total."""
    size = weights.shape[-1]
    block = min(BLOCK, size)
    weights = jnp.pad(weights, (0, -size % block)).reshape(-1, block)
    per_block = weights.sum(axis=-1)
    total = per_block.sum()
    chosen, before = _search(per_block, uniform * total)
    index, _ = _search(weights[chosen], uniform * total - before)
    return (chosen * block + index).astype(jnp.int32), total


def _search(weights, target):
    """First index with cumulative weight > target, and the weight before it; rounding never picks a zero weight."""
    cumulative = jnp.cumsum(weights)
    positive = weights > 0
    index = jnp.argmax((cumulative > target) & positive)
    last = weights.shape[-1] - 1 - jnp.argmax(positive[::-1])
    index = jnp.where(jnp.any((cumulative > target) & positive), index, last)
    return index, cumulative[index] - weights[index]
