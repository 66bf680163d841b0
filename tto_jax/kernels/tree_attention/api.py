"""The only door to the op."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from tto_jax.core.types import Array, TokenTree
from tto_jax.kernels.tree_attention import blocked, gpu, pallas_tpu, reference


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to compute the op."""

    plan: Callable[[TokenTree], Any]  # rows -> what it reads of them, arrays whose first dimension is N
    attend: Callable[[Array, Array, Array, Any], jax.Array]  # q, k, v, what `plan` made -> out


IMPLEMENTATIONS = {
    "reference": Implementation(reference.plan, reference.tree_attention),
    "blocked": Implementation(blocked.plan, blocked.tree_attention),
    "pallas_tpu": Implementation(pallas_tpu.plan, pallas_tpu.tree_attention),
    # The kernels of pallas_tpu run by JAX's interpreter: slow, on any platform, for tests.
    "pallas_tpu_interpret": Implementation(pallas_tpu.plan, pallas_tpu.interpreted),
    "gpu": Implementation(gpu.plan, gpu.tree_attention),
    "gpu_interpret": Implementation(gpu.plan, gpu.interpreted),
}
DEFAULTS = {"tpu": "pallas_tpu", "gpu": "gpu", "cpu": "blocked"}  # by platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What an implementation reads of rows [N,L], made once for all layers; it is split as the rows are."""

    arrays: Any  # the first dimension of each is N
    implementation: str = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})  # L


def choose(platform: str) -> str:
    """The implementation for a platform, such as `mesh.devices.flat[0].platform`; ValueError if there is none."""
    if platform not in DEFAULTS:
        raise ValueError(f"platform={platform!r} has no tree_attention of its own: choose one of {tuple(DEFAULTS)}")
    return DEFAULTS[platform]


def plan(rows: TokenTree, implementation: str = "reference") -> Plan:
    """What `implementation` needs to know of rows; `tree_attention` takes it in place of them.

    A model makes it once, outside of its loop over layers. rows: tree, position, branch, fork i32[N,L].
    Raises ValueError for an unknown implementation, or rows it does not support.
    """
    return Plan(_find(implementation).plan(rows), implementation, rows.tree.shape[1])


def tree_attention(
    q: Array, k: Array, v: Array, rows: TokenTree | Plan, implementation: str = "reference"
) -> jax.Array:
    """Attention of packed rows: each token sees its own branch so far and the trunk before its fork.

    Args:
      q: [N,L,H,D]. k, v: [N,L,K,D], K divides H (grouped KV heads).
      rows: tree, position, branch, fork i32[N,L], or the `plan` of them; padding (tree = -1) sees only padding, itself
        included.
      implementation: one of `IMPLEMENTATIONS`; `choose` knows the one for a platform. The plan must be of the same one.

    Returns:
      [N,L,H,D] in q's dtype.

    Raises:
      ValueError: unknown implementation, another one's plan, shapes that do not fit or that it does not support.
    """
    found = _find(implementation)
    of_rows = rows if isinstance(rows, Plan) else plan(rows, implementation)
    if of_rows.implementation != implementation:
        raise ValueError(f"implementation={implementation!r} cannot use the plan of {of_rows.implementation!r}")
    number = jax.tree.leaves(of_rows.arrays)[0].shape[0]
    fits = q.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] == (number, of_rows.length)
    if not (fits and q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0):
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}, rows {(number, of_rows.length)}: they must be "
            "[N,L,H,D], [N,L,K,D], [N,L,K,D] and [N,L], K a divisor of H"
        )
    return found.attend(q, k, v, of_rows.arrays)


def _find(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {tuple(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation]
