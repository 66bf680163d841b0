"""Properties that follow from the equations, whatever the numbers: no oracle is needed to believe them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from tto_jax.core import credit, losses, progress
from tto_jax.core.budgets import BudgetSchedule

KINDS = credit.KINDS
B, G, S, A = 2, 4, 5, 3


def batch_of(seed, shape=(B, G, S, A)):
    batch = oracles.random_batch(np.random.default_rng(seed), *shape)
    return batch, BudgetSchedule.from_weights(batch["weights"])


def trace_advantage(batch, schedule, estimator, **arrays):
    start = arrays.pop("start", batch["start"])
    result = credit.assign(batch["correct"], batch["forks"], schedule, estimator=estimator, start=start, **arrays)
    return np.asarray(result.trace_advantage)


def pooled(batch):
    """J [B,G,S] and J[-1] [B] by the oracle."""
    first = batch["start"].astype(np.float64).mean(-1)
    J = [
        oracles.pooled_values(oracles.column_means(correct), forks, np.ones((G, S), bool), value)
        for correct, forks, value in zip(batch["correct"], batch["forks"], first)
    ]
    return np.asarray(J), first


@pytest.mark.parametrize("answers", [1, 4])
def test_brpo_with_one_budget_is_mean_centred_grpo(answers):
    batch, schedule = batch_of(0, (3, 6, 1, answers))
    jitted = jax.jit(
        lambda correct, forks: [credit.assign(correct, forks, schedule, kind) for kind in ("brpo", "grpo")]
    )
    brpo, grpo = (result.trace_advantage for result in jitted(batch["correct"], batch["forks"]))
    np.testing.assert_allclose(brpo, grpo, atol=1e-6)
    r = batch["correct"].mean(-1)
    np.testing.assert_allclose(brpo, r - r.mean(1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "brpo", "group"])
def test_first_block_sums_to_zero_over_the_group(kind):
    for seed in range(3):
        advantage = trace_advantage(*batch_of(seed), kind)
        np.testing.assert_allclose(advantage[:, :, 0].sum(1), 0.0, atol=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "brpo", "group", "mrt"])
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.3])
def test_constant_scores_give_zero(kind, constant):
    batch, schedule = batch_of(1)
    batch["correct"] = np.full_like(batch["correct"], constant)
    result = credit.assign(batch["correct"], batch["forks"], schedule, estimator=kind, start=batch["start"])
    np.testing.assert_allclose(np.where(result.block_mask, result.trace_advantage, 0.0), 0.0, atol=1e-6)
    np.testing.assert_allclose(result.answer_advantage, 0.0, atol=1e-6)


@pytest.mark.parametrize("traces", [4, 7])
@pytest.mark.parametrize("kind", ["grpo", "rloo", "mrt"])
def test_constant_scores_give_zero_under_std(kind, traces):
    """The mean of equal numbers can be one float32 unit off; a deviation near zero must not blow that up."""
    schedule, estimator = BudgetSchedule.from_weights([1.0]), credit.Estimator(kind, std=True)
    forks = np.ones((50, traces, 1), np.int32)
    jitted = jax.jit(lambda correct: credit.assign(correct, forks, schedule, estimator).trace_advantage)
    constant = np.random.default_rng(2).random((50, 1, 1, 1)).astype(np.float32)
    correct = np.broadcast_to(constant, (50, traces, 1, 1))
    np.testing.assert_allclose(jitted(correct), 0.0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_traces_permutes_advantages(kind):
    batch, schedule = batch_of(3)
    order = np.asarray([2, 0, 3, 1])
    moved = dict(batch, correct=batch["correct"][:, order], forks=batch["forks"][:, order])
    for flag in (False, True):
        estimator = credit.Estimator(kind, leave_one_out=flag)
        plain = trace_advantage(batch, schedule, estimator)
        np.testing.assert_allclose(trace_advantage(moved, schedule, estimator), plain[:, order], atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_answers_changes_no_trace_advantage(kind):
    batch, schedule = batch_of(4)
    moved = dict(batch, correct=batch["correct"][..., [2, 0, 1]])
    np.testing.assert_allclose(
        trace_advantage(moved, schedule, kind), trace_advantage(batch, schedule, kind), atol=2e-6
    )


@pytest.mark.parametrize("kind", ["grpo", "rloo", "brpo", "group", "mrt", *credit.NEEDS_START])
def test_shifting_every_score_changes_nothing(kind):
    """A baseline exists to remove what all scores share."""
    batch, schedule = batch_of(5)
    moved = dict(batch, correct=batch["correct"] + np.float32(0.75), start=batch["start"] + np.float32(0.75))
    plain, shifted = trace_advantage(batch, schedule, kind), trace_advantage(moved, schedule, kind)
    np.testing.assert_allclose(shifted, plain, atol=5e-6)


def test_progress_telescopes():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(10, S)).astype(np.float32)
    start = rng.normal(size=10).astype(np.float32)
    gained = jax.vmap(progress.block_progress)(values, start)
    np.testing.assert_allclose(gained.sum(-1), values[:, -1] - start, atol=1e-5)


def test_answers_of_one_fork_sum_to_zero():
    batch, schedule = batch_of(7)
    result = credit.assign(batch["correct"], batch["forks"], schedule, estimator="brpo", answers="brpo")
    total = np.asarray(result.answer_advantage).sum(-1)
    for b in range(B):
        for g in range(G):
            for fork in set(batch["forks"][b, g].tolist()):
                assert abs(total[b, g][batch["forks"][b, g] == fork].sum()) < 1e-5


def test_columns_of_one_fork_have_no_progress():
    batch, schedule = batch_of(8)
    estimator = credit.Estimator("progress_gae", gamma=0.0)
    advantage = trace_advantage(batch, schedule, estimator)
    repeated = ~np.asarray([[oracles.block_mask(forks) for forks in problem] for problem in batch["forks"]])
    repeated[..., 0] = False  # the first column has no column before it
    assert repeated.any()
    np.testing.assert_allclose(advantage[repeated], 0.0, atol=1e-6)


def test_progress_gae_without_future_is_progress():
    batch, _ = batch_of(9)
    schedule = BudgetSchedule.from_prior(tokens=range(10, 10 * S + 1, 10), prior="base")  # c = 1
    advantage = trace_advantage(batch, schedule, credit.Estimator("progress_gae", gamma=0.0))
    J, first = pooled(batch)
    expected = jax.vmap(jax.vmap(progress.block_progress, (0, None)))(J.astype(np.float32), first.astype(np.float32))
    np.testing.assert_allclose(advantage, expected, atol=2e-6)
    # MRT adds the same progress, centred over the traces that reached the block.
    bonus = trace_advantage(batch, schedule, "mrt") - trace_advantage(batch, schedule, "grpo")
    reached = [[oracles.block_mask(forks) for forks in problem] for problem in batch["forks"]]
    expected = np.asarray(expected)
    for b in range(B):
        for s in range(S):
            seen = [expected[b, g, s] for g in range(G) if reached[b][g][s]]
            mean = sum(seen) / len(seen) if seen else 0.0
            np.testing.assert_allclose(bonus[b, :, s], expected[b, :, s] - mean, atol=3e-6)


def test_progress_gae_undiscounted_is_return_minus_latest_value():
    batch, schedule = batch_of(10)
    advantage = trace_advantage(batch, schedule, credit.Estimator("progress_gae", gamma=1.0))
    J, first = pooled(batch)
    tail = np.asarray(oracles.tails(batch["weights"]))
    for b in range(B):
        before = np.concatenate([np.full((G, 1), first[b]), J[b, :, :-1]], axis=1)
        expected = np.asarray(oracles.budget_return(J[b], batch["weights"])) - tail * before
        np.testing.assert_allclose(advantage[b], expected, atol=5e-6)


def test_progress_gae_undiscounted_with_base_prior_is_potential_shaping():
    batch, _ = batch_of(11)
    schedule = BudgetSchedule.from_prior(tokens=range(10, 10 * S + 1, 10), prior="base")
    advantage = trace_advantage(batch, schedule, credit.Estimator("progress_gae", gamma=1.0))
    J, first = pooled(batch)
    before = np.concatenate([np.broadcast_to(first[:, None, None], (B, G, 1)), J[:, :, :-1]], axis=2)
    np.testing.assert_allclose(advantage, J[:, :, -1:] - before, atol=5e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_progress_of_weight_one_does_not_know_the_prior(gamma):
    """MRT's progress and potential-based shaping: those of the prior `base`, whatever the prior."""
    batch, schedule = batch_of(12)
    base = BudgetSchedule.from_prior(tokens=range(10, 10 * S + 1, 10), prior="base")
    ones = credit.Estimator("progress_gae", gamma=gamma, progress_weights="ones")
    expected = trace_advantage(batch, base, credit.Estimator("progress_gae", gamma=gamma))
    np.testing.assert_allclose(trace_advantage(batch, schedule, ones), expected, atol=1e-6)


