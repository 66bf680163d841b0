"""Tokens to an accuracy, against a walk along the curve."""

import itertools

import numpy as np
import pytest

from tto_jax.core import efficiency


def walk(accuracy, tokens, target):
    """From point to point, until the line between two of them has the target."""
    if accuracy[0] >= target:
        return tokens[0]
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(tokens, accuracy)):
        if y0 < target <= y1:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return np.inf


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_first_crossing_is_that_of_a_walk(size):
    """Curves that fall and rise, with flat parts and points of equal tokens; targets on points, between and beyond."""
    rng = np.random.default_rng(size)
    accuracy = rng.integers(0, 6, (40, size)) / 5
    tokens = np.cumsum(rng.integers(0, 4, (40, size)), axis=1) * 10.0 + 5
    target = np.concatenate([accuracy, rng.random((40, 5)), np.ones((40, 1)) * 1.1, np.zeros((40, 1))], axis=1)
    want = [[walk(a, t, y) for y in row] for a, t, row in zip(accuracy, tokens, target)]
    np.testing.assert_allclose(efficiency.tokens_to_reach(accuracy, tokens, target), want, rtol=1e-12)


def test_by_hand():
    found = efficiency.tokens_to_reach([0.5, 0.3, 0.7], [10, 20, 30], [0.2, 0.5, 0.6, 0.7, 0.8])
    np.testing.assert_allclose(found, [10, 10, 27.5, 30, np.inf])


def test_the_running_maximum_decides():
    """Values of the dense curve's running maximum are reached where it first has them."""
    accuracy, tokens = np.array([0.1, 0.6, 0.2, 0.9]), np.array([3.0, 7.0, 9.0, 20.0])
    x = np.linspace(3, 20, 5001)
    envelope = np.maximum.accumulate(np.interp(x, tokens, accuracy))
    for target in (0.15, 0.4, 0.59, 0.61, 0.89):
        np.testing.assert_allclose(
            efficiency.tokens_to_reach(accuracy, tokens, [target]), x[np.argmax(envelope >= target)], atol=0.01
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([0.1, 0.2], [1, 2, 3], [0.1]), r"accuracy\[2\], tokens\[3\]"),
        (([], [], [0.1]), "S at least 1"),
        (([[0.1, 0.2]], [[1, 2]], [0.1]), r"target\[1\]"),
        (([0.1, 0.2], [2, 1], [0.1]), "tokens decrease"),
    ],
)
def test_misuse(arguments, said):
    with pytest.raises(ValueError, match=said):
        efficiency.tokens_to_reach(*arguments)
