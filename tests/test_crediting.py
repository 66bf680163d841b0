"""Penalties of traces between scores and credit: each by its own option, and all in one order."""

import types

import numpy as np
import pytest

from tto_jax import crediting
from tto_jax.core import rewards

OFF = types.SimpleNamespace(serial_decay=False, length_penalty=0.0, relative_length_penalty=0.0, overlong_margin=0)
RNG = np.random.default_rng(0)
CORRECT = (RNG.random((3, 4, 3, 2)) < 0.5).astype(np.float32)
LENGTH = RNG.integers(1, 40, (3, 4)).astype(np.int32)


def shaped(**options):
    return np.asarray(crediting.shaped(types.SimpleNamespace(**vars(OFF) | options), CORRECT, LENGTH, 40))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({}, lambda: CORRECT),
        ({"serial_decay": True}, lambda: rewards.serial_decay(CORRECT)),
        ({"length_penalty": 0.5}, lambda: rewards.length_penalty(CORRECT, LENGTH, 40, 0.5)),
        ({"relative_length_penalty": 0.2}, lambda: rewards.relative_length_penalty(CORRECT, LENGTH, 0.2)),
        ({"overlong_margin": 8}, lambda: rewards.overlong_penalty(CORRECT, LENGTH, 40, 8)),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_an_option_is_its_penalty(option, expected):
    np.testing.assert_array_equal(shaped(**option), np.asarray(expected()))
    assert option == {} or (shaped(**option) != CORRECT).any()


def test_wrong_answers_are_not_paid():
    every = shaped(serial_decay=True, length_penalty=0.2, relative_length_penalty=0.2)
    assert (every[CORRECT == 0] == 0).all() and (every[CORRECT == 1] > 0).all()
