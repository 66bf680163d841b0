"""The door `credit.assign` against the literal loops, over shapes, estimators, options and many random problems."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from tto_jax.core import credit
from tto_jax.core.budgets import BudgetSchedule

# Corners (one trace, one budget, one answer) and the sizes training uses. Each shape is compiled once.
SHAPES = [
    (2, 1, 1, 1),
    (2, 4, 1, 3),
    (2, 2, 3, 1),
    (3, 5, 4, 2),
    (2, 3, 5, 4),
    (1, 1, 6, 2),
    (1, 7, 2, 5),
    (1, 16, 8, 5),
]
SEEDS = 5
NEEDS_GROUP = ("grpo", "rloo", "mrt", "mrt_explicit")
# One entry: estimator fields, arrays passed beside the scores, mode of the answers.
CASES = [
    ({"kind": "grpo"}, ("start",), "brpo"),
    ({"kind": "grpo", "leave_one_out": True}, (), "grpo"),
    ({"kind": "grpo", "std": True}, ("values",), "none"),
    ({"kind": "rloo"}, ("scored",), "brpo"),
    ({"kind": "rloo", "std": True}, ("start", "scored"), "grpo"),
    ({"kind": "brpo"}, (), "brpo"),
    ({"kind": "brpo", "decay": 0.9, "leave_one_out": True}, ("start", "scored", "values"), "brpo"),
    ({"kind": "brpo"}, ("coef",), "grpo"),
    ({"kind": "brpo", "leave_one_out": True}, ("coef", "scored", "start"), "none"),
    ({"kind": "prefix", "decay": 0.25}, ("scored",), "brpo"),
    ({"kind": "group"}, ("values",), "brpo"),
    ({"kind": "group", "leave_one_out": True}, ("start", "scored"), "brpo"),
    ({"kind": "none"}, ("scored", "values"), "grpo"),
    ({"kind": "mrt", "alpha": 0.7}, ("start",), "brpo"),
    ({"kind": "mrt", "alpha": 2.0, "leave_one_out": True}, ("start", "scored_by_fork"), "brpo"),
    ({"kind": "mrt", "std": True}, ("values", "start"), "brpo"),
    ({"kind": "mrt", "alpha": 1.5}, ("scored_by_fork", "values"), "brpo"),
    ({"kind": "progress_gae"}, ("start",), "brpo"),
    ({"kind": "progress_gae", "gamma": 0.6}, ("start", "scored_by_fork"), "grpo"),
    ({"kind": "progress_gae", "gamma": 0.0}, ("start", "values", "scored_by_fork"), "brpo"),
    ({"kind": "progress_gae", "gamma": 0.3, "progress_weights": "ones"}, ("start",), "none"),
    ({"kind": "progress_gae", "gamma": 0.5}, ("start", "start_value", "values"), "brpo"),
    ({"kind": "mrt"}, ("start_value", "values"), "brpo"),
    ({"kind": "mrt_termination"}, ("start", "scored"), "brpo"),
    ({"kind": "mrt_termination"}, ("start", "start_value", "values"), "grpo"),
    ({"kind": "mrt_joint"}, ("start",), "none"),
    ({"kind": "mrt_joint"}, ("start", "values"), "brpo"),
    ({"kind": "mrt_explicit", "alpha": 0.6}, ("start",), "brpo"),
    ({"kind": "mrt_explicit", "leave_one_out": True}, ("start", "start_value", "values"), "grpo"),
]


assign = jax.jit(credit.assign, static_argnames=("estimator", "answers"))


def cases_for(G):
    return [case for case in CASES if G > 1 or case[0]["kind"] not in NEEDS_GROUP]


def keywords(batch, arrays):
    return {name.removesuffix("_by_fork"): batch[name] for name in arrays}


def run_all(schedule, batch, cases):
    """All the cases of one shape in one program, so that a shape costs one compilation."""
    return [
        credit.assign(
            batch["correct"],
            batch["forks"],
            schedule,
            estimator=credit.Estimator(**fields),
            answers=answers,
            **keywords(batch, arrays),
        )
        for fields, arrays, answers in cases
    ]


def expect(batch, fields, arrays, answers):
    return oracles.assign(
        batch["correct"],
        batch["forks"],
        batch["weights"],
        answers=answers,
        **fields,
        **keywords(batch, arrays),
    )


def assert_credit(actual, expected, label):
    for name, array in expected.items():
        value = getattr(actual, name)
        if array is None:
            assert value is None, (name, label)
        elif name == "block_mask":
            assert value.dtype == bool
            np.testing.assert_array_equal(value, array, err_msg=f"{name} {label}")
        else:
            assert value.dtype == np.float32
            atol = 3e-6 * (1.0 + np.abs(array).max())
            np.testing.assert_allclose(value, array, atol=atol, rtol=3e-5, err_msg=f"{name} {label}")


def without_ties(actual, expected):
    """Sets problems to 0 where the exact deviation is 0: float32 scores one unit apart are divided by 1e-6 there.

    Scores that are equal in float32 too are tested in test_identities.
    """
    tied = np.abs(expected["trace_advantage"]).max((1, 2), keepdims=True) < 1e-6
    return dataclasses.replace(actual, trace_advantage=jnp.where(tied, 0.0, actual.trace_advantage))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_door_equals_oracle(shape):
    cases = cases_for(shape[1])
    jitted = jax.jit(lambda schedule, batch: run_all(schedule, batch, cases))
    for seed in range(SEEDS):
        batch = oracles.random_batch(np.random.default_rng((seed, *shape)), *shape)
        results = jitted(BudgetSchedule.from_weights(batch["weights"]), batch)
        for actual, case in zip(results, cases):
            expected = expect(batch, *case)
            if case[0].get("std") or case[0]["kind"] in ("mrt_joint", "mrt_explicit"):
                actual = without_ties(actual, expected)
            assert_credit(actual, expected, (case, seed))


def test_eager_equals_oracle():
    """Without jit too: the door itself never compiles."""
    rng = np.random.default_rng(0)
    batch = oracles.random_batch(rng, 2, 4, 5, 3)  # the shape of test_identities, which compiles the same operations
    schedule = BudgetSchedule.from_weights(batch["weights"])
    for case in (CASES[6], CASES[14]):
        (actual,) = run_all(schedule, batch, [case])
        assert_credit(actual, expect(batch, *case), case)


@pytest.mark.parametrize("kind", credit.KINDS)
def test_name_means_the_default_estimator(kind):
    batch = oracles.random_batch(np.random.default_rng(1), 2, 3, 4, 2)
    schedule = BudgetSchedule.from_weights(batch["weights"])
    actual = assign(batch["correct"], batch["forks"], schedule, estimator=kind, start=batch["start"])
    assert_credit(actual, expect(batch, {"kind": kind}, ("start",), "brpo"), kind)


def test_released_setup_by_hand():
    """Two traces, two budgets, one answer: small enough to work out on paper."""
    schedule = BudgetSchedule.from_prior(tokens=(10, 30), prior="linear")  # P = (1/4, 3/4), tail = (1, 3/4)
    correct = np.asarray([[[[0.0], [1.0]], [[1.0], [1.0]]]], np.float32)
    forks = np.asarray([[[10, 30], [7, 7]]], np.int32)
    actual = assign(correct, forks, schedule, estimator="brpo", answers="brpo")
    # R = [[.75, .75], [1, .75]]; V1 = [[0, 0], [0, .75]]; V2 = [.875, .75]; V = V2 at s=0, (V1 + V2) / 2 at s=1.
    np.testing.assert_allclose(actual.trace_advantage[0], [[-0.125, 0.375], [0.125, 0.0]], atol=1e-7)
    np.testing.assert_array_equal(actual.block_mask[0], [[True, True], [True, False]])
    np.testing.assert_allclose(actual.answer_advantage[0, :, :, 0], [[-0.5, 0.0], [0.5, 0.0]], atol=1e-7)
    assert actual.start_advantage is None


def test_answers_of_one_fork_are_pooled():
    """A trace that ended before the first of three budgets has one fork and six answers."""
    schedule = BudgetSchedule.from_prior(tokens=(10, 20, 30), prior="uniform")
    correct = np.asarray([[[[1, 0], [1, 1], [0, 0]]]], np.float32)
    forks = np.full((1, 1, 3), 4, np.int32)
    actual = assign(correct, forks, schedule, estimator="brpo", answers="brpo")
    np.testing.assert_allclose(actual.answer_advantage[0, 0], correct[0, 0] - 0.5, atol=1e-7)
    # An unscored column leaves the pool and gets nothing.
    scored = np.asarray([[[True, False, True]]])
    actual = assign(correct, forks, schedule, estimator="brpo", answers="brpo", scored=scored)
    np.testing.assert_allclose(actual.answer_advantage[0, 0], [[0.75, -0.25], [0, 0], [-0.25, -0.25]], atol=1e-7)


@pytest.mark.parametrize("garbage", [99.0, np.nan], ids=str)
@pytest.mark.parametrize("A", [1, 3])
def test_unscored_values_never_matter(A, garbage):
    """What stands in an unscored column is not read: grading may leave anything there.

    Without jit, which rewrites 0 * x as a choice and so hides an x that is not a number.
    """
    batch = oracles.random_batch(np.random.default_rng(2), 2, 4, 5, A)
    batch["scored"] = np.random.default_rng(3).random((2, 4, 5)) < 0.5
    other = dict(batch, correct=np.where(batch["scored"][..., None], batch["correct"], np.float32(garbage)))
    other["values"] = np.where(batch["scored"], batch["values"], np.float32(garbage))
    schedule = BudgetSchedule.from_weights(batch["weights"])
    cases = [({"kind": kind}, ("start", "scored"), "brpo") for kind in ("grpo", "brpo", "mrt", "progress_gae")]
    cases += [({"kind": "brpo"}, ("scored", "values"), "brpo"), ({"kind": "mrt"}, ("scored", "values"), "brpo")]
    for one, two in zip(run_all(schedule, batch, cases), run_all(schedule, other, cases)):
        np.testing.assert_array_equal(two.trace_advantage, one.trace_advantage)
        np.testing.assert_array_equal(two.answer_advantage, one.answer_advantage)


def test_one_fork_has_one_value_whichever_of_its_columns_is_scored():
    """Progress over the blocks that have tokens telescopes, so a score must not land in a column that has none.

    The trace ends at 15: columns 1 and 2 are one state. Scoring either of them is the same measurement.
    """
    schedule = BudgetSchedule.from_prior(tokens=(10, 20, 30), prior="base")
    forks, start = np.asarray([[[10, 15, 15]]], np.int32), np.zeros((1, 1), np.float32)
    correct = np.asarray([[[[0.25], [0.75], [0.75]]]], np.float32)
    estimator = credit.Estimator("progress_gae", gamma=0.0)
    for scored in ([True, True, True], [True, True, False], [True, False, True]):
        result = assign(correct, forks, schedule, estimator=estimator, start=start, scored=np.asarray([[scored]]))
        np.testing.assert_allclose(result.trace_advantage[0, 0], [0.25, 0.5, 0.0], err_msg=str(scored))
