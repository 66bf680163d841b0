"""What an evaluation reports: accuracy at budgets, anytime and final accuracy, pass@k, maj@k, overthinking, intervals.

Letters: B problems, G traces per problem, S budgets, A answers per fork. Problems are the unit of every bootstrap:
traces and answers of one problem are not independent.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core.types import Array


def accuracy_at_budgets(correct: Array) -> jax.Array:
    """Mean over problems, traces and answers. correct f32[B, G, S, A] in [0, 1] -> f32[S]."""
    chex.assert_rank(correct, 4)
    return jnp.mean(jnp.asarray(correct, jnp.float32), axis=(0, 1, 3))


def anytime_accuracy(accuracy: Array) -> jax.Array:
    """Mean over budgets: the area under the accuracy-budget curve (2505.13438, section 5). f32[..., S] -> f32[...]."""
    return jnp.mean(accuracy, axis=-1)


def final_accuracy(accuracy: Array) -> jax.Array:
    """Accuracy at the last budget. f32[..., S] -> f32[...]."""
    return jnp.asarray(accuracy)[..., -1]


def pass_at_k(n: Array, c: Array, k: int) -> jax.Array:
    """Chance that one of k answers, drawn without replacement from n of which c are right, is right.

    1 - C(n-c, k) / C(n, k), the unbiased estimate of arXiv 2107.03374, eq. 1, as a product of k factors. n, c of one
    shape (or broadcastable), 0 <= c <= n -> f32 of that shape; NaN where n < k. Raises ValueError unless k >= 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    n, c = jnp.asarray(n, jnp.float32), jnp.asarray(c, jnp.float32)
    i = jnp.arange(k, dtype=jnp.float32)
    factors = jnp.maximum((n - c)[..., None] - i, 0) / jnp.maximum(n[..., None] - i, 1)
    return jnp.where(n >= k, 1.0 - jnp.prod(factors, axis=-1), jnp.nan)