def test_regression_baseline_with_brpo_coefficients_is_brpo():
    for seed in range(3):
        batch, schedule = batch_of(seed)
        coef = np.asarray([[s / S, (S - s) / S, 0.0] for s in range(S)], np.float32)
        for flag in (False, True):
            estimator = credit.Estimator("brpo", leave_one_out=flag)
            fitted = trace_advantage(batch, schedule, estimator, coef=coef)
            np.testing.assert_allclose(fitted, trace_advantage(batch, schedule, estimator), atol=2e-6)


def test_leave_one_out_group_is_rescaled_group():
    """r - mean of the others = G / (G - 1) * (r - mean of all)."""
    batch, schedule = batch_of(12)
    for kind in ("grpo", "group"):
        others = trace_advantage(batch, schedule, credit.Estimator(kind, leave_one_out=True))
        np.testing.assert_allclose(others, G / (G - 1) * trace_advantage(batch, schedule, kind), atol=5e-6)
    np.testing.assert_allclose(
        trace_advantage(batch, schedule, "rloo"),
        trace_advantage(batch, schedule, credit.Estimator("grpo", leave_one_out=True)),
        atol=2e-6,
    )


def test_values_equal_to_the_mean_scores_change_nothing():
    batch, schedule = batch_of(13)
    values = batch["correct"].mean(-1)
    for kind in KINDS:
        fed = trace_advantage(batch, schedule, kind, values=values)
        np.testing.assert_allclose(fed, trace_advantage(batch, schedule, kind), atol=2e-6, err_msg=kind)


