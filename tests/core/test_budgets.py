"""Schedules, forks at budgets, and which block a token belongs to."""

import collections
import itertools
import math

import jax
import numpy as np
import oracles
import pytest

from tto_jax.core import budgets
from tto_jax.core.budgets import BudgetSchedule


@pytest.mark.parametrize("prior", ["uniform", "linear", "base", [3.0, 0.0, 1.0, 4.0]], ids=str)
def test_prior_equals_oracle(prior):
    tokens = (2000, 4000, 6000, 8000)
    schedule = BudgetSchedule.from_prior(tokens=tokens, prior=prior)
    np.testing.assert_allclose(schedule.weights, oracles.prior_weights(tokens, prior), rtol=1e-6)
    np.testing.assert_array_equal(schedule.tokens, tokens)
    assert schedule.weights.dtype == np.float32 and schedule.tokens.dtype == np.int32


def test_from_weights_has_no_tokens_and_is_normalised():
    schedule = BudgetSchedule.from_weights([1.0, 3.0])
    assert schedule.tokens is None
    np.testing.assert_allclose(schedule.weights, [0.25, 0.75])


def test_schedule_is_a_pytree_of_arrays():
    schedule = BudgetSchedule.from_prior(tokens=(1, 5), prior="uniform")
    assert sorted(leaf.shape for leaf in jax.tree.leaves(schedule)) == [(2,), (2,)]
    assert len(jax.tree.leaves(BudgetSchedule.from_weights([1.0, 1.0]))) == 1
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(schedule)
    np.testing.assert_array_equal(doubled.tokens, [2, 10])


def test_forks_at_budgets_equals_oracle():
    rng = np.random.default_rng(0)
    for S in range(1, 9):
        tokens = oracles.random_budgets(rng, S)
        schedule = BudgetSchedule.from_prior(tokens=tokens, prior="uniform")
        lengths = rng.integers(0, tokens[-1] + 3, size=(3, 4)).astype(np.int32)
        lengths[0] = [0, tokens[0], tokens[-1], tokens[-1] + 1]
        forks = budgets.forks_at_budgets(lengths, schedule)
        expected = [[oracles.forks_at_budgets(length, tokens) for length in row] for row in lengths]
        assert forks.shape == (3, 4, S) and forks.dtype == np.int32
        np.testing.assert_array_equal(forks, expected)


def test_forks_of_one_length():
    schedule = BudgetSchedule.from_prior(tokens=(2, 4), prior="uniform")
    np.testing.assert_array_equal(budgets.forks_at_budgets(np.int32(3), schedule), [2, 3])


def test_block_mask_equals_oracle():
    rng = np.random.default_rng(1)
    for S in range(1, 9):
        forks = oracles.random_forks(rng, (2, 6), oracles.random_budgets(rng, S))
        mask = budgets.block_mask(forks)
        assert mask.dtype == bool and mask.shape == forks.shape
        np.testing.assert_array_equal(mask, [[oracles.block_mask(trace) for trace in row] for row in forks])


def test_block_of_token_equals_oracle():
    rng = np.random.default_rng(2)
    for S in (1, 2, 4, 8):
        tokens = oracles.random_budgets(rng, S)
        mapped = jax.vmap(lambda forks, n=int(tokens[-1]) + 3: budgets.block_of_token(forks, n))
        forks = oracles.random_forks(rng, (12,), tokens)
        blocks = mapped(forks)
        assert blocks.dtype == np.int32
        np.testing.assert_array_equal(blocks, [oracles.block_of_token(trace, int(tokens[-1]) + 3) for trace in forks])


def test_block_of_token_by_hand():
    np.testing.assert_array_equal(budgets.block_of_token(np.asarray([2, 2, 3], np.int32), 5), [0, 0, 2, 3, 3])
    np.testing.assert_array_equal(budgets.block_of_token(np.asarray([0, 0], np.int32), 2), [2, 2])


def test_blocks_and_mask_agree():
    """A block is reached if and only if it holds a token."""
    rng = np.random.default_rng(3)
    tokens = oracles.random_budgets(rng, 5)
    forks = oracles.random_forks(rng, (20,), tokens)
    blocks = np.asarray(jax.vmap(lambda trace: budgets.block_of_token(trace, int(tokens[-1])))(forks))
    held = np.stack([(blocks == s).any(-1) for s in range(5)], axis=-1)
    np.testing.assert_array_equal(held, budgets.block_mask(forks))


# Spacings.


def test_exponential_budgets():
    assert budgets.exponential(8000, 4) == (1000, 2000, 4000, 8000)
    assert budgets.exponential(24, 3, 1.5) == (11, 16, 24)
    assert budgets.exponential(7, 1) == (7,)


def test_uniform_budgets():
    assert budgets.uniform(8000, 4) == (2000, 4000, 6000, 8000)
    assert budgets.uniform(10, 3) == (3, 7, 10) and budgets.uniform(5, 5) == (1, 2, 3, 4, 5)
    for last in range(1, 40):
        for size in range(1, last + 1):
            found = budgets.uniform(last, size)
            assert len(set(found)) == size and found[-1] == last and sorted(found) == list(found)


@pytest.mark.parametrize("given", [(8, 0), (8, 9), (0, 1)])
def test_uniform_budgets_that_cannot_be(given):
    with pytest.raises(ValueError, match=rf"last={given[0]}, size={given[1]}: at least 1 budget"):
        budgets.uniform(*given)


@pytest.mark.parametrize("given", [(8, 5, 2.0), (8, 0, 2.0), (8, 2, 1.0), (3, 3, 1.1)])
def test_exponential_budgets_that_cannot_be(given):
    with pytest.raises(ValueError, match=r"above 1|fewer budgets"):
        budgets.exponential(*given)


def test_drawn_budgets_are_a_fair_set_below_the_last():
    schedule = budgets.BudgetSchedule.from_prior((1, 2, 5), "linear")
    draw = jax.jit(budgets.draw, static_argnums=2)
    drawn = [draw(jax.random.key(i), schedule, 5) for i in range(600)]
    assert all((one.weights == schedule.weights).all() for one in drawn)
    found = collections.Counter(tuple(np.asarray(one.tokens).tolist()) for one in drawn)
    assert set(found) == {(a, b, 5) for a, b in itertools.combinations(range(1, 5), 2)}
    assert all(abs(number - 100) < 5 * math.sqrt(600 * (1 / 6) * (5 / 6)) for number in found.values())
    assert draw._cache_size() == 1