def maj_at_k(answers: Array, right: Array, k: int) -> jax.Array:
    """Chance that the most frequent of k answers is the right one.

    The n answers of a problem make n // k groups of k neighbours; each group votes, and the mean over groups is
    returned. Negative ids do not vote (no answer found). A tie counts 1 / (number of tied answers), its expectation if
    broken at random; a group without votes counts 0.

    Args:
      answers: i32[B, n], equal ids for equal answers of a problem.
      right: i32[B], id of the right answer; any other value where none was right.
      k: 1 <= k <= n, else ValueError.

    Returns:
      f32[B].
    """
    chex.assert_rank([answers, right], [2, 1])
    batch, n = answers.shape
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the number of answers, {n}; got {k}.")
    groups = jnp.asarray(answers)[:, : n // k * k].reshape(batch, n // k, k)
    voting = groups >= 0
    votes = jnp.sum((groups[..., :, None] == groups[..., None, :]) & voting[..., None, :], axis=-1)
    votes = jnp.where(voting, votes, 0)
    most = jnp.max(votes, axis=-1, keepdims=True)
    wins = voting & (votes == most)
    winners = jnp.sum(wins, axis=-1) / jnp.maximum(most[..., 0], 1)
    hit = jnp.any(wins & (groups == jnp.asarray(right)[:, None, None]), axis=-1)
    return jnp.mean(jnp.where(hit, 1.0 / jnp.maximum(winners, 1.0), 0.0), axis=-1)


def pooled_accuracy(correct: Array, forks: Array) -> jax.Array:
    """Mean score of all answers that share a fork, per column.

    correct f32[B, G, S, A], forks i32[B, G, S] (tokens) -> f32[B, G, S]. Columns of a trace that ended before their
    budgets hold independent answers of one state; unpooled, their sampling noise would look like a change of mind.
    """
    chex.assert_rank([correct, forks], [4, 3])
    chex.assert_equal_shape([forks, correct[..., 0]])
    forks = jnp.asarray(forks)
    same = (forks[..., :, None] == forks[..., None, :]).astype(jnp.float32)
    total = jnp.sum(jnp.asarray(correct, jnp.float32), axis=-1)  # sums of 0 and 1 are exact, so equal means are equal
    total = jnp.einsum("bgst,bgt->bgs", same, total, precision=jax.lax.Precision.HIGHEST)
    return total / (jnp.sum(same, axis=-1) * correct.shape[-1])


def overthinking_rate(correct: Array, forks: Array) -> jax.Array:
    """Share of traces with an earlier fork whose pooled score is strictly higher than the one at this budget.

    correct f32[B, G, S, A], forks i32[B, G, S] (tokens, not decreasing in S) -> f32[S]; 0 at the first budget.
    """
    pooled = pooled_accuracy(correct, forks)
    forks = jnp.asarray(forks)
    earlier = forks[..., None, :] < forks[..., :, None]
    better = pooled[..., None, :] > pooled[..., :, None]
    return jnp.mean(jnp.any(earlier & better, axis=-1).astype(jnp.float32), axis=(0, 1))


def resample_counts(key: jax.Array, problems: int, resamples: int = 2000) -> jax.Array:
    """How often each problem is drawn in each bootstrap resample: f32[resamples, problems], rows sum to `problems`."""
    drawn = jax.random.randint(key, (resamples, problems), 0, problems)
    return jnp.zeros((resamples, problems), jnp.float32).at[jnp.arange(resamples)[:, None], drawn].add(1.0)


def resampled_means(per_problem: Array, counts: Array) -> jax.Array:
    """Mean over problems of every resample. f32[B, ...], `resample_counts` f32[R, B] -> f32[R, ...].

    One matrix product: trailing axes (budgets, say) are resampled together. The ratio of two calls with the same counts
    is a resampled ratio, NaN or infinite where a resample's denominator is 0.
    """
    chex.assert_rank(counts, 2)
    values = jnp.asarray(per_problem, jnp.float32)
    batch = values.shape[0]
    means = jnp.matmul(counts, values.reshape(batch, -1), precision=jax.lax.Precision.HIGHEST) / batch
    return means.reshape(-1, *values.shape[1:])


def percentile_interval(draws: Array, level: float = 0.95) -> tuple[jax.Array, jax.Array]:
    """Low and high, f32[...], between which the middle `level` of f32[R, ...] lies.

    Draws that are NaN (a ratio with nothing in its denominator) are left out: the interval is then of the resamples in
    which the number exists, NaN if it never does.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1); got {level}.")
    low, high = jnp.nanquantile(draws, jnp.array([(1 - level) / 2, (1 + level) / 2]), axis=0)
    return low, high


def bootstrap_interval(
    per_problem: Array, key: jax.Array, resamples: int = 2000, level: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Percentile bootstrap interval of the mean over problems.

    With few problems the interval is too narrow, by about sqrt(1 - 1/B) and the skew.

    Args:
      per_problem: f32[B, ...], one value a problem: means over traces and answers.
      key: random key, consumed.
      resamples: number of resamples; memory is resamples x B floats.
      level: in (0, 1).

    Returns:
      low and high, f32[...].
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be in (0, 1) and resamples positive; got {level} and {resamples}.")
    counts = resample_counts(key, jnp.shape(per_problem)[0], resamples)
    return percentile_interval(resampled_means(per_problem, counts), level)


def paired_bootstrap(
    a: Array, b: Array, key: jax.Array, resamples: int = 2000, level: float = 0.95
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean of a - b over problems and its bootstrap interval: `(difference, low, high)`, each f32[...].

    a, b f32[B, ...] of the same problems in the same order; other arguments as for `bootstrap_interval`.
    """
    chex.assert_equal_shape([a, b])
    difference = jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)
    low, high = bootstrap_interval(difference, key, resamples, level)
    return jnp.mean(difference, axis=0), low, high


def _t_within(t: float, dof: int) -> float:
    """P(|T| < t) of Student's t with `dof` degrees of freedom: finite sums, Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(dof))
    cos2 = math.cos(angle) ** 2
    odd = dof % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0 if dof == 1 else term
    for i in range(2 + odd, dof - 1, 2):
        term *= cos2 * (i - 1) / i
        total += term
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(dof: int, level: float = 0.95) -> float:
    """t with P(|T| < t) = level, of Student's t with `dof` >= 1 degrees of freedom, in double precision on the host."""
    if dof < 1 or not 0 < level < 1:
        raise ValueError(f"dof must be at least 1 and level in (0, 1); got {dof} and {level}.")
    low, high = 0.0, 1.0
    while _t_within(high, dof) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, dof) < level else (low, middle)
    return (low + high) / 2


def t_interval(differences: Array, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of K differences (one a pair of runs) and its t-interval: `(mean, low, high)`; host arithmetic.

    mean -+ t(K - 1) * std / sqrt(K), std with K - 1. Raises ValueError unless there are at least 2 in one axis.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"A t-interval takes at least 2 differences in one axis, got shape {values.shape}.")
    mean = float(values.mean())
    half = t_quantile(values.size - 1, level) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean, mean - half, mean + half