def test_all_scored_is_the_default():
    batch, schedule = batch_of(14)
    scored = np.ones((B, G, S), bool)
    for kind in KINDS:
        marked = trace_advantage(batch, schedule, kind, scored=scored)
        np.testing.assert_allclose(marked, trace_advantage(batch, schedule, kind), atol=1e-6, err_msg=kind)


def test_answer_modes():
    batch, schedule = batch_of(15)
    full, last, none = (
        credit.assign(
            batch["correct"], batch["forks"], schedule, estimator="brpo", answers=answers, start=batch["start"]
        )
        for answers in ("brpo", "grpo", "none")
    )
    np.testing.assert_array_equal(last.answer_advantage[..., -1, -1], full.answer_advantage[..., -1, -1])
    assert np.count_nonzero(last.answer_advantage) <= B * G
    assert not np.any(none.answer_advantage)
    np.testing.assert_allclose(full.start_advantage, batch["start"] - batch["start"].mean(-1, keepdims=True), atol=1e-6)
    assert not np.any(last.start_advantage)
    assert not np.any(none.start_advantage)
    for other in (last, none):
        np.testing.assert_array_equal(other.trace_advantage, full.trace_advantage)


def test_problems_are_independent():
    """A batch equals its problems one by one, and the door can be mapped again."""
    batch, schedule = batch_of(16, (4, 3, 3, 2))
    arrays = [batch[name] for name in ("correct", "forks", "start")]

    def door(correct, forks, start):
        """Every kind, stacked behind the problem axis, so that each shape is compiled once."""
        results = [credit.assign(correct, forks, schedule, estimator=kind, start=start) for kind in KINDS]
        return jnp.stack([result.trace_advantage for result in results], axis=1)

    jitted = jax.jit(door)
    whole = jitted(*arrays)
    for b in range(4):
        np.testing.assert_allclose(jitted(*(array[b : b + 1] for array in arrays))[0], whole[b], atol=1e-6)
    halves = jax.jit(jax.vmap(door))(*(array.reshape(2, 2, *array.shape[1:]) for array in arrays))
    np.testing.assert_allclose(halves.reshape(whole.shape), whole, atol=1e-6)


