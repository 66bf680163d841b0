"""The small stored case: the library gives it, the oracle still gives it, and a person worked part of it out."""

import json

import jax
import make_golden
import numpy as np
import pytest

from tto_jax.core import credit
from tto_jax.core.budgets import BudgetSchedule

GOLDEN = json.loads(make_golden.PATH.read_text())
DTYPES = {"correct": np.float32, "forks": np.int32, "scored": bool}


def name_of(case):
    return "-".join(f"{key}={value}" for key, value in case["estimator"].items()) + "".join(case["arrays"])


def array(name):
    return np.asarray(GOLDEN["inputs"][name], DTYPES.get(name, np.float32))


def case_of(**estimator):
    (case,) = [case for case in GOLDEN["cases"] if case["estimator"] == estimator and not case["arrays"]]
    return case["expected"]


@pytest.fixture(scope="module")
def credits():
    """Every case in one program."""
    configuration = GOLDEN["configuration"]
    schedule = BudgetSchedule.from_prior(tokens=configuration["tokens"], prior=configuration["prior"])

    def run(inputs):
        return {
            name_of(case): credit.assign(
                inputs["correct"],
                inputs["forks"],
                schedule,
                estimator=credit.Estimator(**case["estimator"]),
                answers=case["answers"],
                **{name: inputs[name] for name in case["arrays"]},
            )
            for case in GOLDEN["cases"]
        }

    return jax.jit(run)({name: array(name) for name in GOLDEN["inputs"]})


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=name_of)
def test_library_gives_the_golden(case, credits):
    actual = credits[name_of(case)]
    for name, expected in case["expected"].items():
        if expected is None:
            assert getattr(actual, name) is None
        else:
            np.testing.assert_allclose(getattr(actual, name), expected, atol=2e-6, err_msg=name)


def test_oracle_still_gives_the_golden():
    """A change of the oracle must show as a change of the stored file: run make_golden.py and read the difference."""
    assert json.loads(make_golden.dumps(make_golden.build())) == GOLDEN


def test_golden_by_hand():
    """Problem 0: P = (1/4, 1/4, 1/2), tail = (1, 3/4, 1/2), r = [[0, 1/2, 1], [1/2, 1, 1/2]]."""
    # R = [[5/8, 5/8, 1/2], [5/8, 1/2, 1/4]].
    np.testing.assert_allclose(
        case_of(kind="none")["trace_advantage"][0], [[5 / 8, 5 / 8, 1 / 2], [5 / 8, 1 / 2, 1 / 4]]
    )
    # V2 = (5/8, 9/16, 3/8).
    np.testing.assert_allclose(
        case_of(kind="group")["trace_advantage"][0], [[0, 1 / 16, 1 / 8], [0, -1 / 16, -1 / 8]], atol=1e-12
    )
    # V1 = (0, tail_1 r_0, tail_2 (r_0 / 4 + r_1 / 2) / (3/4)) = (0, 0, 1/6) and (0, 3/8, 5/12).
    np.testing.assert_allclose(
        case_of(kind="prefix")["trace_advantage"][0], [[5 / 8, 5 / 8, 1 / 3], [5 / 8, 1 / 8, -1 / 6]]
    )
    # R - (s V1 + (3 - s) V2) / 3.
    np.testing.assert_allclose(
        case_of(kind="brpo")["trace_advantage"][0],
        [[0, 5 / 8 - 3 / 8, 1 / 2 - (1 / 9 + 1 / 8)], [0, 1 / 2 - (1 / 8 + 3 / 8), 1 / 4 - (5 / 18 + 1 / 8)]],
        atol=1e-12,
    )
    # The last scores are 1 and 1/2, on every block.
    np.testing.assert_allclose(case_of(kind="grpo")["trace_advantage"][0], [[1 / 4] * 3, [-1 / 4] * 3])
    # Trace 1 ended at 5: one fork, six answers, four of them right.
    np.testing.assert_allclose(
        case_of(kind="brpo")["answer_advantage"][0][1], [[1 / 3, -2 / 3], [1 / 3, 1 / 3], [-2 / 3, 1 / 3]]
    )
    assert case_of(kind="brpo")["block_mask"][0] == [[True, True, True], [True, False, False]]
