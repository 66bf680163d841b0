"""Logits and one uniform number -> a token and its log-prob, by a two-level inverse CDF.

`jax.random.categorical` draws a Gumbel for every vocabulary entry; here one uniform a row is enough, and the log-prob
of the distribution that was sampled from (temperature, top-k and top-p included) comes with it. The logits are read
twice: for their largest, and for the sums of blocks; then one block of them once more.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array

BLOCKS = (64, 512)  # entries a block of the two-level search, at least and at most


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Static sampling options. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary.

    renormalise says what top-k and top-p do to the log-prob. True, the default: it is that of the distribution sampled
    from, in which the kept entries sum to 1. False: it is that of the whole vocabulary at this temperature, which is
    what a trainer recomputes that knows of no filter; a ratio of the two is then 1 for an unchanged model.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    renormalise: bool = True

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: it must be 0 (greedy) or positive, such as 1.0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: it must be 0 (all) or a positive number of entries")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it must lie in (0, 1]; choose 1.0 to keep all")


def sample(
    logits: Array,
    uniform: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    renormalise: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Draw one token of each distribution; the vocabulary comes first, any batch after it.

    Args:
      logits: f32[V, ...]; -inf entries are never drawn.
      uniform: f32[...] in [0, 1).
      temperature, top_k, top_p, renormalise: static, see `SampleConfig`.

    Returns:
      token i32[...] and its log-prob f32[...], as `renormalise` says; 0 when greedy.
    """
    options = SampleConfig(temperature, top_k, top_p, renormalise)
    logits = jnp.asarray(logits, jnp.float32)
    if options.temperature == 0:
        token = jnp.argmax(logits, axis=0).astype(jnp.int32)
        return token, jnp.zeros(token.shape, jnp.float32)
    whole = logits if options.temperature == 1 else logits / options.temperature
    kept = filter_logits(whole, options.top_k, options.top_p)
    token, largest, total = _inverse_cdf(kept, jnp.asarray(uniform))
    if not options.renormalise and kept is not whole:
        total = jnp.sum(jnp.exp(whole - largest), axis=0)  # the largest entry is always kept
    chosen = jnp.take_along_axis(kept, token[None], axis=0)[0]
    return token, chosen - largest - jnp.log(total)


def filter_logits(logits: Array, top_k: int, top_p: float) -> jax.Array:
    """Set everything outside the top-k entries, or outside the smallest set of mass >= top_p, to -inf. f32[V, ...]."""
    size = logits.shape[0]
    if (top_k == 0 or top_k >= size) and top_p >= 1:
        return logits
    # Ranks, not a threshold: ties are cut by index, so exactly k entries stay.
    order = jnp.argsort(-logits, axis=0, stable=True)
    rank = jnp.argsort(order, axis=0, stable=True)
    keep = rank < (top_k or size)
    if top_p < 1:
        ordered = jnp.take_along_axis(jax.nn.softmax(jnp.where(keep, logits, -jnp.inf), axis=0), order, axis=0)
        mass_before = jnp.cumsum(ordered, axis=0) - ordered
        keep &= jnp.take_along_axis(mass_before < top_p, rank, axis=0)
    return jnp.where(keep, logits, -jnp.inf)


def block_size(size: int) -> int:
    """Entries a block, about the root of the vocabulary: if it can be a divisor of it, so that nothing is padded."""
    least, most = BLOCKS
    if size <= most:
        return size
    divisors = [n for n in range(least, most + 1) if size % n == 0]
    return min(divisors or [most], key=lambda n: abs(n * n - size))


def _inverse_cdf(logits, uniform):
    """Index of the first entry whose cumulative weight exceeds uniform * total, the largest logit, the total weight."""
    block = block_size(logits.shape[0])
    largest = jnp.max(logits, axis=0)
    padded = jnp.pad(logits, [(0, -len(logits) % block)] + [(0, 0)] * uniform.ndim, constant_values=-jnp.inf)
    blocks = padded.reshape(-1, block, *uniform.shape)
    per_block = jnp.sum(jnp.exp(blocks - largest), axis=1)
    total = jnp.sum(per_block, axis=0)
    chosen, before = _search(per_block, uniform * total)
    inside = jnp.take_along_axis(blocks, chosen[None, None], axis=0)[0]
    index, _ = _search(jnp.exp(inside - largest), uniform * total - before)
    return (chosen * block + index).astype(jnp.int32), largest, total


def _search(weights, target):
    """First index with cumulative weight > target, and the weight before it; rounding never picks a zero weight."""
    cumulative = jnp.cumsum(weights, axis=0)
    positive = weights > 0
    found = (cumulative > target) & positive
    last = len(weights) - 1 - jnp.argmax(positive[::-1], axis=0)
    index = jnp.where(jnp.any(found, axis=0), jnp.argmax(found, axis=0), last)
    at = lambda x: jnp.take_along_axis(x, index[None], axis=0)[0]  # noqa: E731
    return index, at(cumulative) - at(weights)
