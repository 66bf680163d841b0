"""What the door refuses, and that the message holds the value, the rule and the choices."""

import re

import jax
import numpy as np
import pytest

from tto_jax.core import credit
from tto_jax.core.budgets import BudgetSchedule

KINDS = (
    *("grpo", "rloo", "brpo", "prefix", "group", "none", "mrt", "progress_gae"),
    *("mrt_termination", "mrt_joint", "mrt_explicit"),
)
B, G, S, A = 2, 3, 4, 2


def arguments(**changes):
    result = {
        "correct": np.zeros((B, G, S, A), np.float32),
        "forks": np.tile(np.arange(1, S + 1, dtype=np.int32), (B, G, 1)),
        "schedule": BudgetSchedule.from_prior(tokens=range(1, S + 1), prior="uniform"),
        "estimator": "brpo",
        "answers": "brpo",
    }
    return result | changes


def refusal(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    return str(error.value)


def assign_refusal(**changes):
    return refusal(credit.assign, **arguments(**changes))


def has_words(message, *words):
    missing = [word for word in words if not re.search(rf"(?<![\w.]){re.escape(str(word))}", message)]
    assert not missing, f"{missing} not in {message!r}"


def test_the_arguments_are_legal():
    """Otherwise each test below could pass for the wrong reason."""
    result = jax.eval_shape(lambda: credit.assign(**arguments()))
    assert result.trace_advantage.shape == (B, G, S)


# Shapes: the message names the argument and shows the shape that was passed.
SHAPES = [
    ("correct", np.zeros((B, G, S), np.float32)),
    ("correct", np.zeros((B, G, S, A, 1), np.float32)),
    ("forks", np.ones((B, G), np.int32)),
    ("forks", np.ones((B, G, S + 1), np.int32)),
    ("forks", np.ones((B, G + 1, S), np.int32)),
    ("forks", np.ones((B + 1, G, S), np.int32)),
    ("start", np.zeros(B, np.float32)),
    ("start", np.zeros((B + 1, 2), np.float32)),
    ("values", np.zeros((B, G, S, A), np.float32)),
    ("values", np.zeros((B, G, S - 1), np.float32)),
    ("scored", np.ones((B, G), bool)),
    ("scored", np.ones((B, G, S + 1), bool)),
    ("coef", np.zeros((S, 2), np.float32)),
    ("coef", np.zeros((S + 1, 3), np.float32)),
    ("coef", np.zeros((B, S, 3), np.float32)),
]


@pytest.mark.parametrize(("name", "array"), SHAPES, ids=lambda x: x if isinstance(x, str) else str(x.shape))
def test_wrong_shape(name, array):
    message = assign_refusal(**{name: array})
    has_words(message, name)
    assert str(array.shape) in message, message


@pytest.mark.parametrize("empty", [(0, G, S, A), (B, 0, S, A), (B, G, 0, A), (B, G, S, 0)], ids=str)
def test_empty_axes(empty):
    forks = np.ones(empty[:3], np.int32)
    message = assign_refusal(correct=np.zeros(empty, np.float32), forks=forks)
    assert str(empty) in message, message


def test_schedule_of_another_length():
    message = assign_refusal(schedule=BudgetSchedule.from_weights([1.0] * (S + 1)))
    has_words(message, S, S + 1)


@pytest.mark.parametrize("estimator", ["bropo", "GRPO", ""])
def test_unknown_estimator(estimator):
    has_words(assign_refusal(estimator=estimator), repr(estimator), *KINDS)


def test_unknown_kind_in_an_estimator():
    has_words(refusal(lambda: credit.assign(**arguments(estimator=credit.Estimator("ppo")))), "'ppo'", *KINDS)


@pytest.mark.parametrize("answers", ["rloo", "mean"])
def test_unknown_answer_mode(answers):
    has_words(assign_refusal(answers=answers), repr(answers), "brpo", "grpo", "none")


@pytest.mark.parametrize("kind", ["grpo", "rloo", "mrt"])
def test_one_trace_where_a_group_is_needed(kind):
    one = {"correct": np.zeros((B, 1, S, A), np.float32), "forks": np.ones((B, 1, S), np.int32)}
    message = assign_refusal(estimator=kind, start=np.zeros((B, 1), np.float32), **one)
    has_words(message, kind, "G")
    has_words(message, "1")
    has_words(message, "brpo", "prefix", "none")  # what works with one trace


@pytest.mark.parametrize("kind", ["brpo", "prefix", "group", "none", "progress_gae", "mrt_termination", "mrt_joint"])
def test_one_trace_where_it_is_legal(kind):
    kwargs = arguments(correct=np.zeros((B, 1, S, A), np.float32), forks=np.ones((B, 1, S), np.int32))
    arrays = {name: kwargs[name] for name in ("correct", "forks", "schedule")}
    result = jax.eval_shape(lambda arrays: credit.assign(**arrays, estimator=kind, start=np.zeros((B, 1))), arrays)
    assert result.trace_advantage.shape == (B, 1, S)


@pytest.mark.parametrize("kind", ["progress_gae", "mrt_termination", "mrt_joint", "mrt_explicit"])
def test_kinds_that_need_start(kind):
    has_words(assign_refusal(estimator=kind), kind, "start")


@pytest.mark.parametrize("kind", ["brpo", "prefix", "group", "none", "progress_gae", "mrt_joint", "mrt_explicit"])
def test_std_on_a_kind_that_has_none(kind):
    def door():
        return credit.assign(
            start=np.zeros((B, 1), np.float32), **arguments(estimator=credit.Estimator(kind, std=True))
        )

    has_words(refusal(door), kind, "std", "grpo", "rloo", "mrt")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "brpo"])
def test_coef_on_a_kind_that_has_none(kind):
    coef, start = np.zeros((S, 3), np.float32), np.zeros((B, 1), np.float32)
    has_words(assign_refusal(estimator=kind, coef=coef, start=start), kind, "coef", "brpo")


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("weights", "word"), [([0.5, -0.25], "-0.25"), ([0.0, 0.0], "0.0"), ([1.0, float("nan")], "nan")], ids=str
)
def test_bad_weights(weights, word):
    has_words(refusal(BudgetSchedule.from_weights, weights), word)
    has_words(refusal(BudgetSchedule.from_prior, tokens=(1, 2), prior=weights), word)


def test_no_weights():
    refusal(BudgetSchedule.from_weights, [])


def test_weights_of_the_wrong_rank():
    assert "(1, 2)" in refusal(BudgetSchedule.from_weights, [[0.5, 0.5]])


def test_wrong_number_of_weights():
    has_words(refusal(BudgetSchedule.from_prior, tokens=(1, 2, 3), prior=[0.5, 0.5]), 2, 3)


def test_unknown_prior():
    message = refusal(BudgetSchedule.from_prior, tokens=(1, 2), prior="exponential")
    has_words(message, "'exponential'", "uniform", "linear", "base")


@pytest.mark.parametrize("tokens", [(4, 2), (2, 2), (0, 2), (-2, 2), (2, 4, 3)], ids=str)
def test_budgets_that_do_not_increase(tokens):
    message = refusal(BudgetSchedule.from_prior, tokens=tokens, prior="uniform")
    has_words(message, *tokens)
    assert re.search("increas|positive", message), message


def test_no_budgets():
    refusal(BudgetSchedule.from_prior, tokens=(), prior="uniform")
