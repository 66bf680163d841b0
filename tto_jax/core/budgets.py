"""Where a thinking trace is cut, and how much each cut counts."""

import itertools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core.types import Array, pytree

PRIORS = ("uniform", "linear", "base")


@pytree
class BudgetSchedule:
    """S increasing token budgets b_j and their prior P_j (arXiv 2505.13438).

    S is static (a shape); tokens and weights are array leaves, so budgets that change every step compile nothing.
    Where delimiters cut the trace, there are weights but no tokens.
    """

    tokens: Array | None  # i32[S], or None
    weights: Array  # f32[S], non-negative, sum 1

    @classmethod
    def from_prior(cls, tokens: Sequence[int], prior: str | Sequence[float] = "uniform") -> "BudgetSchedule":
        """Budgets with a named prior (`uniform` 1/S, `linear` b_j / sum b, `base` one-hot on the last) or S weights.

        Weights are normalised to sum 1. Raises ValueError for budgets that do not increase and for a bad prior.
        """
        budgets = _check_tokens(tokens)
        if isinstance(prior, str):
            if prior not in PRIORS:
                raise ValueError(f"prior={prior!r} is unknown: choose one of {PRIORS}, or give S non-negative weights")
            size = len(budgets)
            weights = {"uniform": np.ones(size), "linear": budgets, "base": np.eye(size)[-1]}[prior]
        else:
            weights = np.asarray(prior)
        if np.shape(weights) != budgets.shape:
            raise ValueError(
                f"prior={prior!r} has shape {np.shape(weights)}, budgets have {budgets.shape}: "
                f"give one weight a budget, or one of {PRIORS}"
            )
        return cls(tokens=jnp.asarray(budgets, jnp.int32), weights=_normalise(weights))

    @classmethod
    def from_weights(cls, weights: Sequence[float]) -> "BudgetSchedule":
        """S weights without token budgets, for traces cut at delimiters. Raises ValueError for bad weights."""
        return cls(tokens=None, weights=_normalise(weights))

    @property
    def size(self) -> int:
        """S, the number of budgets."""
        return self.weights.shape[-1]

    @property
    def tail(self) -> jax.Array:
        """tail[s] = sum_{j>=s} P_j, f32[S]."""
        return jnp.cumsum(self.weights[::-1])[::-1]


def exponential(last: int, size: int, ratio: float = 2.0) -> tuple[int, ...]:
    """S budgets up to `last` tokens, each `ratio` times the one before: 1000, 2000, 4000, 8000.

    Raises ValueError for a ratio that is not above 1, or budgets that would fall together.
    """
    if size < 1 or not ratio > 1:
        raise ValueError(f"size={size}, ratio={ratio}: at least 1 budget, and a ratio above 1, such as 2.0")
    found = tuple(round(last / ratio**k) for k in reversed(range(size)))
    if found[0] < 1 or any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"last={last}, size={size}, ratio={ratio} give {found}: choose fewer budgets or a smaller one")
    return found


def uniform(last: int, size: int) -> tuple[int, ...]:
    """S budgets up to `last` tokens at even distances: 2000, 4000, 6000, 8000.

    Raises ValueError for budgets that would fall together.
    """
    if not 1 <= size <= last:
        raise ValueError(f"last={last}, size={size}: at least 1 budget, and at most one a token")
    return tuple(round(last * k / size) for k in range(1, size + 1))


def draw(key: Array, schedule: BudgetSchedule, last: int) -> BudgetSchedule:
    """Budgets for one step: the last one stays, the S - 1 before it are drawn below it; weights stay with the columns.

    Every set of S - 1 is equally likely, and none compiles anything. key: key[]. last: static, tokens of the last one.
    """
    below = jax.random.choice(key, last - 1, (schedule.size - 1,), replace=False) + 1
    return BudgetSchedule(tokens=jnp.append(jnp.sort(below), last).astype(jnp.int32), weights=schedule.weights)


def _check_tokens(tokens: Sequence[int]) -> np.ndarray:
    budgets = np.asarray(tokens)
    if budgets.ndim != 1 or budgets.size == 0 or not np.issubdtype(budgets.dtype, np.integer):
        raise ValueError(f"tokens={tokens!r}: budgets are a non-empty sequence of integers, such as (2000, 4000)")
    if budgets[0] < 1 or np.any(np.diff(budgets) <= 0):
        raise ValueError(
            f"tokens={tuple(budgets.tolist())}: budgets must be positive and strictly increase, such as (2000, 4000)"
        )
    return budgets


def _normalise(weights: Sequence[float]) -> jax.Array:
    values = np.asarray(weights, np.float64)
    rule = "weights are one finite, non-negative number a budget, not all zero, such as (1, 2, 1)"
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"weights={weights!r} have shape {values.shape}: {rule}")
    if not np.all(np.isfinite(values)) or np.any(values < 0) or not values.sum() > 0:
        raise ValueError(f"weights={values.tolist()}: {rule}")
    return jnp.asarray(values / values.sum(), jnp.float32)


def forks_at_budgets(length: Array, schedule: BudgetSchedule) -> jax.Array:
    """Forks i32[..., S] of traces with length i32[...]: the budget, or the whole trace where it ended earlier."""
    if schedule.tokens is None:
        raise ValueError("schedule.tokens is None: budgets cut a trace only if they have tokens; use from_prior")
    return jnp.minimum(jnp.asarray(length)[..., None], schedule.tokens).astype(jnp.int32)


def block_mask(forks: Array) -> jax.Array:
    """bool[..., S] of forks i32[..., S]: True where the block has tokens, fork[s] > fork[s-1] with fork[-1] = 0."""
    forks = jnp.asarray(forks)
    previous = jnp.concatenate([jnp.zeros_like(forks[..., :1]), forks[..., :-1]], axis=-1)
    return forks > previous


def block_of_token(forks: Array, num_tokens: int) -> jax.Array:
    """Block index i32[num_tokens] of every token of one trace; S at and beyond the last fork.

    The 0-based token t lies in block s if fork[s-1] <= t < fork[s]. forks: i32[S], non-decreasing.
    """
    chex.assert_rank(forks, 1)
    return jnp.sum(jnp.arange(num_tokens)[:, None] >= jnp.asarray(forks)[None, :], axis=-1, dtype=jnp.int32)


def block_to_tokens(values: Array, forks: Array, num_tokens: int) -> jax.Array:
    """Spread one value a block, f32[S], over the tokens of one trace: f32[num_tokens], 0 beyond the last fork.

    One select a block, the last one innermost: exact, and one vectorised pass where a gather or a sum over S is not.
    """
    chex.assert_rank([values, forks], 1)
    chex.assert_equal_shape([values, forks])
    forks, values, token = jnp.asarray(forks), jnp.asarray(values), jnp.arange(num_tokens)
    spread = jnp.zeros(num_tokens, values.dtype)
    for s in reversed(range(values.shape[0])):
        spread = jnp.where(token < forks[s], values[s], spread)
    return spread
