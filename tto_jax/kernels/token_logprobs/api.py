"""The only door to the op."""

import jax

from tto_jax.core.types import Array
from tto_jax.kernels.token_logprobs import chunked, reference

IMPLEMENTATIONS = {"chunked": chunked.token_logprobs, "reference": reference.token_logprobs}
PLATFORMS = {"cpu": "chunked", "tpu": "chunked", "gpu": "chunked", "cuda": "chunked", "rocm": "chunked"}


def choose(platform: str) -> str:
    """The implementation for a platform, as devices name it. Raises ValueError for an unknown one."""
    if platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r} is unknown: choose one of {tuple(PLATFORMS)}")
    return PLATFORMS[platform]


def token_logprobs(
    hidden: Array,
    head: Array,
    target: Array,
    temperature: float = 1.0,
    implementation: str = "chunked",
    vocabulary_axis: str | None = None,
    vocabulary: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each target token and entropy of its distribution.

    Args:
      hidden: f32 or bf16 [M,D]. head: [D,V]. target: i32[M].
      temperature: the one that the sampler used, positive.
      implementation: `chunked` (no [M,V] array, forward or backward) or `reference`.
      vocabulary_axis: the mesh axis that splits the vocabulary, inside a `shard_map`; head is then [D, V / parts].
      vocabulary: the number of real tokens, where the head was padded beyond it so that it can be split: columns from
        there on count as logits of -inf. None: all of V. Targets lie below it.

    Returns:
      logprob f32[M], entropy f32[M] in nats.

    Raises:
      ValueError: unknown implementation, shapes that do not fit, temperature not positive, vocabulary out of range.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {tuple(IMPLEMENTATIONS)}")
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0] or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head.shape}, target {target.shape}: they must be [M,D], [D,V] and [M]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: log-probs need a positive temperature, such as 1.0")
    columns = head.shape[1] * (1 if vocabulary_axis is None else jax.lax.axis_size(vocabulary_axis))
    if vocabulary is not None and not 1 <= vocabulary <= columns:
        raise ValueError(f"vocabulary={vocabulary}: it must be from 1 to {columns}, the columns of the head")
    return IMPLEMENTATIONS[implementation](hidden, head, target, temperature, vocabulary_axis, vocabulary)
