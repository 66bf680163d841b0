import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax.core import anytime


def scores(seed, B=4, G=3, S=5, A=2):
    rng = np.random.default_rng(seed)
    correct = rng.integers(0, 2, (B, G, S, A)).astype(np.float32)
    forks = np.minimum(np.arange(1, S + 1) * 10, rng.integers(5, 60, (B, G, 1))).astype(np.int32)
    return correct, forks


def test_accuracies():
    correct, _ = scores(0)
    accuracy = anytime.accuracy_at_budgets(correct)
    want = [np.mean([correct[b, g, s, a] for b in range(4) for g in range(3) for a in range(2)]) for s in range(5)]
    np.testing.assert_allclose(accuracy, want, rtol=1e-6)
    np.testing.assert_allclose(anytime.anytime_accuracy(accuracy), np.mean(want), rtol=1e-6)
    np.testing.assert_allclose(anytime.final_accuracy(accuracy), want[-1], rtol=1e-6)
    with pytest.raises(AssertionError):
        anytime.accuracy_at_budgets(correct[0])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for k in range(1, n + 1):
            want = []
            for c in range(n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                want.append(np.mean([max(s) for s in subsets]))
            got = jax.jit(anytime.pass_at_k, static_argnums=2)(np.full(n + 1, n), np.arange(n + 1), k)
            np.testing.assert_allclose(got, want, atol=2e-6)
    assert np.isnan(anytime.pass_at_k(3, 1, 4))
    assert anytime.pass_at_k(1000, 0, 500) == 0
    with pytest.raises(ValueError, match="got 0"):
        anytime.pass_at_k(3, 1, 0)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_maj_at_k(k):
    rng = np.random.default_rng(k)
    answers, right = rng.integers(-1, 4, (50, 7)).astype(np.int32), rng.integers(0, 4, 50).astype(np.int32)
    want = []
    for row, r in zip(answers, right):
        votes = []
        for i in range(7 // k):
            counts = Counter(int(x) for x in row[i * k : (i + 1) * k] if x >= 0)
            best = [x for x, m in counts.items() if m == max(counts.values())]
            votes.append(best.count(r) / len(best) if best else 0)
        want.append(np.mean(votes))
    got = jax.jit(anytime.maj_at_k, static_argnums=2)(answers, right, k)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_maj_at_k_wants_enough_answers():
    with pytest.raises(ValueError, match="number of answers, 3; got 4"):
        anytime.maj_at_k(np.zeros((1, 3), np.int32), np.zeros(1, np.int32), 4)


@pytest.mark.parametrize("seed", range(5))
def test_overthinking_rate(seed):
    correct, forks = scores(seed, A=3)
    B, G, S, _ = correct.shape
    pooled, want = np.zeros((B, G, S)), np.zeros(S)
    for b, g in itertools.product(range(B), range(G)):
        for s in range(S):
            pooled[b, g, s] = np.mean([correct[b, g, t] for t in range(S) if forks[b, g, t] == forks[b, g, s]])
        for s in range(S):
            earlier = [pooled[b, g, t] for t in range(s) if forks[b, g, t] < forks[b, g, s]]
            want[s] += any(e > pooled[b, g, s] + 1e-9 for e in earlier)
    np.testing.assert_allclose(anytime.pooled_accuracy(correct, forks), pooled, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(anytime.overthinking_rate)(correct, forks), want / (B * G), rtol=1e-6)


def test_noise_at_one_fork_is_not_overthinking():
    correct = np.array([1, 0, 1, 0], np.float32).reshape(1, 1, 4, 1)
    np.testing.assert_array_equal(anytime.overthinking_rate(correct, np.full((1, 1, 4), 7)), 0)
    np.testing.assert_array_equal(anytime.overthinking_rate(correct, np.array([[[1, 2, 3, 4]]])), [0, 1, 0, 1])


def test_bootstrap_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    values = rng.random((30, 2)).astype(np.float32)
    low, high = jax.jit(anytime.bootstrap_interval)(values, jax.random.key(0))
    means = [values[rng.integers(0, 30, 30)].mean(0) for _ in range(20000)]
    np.testing.assert_allclose(np.stack([low, high]), np.quantile(means, [0.025, 0.975], axis=0), atol=0.01)
    with pytest.raises(ValueError, match="got 95"):
        anytime.bootstrap_interval(values, jax.random.key(0), level=95)


def test_resampled_means_are_means_over_drawn_problems():
    counts = np.asarray(anytime.resample_counts(jax.random.key(3), 6, 500))
    assert counts.shape == (500, 6) and (counts.sum(axis=1) == 6).all() and (counts == counts.round()).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.2)
    values = np.random.default_rng(0).random((6, 2, 3)).astype(np.float32)
    got = np.asarray(jax.jit(anytime.resampled_means)(values, counts))
    assert got.shape == (500, 2, 3)
    for row, mean in zip(counts[:20], got):
        drawn = [b for b in range(6) for _ in range(int(row[b]))]
        np.testing.assert_allclose(mean, values[drawn].mean(axis=0), rtol=1e-5)


def test_percentile_interval_leaves_out_what_does_not_exist():
    draws = np.random.default_rng(1).normal(size=(999, 3)).astype(np.float32)
    draws[:400, 1], draws[:, 2] = np.nan, np.nan
    low, high = jax.jit(anytime.percentile_interval)(draws)
    for column, kept in ((0, draws[:, 0]), (1, draws[400:, 1])):
        np.testing.assert_allclose([low[column], high[column]], np.percentile(kept, [2.5, 97.5]), rtol=1e-5)
    assert np.isnan(low[2]) and np.isnan(high[2])
    low, high = anytime.percentile_interval(draws[:, 0], level=0.5)
    np.testing.assert_allclose([low, high], np.percentile(draws[:, 0], [25, 75]), rtol=1e-5)
    with pytest.raises(ValueError, match="got 95"):
        anytime.percentile_interval(draws, level=95)


def test_the_interval_of_a_ratio_covers():
    """Mean length of right traces: both sums vary from problem to problem, and with each other."""
    trials, B = 300, 80
    rng = np.random.default_rng(4)
    right = rng.binomial(8, rng.uniform(0.1, 0.9, (trials, B)))
    length = (rng.normal(100, 30, (trials, B)) + 5 * right) * right
    truth = length.sum() / right.sum()
    counts = anytime.resample_counts(jax.random.key(5), B, 500)
    means = jax.jit(anytime.resampled_means)
    covered = 0
    for above, below in zip(length, right):
        low, high = anytime.percentile_interval(means(above, counts) / means(below, counts))
        covered += bool(low <= truth <= high)
    assert 0.90 <= covered / trials <= 0.98


def test_the_interval_covers_the_mean():
    trials, B, p = 400, 100, 0.3
    values = jax.random.bernoulli(jax.random.key(1), p, (trials, B)).astype(jnp.float32)
    interval = jax.jit(jax.vmap(lambda v, k: anytime.bootstrap_interval(v, k, 400)))
    low, high = interval(values, jax.random.split(jax.random.key(2), trials))
    covered = np.mean((low <= p) & (p <= high))
    assert 0.90 <= covered <= 0.98


def test_paired_is_narrower_than_unpaired_and_antisymmetric():
    rng = np.random.default_rng(0)
    hard = rng.random(80)
    a, b = (hard + 0.1 + 0.01 * rng.normal(size=80)).astype(np.float32), hard.astype(np.float32)
    difference, low, high = anytime.paired_bootstrap(a, b, jax.random.key(0))
    np.testing.assert_allclose(difference, (a - b).mean(), rtol=1e-5)
    assert low < difference < high and high - low < 0.01
    reverse = anytime.paired_bootstrap(b, a, jax.random.key(0))
    np.testing.assert_allclose(reverse, [-difference, -high, -low], rtol=1e-4)
    with pytest.raises(AssertionError):
        anytime.paired_bootstrap(a, b[:-1], jax.random.key(0))


def test_t_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for dof in [*range(1, 31), 100, 999]:
        for level in (0.5, 0.9, 0.95, 0.99):
            np.testing.assert_allclose(anytime.t_quantile(dof, level), stats.t.ppf((1 + level) / 2, dof), rtol=1e-9)
    values = np.random.default_rng(0).normal(size=5)
    interval = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(anytime.t_interval(values), [values.mean(), *interval], rtol=1e-9)


def test_t_table():
    for dof, t in [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042)]:
        assert round(anytime.t_quantile(dof), 3) == t
    with pytest.raises(ValueError, match="at least 2"):
        anytime.t_interval([0.1])
