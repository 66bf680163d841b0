"""What a baseline V leaves of the return's variance: Var[R - V] / Var[R] of every block (arXiv 2505.13438, Fig. 3).

All R - V are linear in z = (R, V1, V2, V2 of the others, 1), so the moments of z, sums over the traces of each problem,
say everything, also of the problems that a resample draws.

With its own trace in the mean, R - V2 is (1 - 1/G) times what it is without: a smaller step in the same direction. Such
a share, (1 - 1/G)^2 of the other, is no better a baseline; those that leave it out are to be compared.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core import advantages, budgets, credit, regression
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.regression import NormalEquations
from tto_jax.core.types import Array

RETURN, PREFIX, GROUP, OTHERS, ONE = range(5)  # of z
REGRESSORS = np.array([PREFIX, OTHERS, ONE])
BASELINES = ("prefix", "group", "group_leave_one_out", "brpo", "brpo_leave_one_out", "regression")
REFERENCE = "group_leave_one_out"  # what the others are compared with
ROUNDING = 1e-6  # of E[R^2]: less of a variance is rounding of float32 moments


def moments(correct: Array, forks: Array, schedule: BudgetSchedule, decay: float = 0.5) -> jax.Array:
    """Sums of z z^T over the traces of a problem that reached block s, f32[B,S,5,5].

    Scores of answers that share a fork are pooled, as in `credit.baselines`.

    Args:
      correct: f32[B,G,S,A]; forks: i32[B,G,S], in tokens; schedule: prior over the S cuts.
      decay: lambda of the prefix baseline.
    """
    chex.assert_rank([correct, forks], [4, 3])
    found = credit.baselines(correct, forks, schedule, decay)
    others = jax.vmap(lambda returns: advantages.group_baseline(returns, leave_one_out=True))(found["return"])
    z = [found["return"], found["v1"], found["v2"], others, jnp.ones_like(others)]
    z = jnp.where(budgets.block_mask(jnp.asarray(forks))[..., None], jnp.stack(z, axis=-1), 0.0)
    return jnp.einsum("bgsi,bgsj->bsij", z, z, precision=jax.lax.Precision.HIGHEST)


def reached(sums: np.ndarray) -> np.ndarray:
    """Traces that reached each block, f64[...,S] of moments [...,H,S,5,5] of H parts of the problems."""
    return np.asarray(sums, np.float64)[..., ONE, ONE].sum(axis=-2)


def return_variance(sums: np.ndarray) -> np.ndarray:
    """Var[R] over all traces that reached each block, f64[...,S] of moments [...,H,S,5,5]; NaN where there is none."""
    return _variance(np.asarray(sums, np.float64), np.eye(5)[RETURN][None, None])


def residuals(sums: np.ndarray, ridge: float) -> dict[str, np.ndarray]:
    """Var[R - V] / Var[R] of each of `BASELINES`, f64[...,S]; NaN where R does not vary. On the host, in float64.

    `group` is V2, `brpo` the mix of V1 and V2, with and without the trace itself in V2; `prefix`, V1, has the trace's
    own earlier scores alone. `regression` is a V1 + b V2 of the others + c, fitted to one half of the problems and
    measured on the other, both ways.

    Args:
      sums: moments [...,2,S,5,5], summed over each half of the problems.
      ridge: of the fit, see `regression.coefficients`.
    """
    sums = np.asarray(sums, np.float64)
    variance = return_variance(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = {name: _variance(sums, w) / variance for name, w in _weights(sums, ridge).items()}
        known = variance > ROUNDING * sums[..., RETURN, RETURN].sum(axis=-2) / reached(sums)
    return {name: np.where(known, share, np.nan) for name, share in shares.items()}


def _weights(sums, ridge) -> dict[str, np.ndarray]:
    """w of R - V = w z, f64[...,1 or 2,S,5]: one for both halves, or one for each."""
    size = sums.shape[-3]
    own = np.arange(size) / size  # share of V1 in BRPO

    def minus(**of):
        found = np.zeros((1, size, 5))
        found[..., RETURN] = 1
        for name, share in of.items():
            found[..., {"prefix": PREFIX, "group": GROUP, "others": OTHERS}[name]] = -share
        return found

    return {
        "prefix": minus(prefix=1),
        "group": minus(group=1),
        "group_leave_one_out": minus(others=1),
        "brpo": minus(prefix=own, group=1 - own),
        "brpo_leave_one_out": minus(prefix=own, others=1 - own),
        "regression": _fitted(sums, ridge),
    }


def _fitted(sums, ridge):
    moment = sums[..., REGRESSORS, RETURN]
    coef = regression.coefficients(NormalEquations(sums[..., REGRESSORS[:, None], REGRESSORS], moment), ridge)
    found = np.zeros((*moment.shape[:-1], 5))
    found[..., RETURN] = 1
    found[..., REGRESSORS] = -coef[..., ::-1, :, :]  # of the other half
    return found


def _variance(sums, w):
    """Of w z over the traces of both parts."""
    square = np.einsum("...hsi,...hsij,...hsj->...s", w, sums, w, optimize=True)
    total = np.einsum("...hsi,...hsi->...s", w, sums[..., ONE])
    with np.errstate(invalid="ignore", divide="ignore"):
        number = reached(sums)
        return square / number - (total / number) ** 2
