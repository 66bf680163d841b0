"""The regression baseline of every block, V = a V1 + b V2 + c: coefficients by ridge least squares on earlier batches.

V2 leaves its own trace out and the coefficients come from other problems, so the baseline adds no bias.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core.types import Array, pytree


@pytree
class NormalEquations:
    """Sums over the traces that reached block s, of x = (V1, V2, 1) and the return R."""

    gram: Array  # f32[S,3,3], sum of x x^T
    moment: Array  # f32[S,3], sum of x R


def normal_equations(prefix: Array, group: Array, returns: Array, reached: Array) -> NormalEquations:
    """Of a batch: V1, V2 and R f32[...,S], reached bool[...,S]."""
    chex.assert_equal_shape([prefix, group, returns, reached])
    size = returns.shape[-1]
    x = jnp.stack([prefix, group, jnp.ones_like(prefix)], axis=-1).reshape(-1, size, 3)
    weight, returns = (jnp.asarray(y, x.dtype).reshape(-1, size) for y in (reached, returns))
    add = lambda formula, *y: jnp.einsum(formula, *y, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    return NormalEquations(gram=add("nsi,nsj,ns->sij", x, x, weight), moment=add("nsi,ns,ns->si", x, returns, weight))


def nothing(size: int) -> NormalEquations:
    """Of no batch, on the host in float64; S = size."""
    return NormalEquations(gram=np.zeros((size, 3, 3)), moment=np.zeros((size, 3)))


def as_lists(sums: NormalEquations) -> dict[str, list]:
    """The sums' fields as nested lists of numbers, for JSON: `NormalEquations(**lists)` is the same to the bit."""
    return {name: np.asarray(value).tolist() for name, value in vars(sums).items()}


def accumulate(before: NormalEquations, batch: NormalEquations, decay: float) -> NormalEquations:
    """decay * before + batch, on the host in float64: a batch k steps back counts decay^k."""
    add = lambda x, y: decay * np.asarray(x, np.float64) + np.asarray(y, np.float64)  # noqa: E731
    return NormalEquations(gram=add(before.gram, batch.gram), moment=add(before.moment, batch.moment))


def coefficients(sums: NormalEquations, ridge: float) -> np.ndarray:
    """a, b, c f32[...,S,3]: the least of sum (R - a V1 - b V2 - c)^2 + ridge |(a, b, c) - BRPO's|^2.

    BRPO's are (s / S, (S - s) / S, 0): what holds before the first batch, and where a block tells nothing.
    """
    gram, moment = np.asarray(sums.gram, np.float64), np.asarray(sums.moment, np.float64)
    size = moment.shape[-2]
    share = np.arange(size) / size
    brpo = np.stack([share, 1 - share, np.zeros(size)], axis=-1)
    solved = np.linalg.solve(gram + ridge * np.eye(3), (moment + ridge * brpo)[..., None])
    return solved[..., 0].astype(np.float32)
