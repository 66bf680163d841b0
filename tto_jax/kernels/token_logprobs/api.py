"""The only door to the op."""

import jax

from tto_jax.core.types import Array
from tto_jax.kernels.token_logprobs import chunked, reference

IMPLEMENTATIONS = {"chunked": chunked.token_logprobs, "reference": reference.token_logprobs}


def token_logprobs(
    hidden: Array,
    head: Array,
    target: Array,
    temperature: float = 1.0,
    implementation: str = "chunked",
    vocabulary_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each target token and entropy of its distribution.

    Args:
      hidden: f32 or bf16 [M,D]. head: [D,V]. target: i32[M].
      temperature: the one that the sampler used, positive.
      implementation: `chunked` (no [M,V] array, forward or backward) or `reference`.
      vocabulary_axis: the mesh axis that splits the vocabulary, inside a `shard_map`; head is then [D, V / parts].

    Returns:
      logprob f32[M], entropy f32[M] in nats.

    Raises:
      ValueError: unknown implementation, shapes that do not fit, temperature not positive.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {tuple(IMPLEMENTATIONS)}")
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0] or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head.shape}, target {target.shape}: they must be [M,D], [D,V] and [M]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: log-probs need a positive temperature, such as 1.0")
    return IMPLEMENTATIONS[implementation](hidden, head, target, temperature, vocabulary_axis)
