"""Budget-relative advantages of one problem (arXiv 2505.13438, BRPO); vmap over problems.

Scores r[G, S] are mean scores of the answers of trace g at budget s; returns are R[g,s] = sum_{j>=s} P_j r[g,j].
Sums over S are contracted at full precision: accelerators would round the products to bf16 otherwise.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core.types import Array

STD_EPSILON = 1e-6  # as in verl, TRL and Tunix


def budget_return(scores: Array, weights: Array) -> jax.Array:
    """R[g,s] = sum_{j>=s} P_j r[g,j]. scores f32[G,S], weights f32[S] -> f32[G,S]."""
    chex.assert_rank([scores, weights], [2, 1])
    return jnp.cumsum((scores * weights)[:, ::-1], axis=-1)[:, ::-1]


def prefix_baseline(scores: Array, tail: Array, decay: float) -> jax.Array:
    """V1[g,s] = tail[s] * sum_{j<s} decay^(s-j) r[g,j] / sum_{j<s} decay^(s-j), 0 for s = 0.

    scores f32[G,S], tail f32[S] -> f32[G,S].
    """
    chex.assert_rank([scores, tail], [2, 1])
    size = scores.shape[-1]
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    kernel = np.where(distance > 0, float(decay) ** np.maximum(distance, 1), 0.0)
    kernel /= np.maximum(kernel.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    mean = jnp.einsum("gj,sj->gs", scores, kernel.astype(np.float32), precision=jax.lax.Precision.HIGHEST)
    return tail * mean


def group_mean(values: Array, leave_one_out: bool = False, mask: Array | None = None) -> jax.Array:
    """Mean over the group, of all traces or of the others; 0 where nobody is left.

    values f32[G,S], mask bool[G,S] (who counts) -> f32[G,S].
    """
    chex.assert_rank(values, 2)
    count = jnp.ones_like(values) if mask is None else mask.astype(values.dtype)
    values = jnp.where(count > 0, values, 0.0)  # whoever does not count may hold anything, NaN included
    own = count if leave_one_out else jnp.zeros_like(count)
    number = count.sum(axis=0, keepdims=True) - own
    total = (values * count).sum(axis=0, keepdims=True) - values * own
    return jnp.where(number > 0, total / jnp.maximum(number, 1), 0.0)


def group_baseline(returns: Array, leave_one_out: bool = False) -> jax.Array:
    """V2[g,s] = mean_g R[g,s]; 0 for a group of one (as released), where the mean would cancel the return."""
    if returns.shape[0] == 1:
        return jnp.zeros_like(returns)
    return group_mean(returns, leave_one_out)


def brpo_baseline(prefix: Array, group: Array) -> jax.Array:
    """V[g,s] = (s V1[g,s] + (S-s) V2[g,s]) / S (BRPO): early blocks lean on the group, late ones on their prefix."""
    chex.assert_equal_shape([prefix, group])
    size = prefix.shape[-1]
    block = jnp.arange(size, dtype=prefix.dtype)
    return (block * prefix + (size - block) * group) / size


def regression_baseline(prefix: Array, group: Array, coef: Array) -> jax.Array:
    """V = a V1 + b V2 + c per block, coef f32[S,3].

    Unbiased if coef was fitted on other data and V2 leaves its own trace out.
    """
    chex.assert_rank(coef, 2)
    return coef[:, 0] * prefix + coef[:, 1] * group + coef[:, 2]


def grpo(outcome: Array, leave_one_out: bool = False, std: bool = False) -> jax.Array:
    """Outcome minus the mean of the group (Dr.GRPO), of the others (RLOO), over the sample deviation (GRPO). f32[G]."""
    chex.assert_rank(outcome, 1)
    outcome = (
        outcome - outcome[:1]
    )  # equal outcomes give exact zeros, which a deviation of rounding errors would blow up
    advantage = outcome - group_mean(outcome[:, None], leave_one_out)[:, 0]
    if not std:
        return advantage
    variance = jnp.var(outcome, ddof=1)
    # The inner where keeps the slope of the root at 0 out of the gradient.
    deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return advantage / (deviation + STD_EPSILON)


def same_fork(forks: Array) -> jax.Array:
    """bool[G,S,S]: columns of one trace that are cut at the same token."""
    chex.assert_rank(forks, 2)
    return forks[:, :, None] == forks[:, None, :]


def pool(values: Array, forks: Array, scored: Array) -> jax.Array:
    """Mean over the scored columns that share the fork; 0 where there is none. f32[G,S] -> f32[G,S]."""
    chex.assert_equal_shape([values, forks, scored])
    weight = same_fork(forks) & scored[:, None, :]
    total = jnp.sum(jnp.where(weight, values[:, None, :], 0.0), axis=-1)
    return total / jnp.maximum(weight.sum(axis=-1), 1)


def answer_advantage(correct: Array, forks: Array, scored: Array) -> jax.Array:
    """Score minus the mean over the answers from the same fork; with one answer, over the traces at the same column.

    correct f32[G,S,A], forks i32[G,S], scored bool[G,S] -> f32[G,S,A], 0 where not scored.
    """
    chex.assert_rank(correct, 3)
    mean = correct.mean(axis=-1)
    baseline = pool(mean, forks, scored) if correct.shape[-1] > 1 else group_mean(mean, mask=scored)
    return jnp.where(scored[:, :, None], correct - baseline[:, :, None], 0.0)
