"""The regression baseline: normal equations against loops, coefficients against NumPy's least squares."""

import dataclasses

import jax
import numpy as np
import oracles
import pytest

from tto_jax.core import credit, regression
from tto_jax.core.budgets import BudgetSchedule

B, G, S, A = 2, 4, 5, 3  # of test_identities
ESTIMATOR = credit.Estimator("brpo", leave_one_out=True)
sums_of = jax.jit(credit.normal_equations, static_argnames="estimator")


def batch_of(seed):
    batch = oracles.random_batch(np.random.default_rng(seed), B, G, S, A)
    return batch, BudgetSchedule.from_weights(batch["weights"])


def regressors(batch, values=None):
    """One list a block, of (V1, V2 of the others, 1, R) of every trace that reached it."""
    found = [[] for _ in range(S)]
    for b in range(B):
        scores = values[b].tolist() if values is not None else oracles.column_means(batch["correct"][b])
        returns = oracles.budget_return(scores, batch["weights"])
        prefix = oracles.prefix_baseline(scores, batch["weights"], 0.5)
        for g in range(G):
            reached = oracles.block_mask(batch["forks"][b][g])
            for s in range(S):
                if reached[s]:
                    others = [returns[i][s] for i in range(G) if i != g]
                    found[s].append((prefix[g][s], sum(others) / len(others), 1.0, returns[g][s]))
    return found


@pytest.mark.parametrize("given", [False, True])
def test_normal_equations_equal_loops(given):
    for seed in range(3):
        batch, schedule = batch_of(seed)
        values = batch["values"] if given else None
        sums = sums_of(batch["correct"], batch["forks"], schedule, estimator=ESTIMATOR, values=values)
        for s, rows in enumerate(regressors(batch, values)):
            x = np.asarray(rows).reshape(-1, 4)
            np.testing.assert_allclose(sums.gram[s], x[:, :3].T @ x[:, :3], atol=3e-5)
            np.testing.assert_allclose(sums.moment[s], x[:, :3].T @ x[:, 3], atol=3e-5)


@pytest.mark.parametrize(("decay", "ridge"), [(1.0, 1e-3), (0.7, 1.0)])
def test_coefficients_are_those_of_least_squares(decay, ridge):
    """Batches weighted by their age, and a row of the penalty for each coefficient."""
    sums, rows = regression.nothing(S), [[] for _ in range(S)]
    for seed in range(4):
        batch, schedule = batch_of(seed)
        new = jax.device_get(sums_of(batch["correct"], batch["forks"], schedule, estimator=ESTIMATOR))
        sums = regression.accumulate(sums, new, decay)
        for s, found in enumerate(regressors(batch)):
            rows[s] = [np.sqrt(decay) * np.asarray(row) for row in rows[s]] + [np.asarray(row) for row in found]
    fitted = regression.coefficients(sums, ridge)
    assert fitted.dtype == np.float32 and fitted.shape == (S, 3)
    for s in range(S):
        brpo = np.asarray([s / S, (S - s) / S, 0.0])
        data, penalty = np.asarray(rows[s]).reshape(-1, 4), np.sqrt(ridge) * np.eye(3)
        left, right = np.concatenate([data[:, :3], penalty]), np.concatenate([data[:, 3], penalty @ brpo])
        expected, *_ = np.linalg.lstsq(left, right, rcond=None)
        np.testing.assert_allclose(fitted[s], expected, atol=2e-4)


def test_before_the_first_batch_it_is_brpo():
    batch, schedule = batch_of(5)
    coef = regression.coefficients(regression.nothing(S), 1.0)
    fitted = credit.assign(batch["correct"], batch["forks"], schedule, ESTIMATOR, coef=coef)
    plain = credit.assign(batch["correct"], batch["forks"], schedule, ESTIMATOR)
    np.testing.assert_allclose(fitted.trace_advantage, plain.trace_advantage, atol=2e-6)


def test_it_leaves_less_of_the_variance_than_any_of_the_three():
    """On the batch it was fitted to, without ridge: that is what least squares is."""
    batch, schedule = batch_of(6)
    sums = jax.device_get(sums_of(batch["correct"], batch["forks"], schedule, estimator=ESTIMATOR))
    coef = regression.coefficients(dataclasses.replace(sums), 1e-6)
    for s, rows in enumerate(regressors(batch)):
        x = np.asarray(rows).reshape(-1, 4)
        left = lambda c, x=x: float(((x[:, 3] - x[:, :3] @ np.asarray(c)) ** 2).sum())  # noqa: E731
        for other in ((1, 0, 0), (0, 1, 0), (s / S, (S - s) / S, 0)):
            assert left(coef[s]) <= left(other) + 1e-4