def test_changing_budgets_compiles_nothing():
    batch, _ = batch_of(17)
    traced = []

    @jax.jit
    def door(schedule, correct, forks):
        traced.append(None)  # runs once a compilation, never at run time
        return credit.assign(correct, forks, schedule, estimator="brpo", answers="brpo").trace_advantage

    results = []
    for step in (100, 250, 900):
        for prior in ("uniform", "linear", "base", [1.0, 2.0, 3.0, 4.0, 6.0]):
            schedule = BudgetSchedule.from_prior(tokens=tuple(range(step, step * S + 1, step)), prior=prior)
            results.append(np.asarray(door(schedule, batch["correct"], batch["forks"])))
    assert len(traced) == 1
    assert np.abs(results[0] - results[2]).max() > 1e-3  # the weights are read, not baked in


def test_gradient_through_values_is_finite():
    """Equal values too: the square root in a standard deviation has no finite slope at 0 unless it is guarded."""
    batch, schedule = batch_of(18)
    estimators = [credit.Estimator(kind) for kind in KINDS]
    estimators += [credit.Estimator(kind, std=True) for kind in ("grpo", "rloo", "mrt")]

    def total(values, estimator):
        result = credit.assign(
            batch["correct"], batch["forks"], schedule, estimator=estimator, start=batch["start"], values=values
        )
        return jnp.sum(jnp.where(result.block_mask, result.trace_advantage, 0.0) ** 2 + result.trace_advantage)

    slopes = jax.jit(lambda values: [jax.grad(total)(values, estimator) for estimator in estimators])
    for values in (batch["values"], np.zeros_like(batch["values"])):
        for slope, estimator in zip(slopes(values), estimators):
            assert np.isfinite(slope).all(), estimator


def test_clipped_surrogate_at_ratio_one_has_the_reinforce_gradient():
    rng = np.random.default_rng(19)
    logits, advantage = jnp.asarray(rng.normal(size=(6, 7))), jnp.asarray(rng.normal(size=6).astype(np.float32))
    token = rng.integers(0, 7, size=6)

    def logprob(logits):
        return jax.nn.log_softmax(logits)[jnp.arange(6), token]

    old = logprob(logits)
    surrogate = jax.grad(lambda x: losses.clipped_objective(logprob(x), old, advantage).sum())(logits)
    reinforce = jax.grad(lambda x: (logprob(x) * advantage).sum())(logits)
    np.testing.assert_allclose(surrogate, reinforce, atol=1e-6)
    assert np.abs(reinforce).max() > 0.1


def test_estimator_is_a_frozen_value():
    estimator = credit.Estimator("brpo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimator.decay = 0.1
    assert hash(estimator) == hash(credit.Estimator("brpo")) and estimator == credit.Estimator("brpo")
