"""Progress and regret of one trace against scalar loops, mapped over many."""

import jax
import numpy as np
import oracles
import pytest

from tto_jax.core import progress


@pytest.mark.parametrize("S", [1, 2, 5, 8])
def test_block_progress_equals_oracle(S):
    rng = np.random.default_rng(S)
    values, start = rng.normal(size=(6, S)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    actual = jax.vmap(progress.block_progress)(values, start)
    assert actual.dtype == np.float32
    expected = [oracles.block_progress(trace, first) for trace, first in zip(values, start)]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_block_progress_by_hand():
    actual = progress.block_progress(np.asarray([0.5, 0.25, 1.0], np.float32), np.float32(0.125))
    np.testing.assert_array_equal(actual, [0.375, -0.25, 0.75])


@pytest.mark.parametrize("S", [1, 3, 8])
@pytest.mark.parametrize("optimal", [1.0, 0.6])
def test_cumulative_regret_equals_oracle(S, optimal):
    values = np.random.default_rng(S).random((6, S)).astype(np.float32)
    actual = jax.vmap(lambda trace: progress.cumulative_regret(trace, optimal))(values)
    np.testing.assert_allclose(actual, [oracles.cumulative_regret(trace, optimal) for trace in values], atol=2e-6)


def test_optimal_values_have_no_regret():
    np.testing.assert_array_equal(progress.cumulative_regret(np.ones(4, np.float32), 1.0), np.zeros(4))


@pytest.mark.parametrize("K", [1, 2, 6])
def test_normalized_regret_equals_oracle(K):
    """Limits before the first point, between points, on a point, and past the last one."""
    rng = np.random.default_rng(K)
    mapped = jax.jit(jax.vmap(progress.normalized_regret, (None, None, 0)))
    for _ in range(10):
        accuracy = rng.random(K).astype(np.float32)
        tokens = np.cumsum(rng.integers(1, 5, size=K) * 500).astype(np.float32)
        limits = np.concatenate([[1.0, 250.0], tokens, tokens + 130.0, [16000.0]]).astype(np.float32)
        actual = mapped(accuracy, tokens, limits)
        expected = [oracles.normalized_regret(accuracy, tokens, float(limit)) for limit in limits]
        np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_normalized_regret_of_traces_that_stop_growing():
    """Equal token counts are a step: traces that ended repeat their last point."""
    rng = np.random.default_rng(9)
    for _ in range(5):
        tokens = np.cumsum(rng.integers(0, 2, size=8) * 1000.0).astype(np.float32) + np.float32(400.0)
        accuracy = rng.random(8).astype(np.float32)
        for limit in (300.0, 1000.0, 2100.0, 20000.0):
            actual = progress.normalized_regret(accuracy, tokens, np.float32(limit))
            np.testing.assert_allclose(actual, oracles.normalized_regret(accuracy, tokens, limit), atol=3e-6)


def test_normalized_regret_by_hand():
    accuracy, tokens = np.asarray([0.5, 1.0], np.float32), np.asarray([2.0, 4.0], np.float32)
    # Areas: triangle to (2, .5) = .5; to 3: .5 + (.5 + .75) / 2 = 1.125; to 4: 2; flat at 1 from there on.
    for limit, area in ((1.0, 0.125), (2.0, 0.5), (3.0, 1.125), (4.0, 2.0), (10.0, 8.0)):
        actual = progress.normalized_regret(accuracy, tokens, np.float32(limit))
        np.testing.assert_allclose(actual, 1.0 - area / limit, atol=1e-6)
