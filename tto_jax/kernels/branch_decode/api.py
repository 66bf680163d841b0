"""The only door to the op."""

from collections.abc import Sequence

import jax

from tto_jax.core.types import Array
from tto_jax.kernels.branch_decode import reference
from tto_jax.kernels.branch_decode.reference import CachePart

IMPLEMENTATIONS = {"reference": reference.branch_decode}


def branch_decode(q: Array, parts: Sequence[CachePart], implementation: str = "reference") -> jax.Array:
    """Attention of M new tokens over the union of cache parts.

    Args:
      q: [M,H,D], ordered so that every part's rows serve consecutive queries.
      parts: such as the prompt (a row a problem), the trace (a row a trace), the own branch (a row a branch).
      implementation: `reference`.

    Returns:
      [M,H,D] in q's dtype.

    Raises:
      ValueError: unknown implementation, or a part whose rows do not divide the queries.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {tuple(IMPLEMENTATIONS)}")
    for part in parts:
        if q.shape[0] % part.k.shape[0] or q.shape[1] % part.k.shape[1] or q.shape[2] != part.k.shape[2]:
            raise ValueError(
                f"q {q.shape} and a part with k {part.k.shape}: rows must divide the queries, KV heads the "
                "heads, and head sizes agree"
            )
    return IMPLEMENTATIONS[implementation](q, parts)
