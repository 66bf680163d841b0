"""Answers that are forced before any thinking: their credit, their place in a row, and a run that trains on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import BUDGETS, CONFIG, MODEL, A, B, G, S, make_prompts, params

from configs import peak
from tto_jax import crediting, rollout, settings
from tto_jax.core import credit
from tto_jax.core.budgets import BudgetSchedule

SCHEDULE = BudgetSchedule.from_prior(BUDGETS)
N = B * G


def plan_of(**changes):
    config = peak.get_config("brpo,fast")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return settings.build(config)


@pytest.fixture(scope="module")
def sampled():
    """Scores f32[B,G,S+1,A] at random, and what the rollout has sampled, on the host."""
    jax.config.update("jax_disable_most_optimizations", True)
    prompts, cuts = jax.device_put(make_prompts()), rollout.Cuts(SCHEDULE, start=True)
    weights = rollout.weights(MODEL, params())
    *result, _ = rollout.sample(MODEL, CONFIG, weights, prompts, jax.random.key(3), cuts)
    jax.config.update("jax_disable_most_optimizations", False)
    correct = np.random.default_rng(0).integers(0, 2, (B, G, S + 1, A)).astype(np.float32)
    return correct, *jax.device_get(tuple(result))


def test_the_first_fork_is_before_any_thinking(sampled):
    """No token of the trace is before it, so nothing but the answer's key tells the traces of a problem apart."""
    _, traces, forks, answers = sampled
    assert forks.shape == (N, S + 1) and not forks[:, 0].any()
    np.testing.assert_array_equal(forks[:, 1:], np.minimum(traces.length[:, None], BUDGETS))
    inserted = len(CONFIG.elicit_cut)
    assert (answers.forced[:, 0] == inserted).all()
    first, token = answers.logprob[:, 0, :, inserted], answers.tokens[:, 0, :, inserted]
    for b in range(B):
        rows = slice(b * G, b * G + G)
        for value in set(token[rows].ravel().tolist()):
            same = first[rows][token[rows] == value]
            np.testing.assert_allclose(same, same[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["brpo", "progress_gae"])
def test_credit_and_rows(sampled, kind):
    """Thinking is paid by the S later columns; the first column's answers by their score minus the problem's mean."""
    correct, traces, forks, answers = sampled
    estimator = credit.Estimator(kind)
    config = settings.CreditConfig(estimator, "brpo", "paper", 0.0, one_token_answers=False, start=True)
    coef = np.random.default_rng(1).normal(size=(S, 3)).astype(np.float32) if kind == "brpo" else None
    rows, earned, baselines, sums = crediting.credit_and_pack(
        config, SCHEDULE, make_prompts(), traces, answers, forks, correct, coef
    )
    assert (sums is None) == ("fit" not in baselines) == (coef is None)
    start = correct[:, :, 0].reshape(B, G * A)
    by_trace = forks.reshape(B, G, S + 1)[..., 1:]
    expected = credit.assign(correct[:, :, 1:], by_trace, SCHEDULE, estimator, start=start, coef=coef)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), earned, expected)
    assert np.abs(earned.trace_advantage).max() > 0.1

    advantage, mask, branch = (np.asarray(x) for x in (rows.advantage, rows.loss_mask, rows.branch))
    for n in range(N):
        b, g = divmod(n, G)
        for s in range(S):
            inside = slice(make_prompts().tokens.shape[1] + (by_trace[b, g, s - 1] if s else 0), None)
            number = by_trace[b, g, s] - (by_trace[b, g, s - 1] if s else 0)
            np.testing.assert_allclose(advantage[n, inside][:number], expected.trace_advantage[b, g, s], atol=1e-6)
        for a in range(A):
            own = mask[n] & (branch[n] == 1 + a)  # the first column's branches come first
            assert own.sum() == answers.length[n, 0, a] - answers.forced[n, 0]
            mean = start[b].mean()
            np.testing.assert_allclose(advantage[n, own], (correct[b, g, 0, a] - mean) / (S * A), atol=1e-6)


def test_samples_and_sizes():
    """A column more in all sizes; evaluation knows nothing of it."""
    with_start, without = plan_of(rollout__start=True), plan_of()
    assert with_start.columns == without.columns + 1 == with_start.schedule.size + 1
    one = without.rollout.answers * without.rollout.answer_cap
    assert with_start.loss.num_targets == without.loss.num_targets + one
    assert with_start.loss.num_states == without.loss.num_states + without.answer_pad - 1  # one-token answers
    assert with_start.kv_bytes() > without.kv_bytes()
    for plan in (with_start, without):
        assert plan.credit.answer_weights(plan.schedule, 4).shape == (plan.columns,)
    uniform = dataclasses.replace(with_start.credit, answer_weight="paper").answer_weights(SCHEDULE, A)
    np.testing.assert_allclose(uniform, np.full(S + 1, 1 / (S * A)), rtol=1e-6)


def test_without_start_nothing_changes():
    earned = credit.assign(jnp.ones((1, 2, 3, 1)), jnp.ones((1, 2, 3), int), BudgetSchedule.from_weights((1, 1, 1)))
    assert credit.with_start(earned) is earned
