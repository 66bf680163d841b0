"""Forks that the host finds between the phases: the same tokens with slots, on a mesh, and in two phases by hand."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_rollout import CONFIG, MODEL, C, assert_same_rollout, make_prompts, params

from tto_jax import rollout, sharding
from tto_jax.core.budgets import BudgetSchedule

S = 3
SCHEDULE = BudgetSchedule.from_weights((1, 1, 1))
SLOTS = dataclasses.replace(CONFIG, slots=6, answer_slots=4)


@pytest.fixture(scope="module", autouse=True)
def unoptimized():
    """These programs run a few times at most: compiling them dominates."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def rule(tokens, length):
    """Before the first two tokens that 3 divides, the trace's own first one left out; then at its end."""
    forks = np.repeat(np.asarray(length, np.int32)[:, None], S, axis=1)
    for row, ids, n in zip(forks, tokens, length):
        cuts = [t for t in range(1, n) if ids[t] % 3 == 0][: S - 1]
        row[: len(cuts)] = cuts
    return forks


def sample(config, start=False, cut=rule):
    prompts, cuts = sharding.put_rows(make_prompts()), rollout.Cuts(sharding.put(SCHEDULE), start, cut)
    weights = rollout.weights(MODEL, params())
    key = sharding.put(jax.random.fold_in(jax.random.key(0), 50))
    with jax.transfer_guard("disallow"):
        *result, _ = rollout.sample(MODEL, config, weights, prompts, key, cuts)
        return jax.device_get(tuple(result))


@functools.cache
def expected():
    """The two phases one after the other, with forks from the finished traces."""
    key, prompts = jax.random.fold_in(jax.random.key(0), 50), jax.device_put(make_prompts())
    traces, trunk = rollout.sample_traces(MODEL, CONFIG, params(), prompts, key)
    forks = rule(np.asarray(traces.tokens), np.asarray(traces.length))
    answers = rollout.sample_answers(MODEL, CONFIG, params(), trunk, traces, jax.device_put(forks), key)
    return jax.device_get((traces, forks, answers))


@pytest.mark.parametrize("config", [CONFIG, SLOTS], ids=["all", 6])
def test_tokens_do_not_depend_on_slots(config):
    _, forks, _ = expected()
    assert ((forks[:, 0] > 0) & (forks[:, 0] < forks[:, 1]) & (forks[:, 1] < forks[:, 2])).any(), "three episodes"
    assert (forks[:, 0] == forks[:, 2]).any(), "one episode: the later columns share its end"
    assert_same_rollout(sample(config), expected())


def test_the_rule_sees_finished_traces_only():
    """Every trace once, with no more tokens than it has in the end; lanes without a trace are empty."""
    seen = []

    def watched(tokens, length):
        seen.extend(tuple(row[:n].tolist()) for row, n in zip(tokens, length) if n)
        assert tokens.shape[1] == C
        return rule(tokens, length)

    traces, _, _ = sample(SLOTS, cut=watched)
    whole = [tuple(row[:n].tolist()) for row, n in zip(traces.tokens, traces.length)]
    assert sorted(seen) == sorted(whole)


def test_start_is_one_more_column():
    """The same traces, a first fork of 0, and the same forks after it."""
    traces, forks, _ = sample(SLOTS, start=True)
    assert_same_rollout((traces, forks[:, 1:]), expected()[:2])
    assert not forks[:, 0].any()


@pytest.mark.slow
def test_on_a_mesh():
    mesh = sharding.make_mesh((2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert_same_rollout(sample(SLOTS), expected())
