"""Length penalties against scalar loops."""

import math

import numpy as np
import pytest

from tto_jax.core import rewards


def test_length_penalty_by_hand():
    correct = np.asarray([1.0, 0.0]).reshape(1, 2, 1, 1)
    worth = rewards.length_penalty(correct, np.asarray([[30, 40]]), 100, 0.5)
    np.testing.assert_allclose(worth.ravel(), [0.85, 0.0])


def test_relative_length_penalty_equals_oracle():
    rng = np.random.default_rng(0)
    correct = (rng.random((4, 6, 3, 2)) < 0.4).astype(np.float32)
    length = rng.integers(5, 200, (4, 6)).astype(np.int32)
    correct[3] = 0.0
    actual = rewards.relative_length_penalty(correct, length, 0.3)
    for b in range(4):
        right = [length[b, g] for g in range(6) if correct[b, g, -1].max() > 0]
        mean = sum(right) / max(len(right), 1)
        std = math.sqrt(sum((x - mean) ** 2 for x in right) / max(len(right), 1))
        for g in range(6):
            worth = 1 - 0.3 / (1 + math.exp(-(length[b, g] - mean) / std)) if std else 1 - 0.15
            np.testing.assert_allclose(actual[b, g], correct[b, g] * worth, atol=1e-6)


def test_one_correct_trace_loses_half_of_the_penalty():
    correct = np.asarray([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    worth = rewards.relative_length_penalty(correct, np.asarray([[9, 2, 3]]), 0.2)
    np.testing.assert_allclose(worth.ravel(), [0.9, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.0])
def test_a_coefficient_that_is_none(alpha):
    with pytest.raises(ValueError, match=r"choose 0\.2"):
        rewards.relative_length_penalty(np.ones((1, 1, 1, 1)), np.ones((1, 1)), alpha)


def test_overlong_penalty_by_hand():
    correct = np.asarray([1.0, 1.0, 0.0, 1.0]).reshape(1, 4, 1, 1)
    worth = rewards.overlong_penalty(correct, np.asarray([[60, 80, 90, 100]]), 100, 20)
    np.testing.assert_allclose(worth.ravel(), [1.0, 1.0, -0.5, 0.0])


@pytest.mark.parametrize("margin", [0, 101])
def test_a_margin_that_is_none(margin):
    with pytest.raises(ValueError, match=r"it lies in \[1, 100\]"):
        rewards.overlong_penalty(np.ones((1, 1, 1, 1)), np.ones((1, 1)), 100, margin)


def test_serial_decay_equals_a_count():
    correct = (np.random.default_rng(1).random((3, 2, 5, 2)) < 0.5).astype(np.float32)
    actual = np.asarray(rewards.serial_decay(correct))
    for b, g, a in np.ndindex(3, 2, 2):
        seen = 0
        for s in range(5):
            seen += int(correct[b, g, s, a])
            assert actual[b, g, s, a] == (0.5 ** (seen - 1) if correct[b, g, s, a] else 0.0)
