"""The only door to the op."""

import jax

from tto_jax.core.types import Array, TokenTree
from tto_jax.kernels.tree_attention import reference

IMPLEMENTATIONS = {"reference": reference.tree_attention}


def tree_attention(q: Array, k: Array, v: Array, rows: TokenTree, implementation: str = "reference") -> jax.Array:
    """Attention of packed rows: each token sees its own branch so far and the trunk before its fork.

    Args:
      q: [N,L,H,D]. k, v: [N,L,K,D], K divides H (grouped KV heads).
      rows: tree, position, branch, fork i32[N,L]; padding (tree = -1) sees only padding, itself included.
      implementation: `reference`.

    Returns:
      [N,L,H,D] in q's dtype.

    Raises:
      ValueError: unknown implementation, or shapes that do not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {tuple(IMPLEMENTATIONS)}")
    fits = q.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] == rows.tree.shape
    if not (fits and q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0):
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}, rows {rows.tree.shape}: they must be "
            "[N,L,H,D], [N,L,K,D], [N,L,K,D] and [N,L], K a divisor of H"
        )
    return IMPLEMENTATIONS[implementation](q, k, v, rows)
