"""What baselines leave of the return's variance: moments and shares against loops over traces."""

import jax
import numpy as np
import oracles
import pytest

from tto_jax.core import variance
from tto_jax.core.budgets import BudgetSchedule

B, G, S, A = 14, 4, 3, 2
RIDGE = 0.5
moments_of = jax.jit(variance.moments, static_argnames="decay")


def batch_of(seed):
    batch = oracles.random_batch(np.random.default_rng(seed), B, G, S, A)
    return batch["correct"], batch["forks"], batch["weights"]


def halves(sums):
    return np.stack([sums[half::2].sum(axis=0, dtype=np.float64) for half in (0, 1)])


def regressors(correct, forks, weights, decay):
    """One list a block, of (problem, R, V1, V2, V2 of the others) of every trace that reached it."""
    found = [[] for _ in range(S)]
    for b in range(B):
        r = oracles.column_means(correct[b])
        scores = oracles.pooled_values(r, forks[b], [[True] * S] * G, 0.0)
        returns = oracles.budget_return(scores, weights)
        prefix = oracles.prefix_baseline(scores, weights, decay)
        for g in range(G):
            for s in range(S):
                if oracles.block_mask(forks[b][g])[s]:
                    column = [returns[h][s] for h in range(G)]
                    means = [oracles.mean_for(g, column, leave) for leave in (False, True)]
                    found[s].append((b, returns[g][s], prefix[g][s], *means))
    return found


def var(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def fit(rows, s):
    """a, b, c by NumPy's least squares, with a row of the penalty for each."""
    x = np.asarray([(v1, others, 1.0) for _, _, v1, _, others in rows]).reshape(-1, 3)
    y = np.asarray([row[1] for row in rows])
    x = np.concatenate([x, np.sqrt(RIDGE) * np.eye(3)])
    return np.linalg.lstsq(x, np.concatenate([y, np.sqrt(RIDGE) * np.asarray([s / S, 1 - s / S, 0.0])]), rcond=None)[0]


def shares(rows, s):
    """By baseline; no own trace where the name says so. Fitted to the problems of the other half."""
    own = s / S
    found = {name: [] for name in variance.BASELINES}
    coef = [fit([row for row in rows if row[0] % 2 != half], s) for half in (0, 1)]
    for b, value, v1, v2, others in rows:
        a = coef[b % 2]
        baselines = (v1, v2, others, own * v1 + (1 - own) * v2, own * v1 + (1 - own) * others)
        for name, baseline in zip(found, (*baselines, a[0] * v1 + a[1] * others + a[2])):
            found[name].append(value - baseline)
    total = var([row[1] for row in rows])
    return {name: var(values) / total for name, values in found.items()}


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_shares_equal_loops(decay):
    for seed in range(6):
        correct, forks, weights = batch_of(seed)
        sums = moments_of(correct, forks, BudgetSchedule.from_weights(weights), decay=decay)
        found = variance.residuals(halves(np.asarray(sums)), RIDGE)
        assert tuple(found) == variance.BASELINES
        for s, rows in enumerate(regressors(correct, forks, weights, decay)):
            np.testing.assert_allclose(variance.reached(halves(np.asarray(sums)))[s], len(rows))
            assert len(rows) > 6, "the case tells something"
            total = var([row[1] for row in rows])
            np.testing.assert_allclose(variance.return_variance(halves(np.asarray(sums)))[s], total, atol=1e-6)
            for name, share in shares(rows, s).items():
                np.testing.assert_allclose(found[name][s], share, rtol=1e-3, atol=1e-4, err_msg=f"{name} {s}")


def test_many_resamples_at_once_are_each_alone():
    correct, forks, weights = batch_of(1)
    sums = np.asarray(moments_of(correct, forks, BudgetSchedule.from_weights(weights), decay=0.5), np.float64)
    counts = np.random.default_rng(0).integers(0, 3, (5, B))
    drawn = np.stack([np.einsum("rb,b...->r...", counts[:, half::2], sums[half::2]) for half in (0, 1)], axis=1)
    together = variance.residuals(drawn, RIDGE)
    for r, count in enumerate(counts):
        repeated = np.repeat(np.arange(B), count)
        alone = np.stack([sums[repeated[repeated % 2 == half]].sum(axis=0) for half in (0, 1)])
        for name, share in variance.residuals(alone, RIDGE).items():
            np.testing.assert_allclose(together[name][r], share, rtol=1e-6)


def test_own_trace_only_shrinks_the_group_mean_s_advantage():
    """Where all traces reach a block: (1 - 1/G)^2, whatever the scores."""
    correct, forks, weights = batch_of(2)
    forks = np.broadcast_to(np.arange(1, S + 1, dtype=np.int32), forks.shape)
    sums = moments_of(correct, forks, BudgetSchedule.from_weights(weights), decay=0.5)
    found = variance.residuals(halves(np.asarray(sums)), RIDGE)
    np.testing.assert_allclose(found["group"], (1 - 1 / G) ** 2 * found["group_leave_one_out"], rtol=1e-4)
    np.testing.assert_allclose(found["prefix"][0], 1.0, rtol=1e-5)
    np.testing.assert_allclose(found["brpo"][0], found["group"][0], rtol=1e-6)


def test_nothing_to_share():
    """No trace in a block, or returns that do not vary: not a number."""
    correct, forks, weights = batch_of(3)
    forks = np.repeat(np.full((B, G, 1), 5, np.int32), S, axis=2)
    sums = moments_of(correct, forks, BudgetSchedule.from_weights(weights), decay=0.5)
    found = variance.residuals(halves(np.asarray(sums)), RIDGE)
    assert all(np.isfinite(share[0]) and np.isnan(share[1:]).all() for share in found.values())
    same = moments_of(np.full_like(correct, 0.7), forks, BudgetSchedule.from_weights(weights), decay=0.5)
    assert all(np.isnan(share).all() for share in variance.residuals(halves(np.asarray(same)), RIDGE).values())
