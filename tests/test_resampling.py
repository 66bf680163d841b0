"""Dynamic sampling: which problems a batch holds after their replacement, against a loop; and in a training run."""

import numpy as np
import pytest
from test_train_page import assert_same_run, run

from tto_jax import metrics, resampling
from tto_jax.core.types import Prompts
from tto_jax.data import Batch

B, G = 4, 2


def rollout(number, signal):
    """Batch `number`: problems that are named by numbers, rows that say whose they are, scores with signal or not."""
    name = 10 * number + np.arange(B)
    prompts = Prompts(tokens=name[:, None], length=np.ones(B, np.int32), id=name.astype(np.uint32))
    batch = Batch(problems=tuple(name.tolist()), prompts=prompts, valid=np.ones(B, bool))
    rows = {"trace": np.repeat(name, G), "which": np.tile(np.arange(G), B)}
    correct = np.full((B, G, 2, 1), number % 2, np.float32)
    correct[np.asarray(signal, bool), 1, 0, 0] = 1 - number % 2
    return batch, rows, correct


def by_loop(signals, most):
    """Names of the problems, rounds used, and how many of them have no signal."""
    good, poor, rounds = [], [], 0
    for number, signal in enumerate(signals[: 1 + most]):
        if number and len(good) >= B:
            break
        rounds = number
        for i, has in enumerate(signal):
            (good if has else poor).append(10 * number + i)
    names = (good + poor)[:B]
    return sorted(names), rounds, sum(name in poor for name in names)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_replacement_equals_a_loop(most):
    rng = np.random.default_rng(most)
    for share in (0.0, 0.3, 0.6, 1.0):
        signals = rng.random((1 + most, B)) < share
        coming = iter([rollout(n, signal) for n, signal in enumerate(signals)])
        found = resampling.replace(*next(coming), lambda: next(coming), most)  # noqa: B023
        names, rounds, lacking = by_loop(signals.tolist(), most)
        assert (list(found.batch.problems), found.rounds, found.lacking) == (names, rounds, lacking)
        np.testing.assert_array_equal(found.batch.prompts.id, names)
        np.testing.assert_array_equal(found.rows["trace"], np.repeat(names, G))
        np.testing.assert_array_equal(found.rows["which"], np.tile(np.arange(G), B))
        everything = np.sort(np.concatenate([found.rows["trace"], found.dropped["trace"]]))
        sampled = [10 * n + i for n in range(1 + rounds) for i in range(B)]
        np.testing.assert_array_equal(everything, np.repeat(sampled, G))


def test_signal_is_any_difference_between_scores():
    correct = np.zeros((4, 2, 2, 2), np.float32)
    correct[1] = 1.0
    correct[2, 0, 1, 0] = 1.0
    correct[3, :, 1] = 1.0
    assert resampling.has_signal(correct).tolist() == [False, False, True, True]


def test_a_run_that_replaces_problems_and_draws_budgets(tmp_path):
    """Six steps at once, and in two parts: the same to the bit; what was dropped counts as sampled."""
    options = {
        "rollout__resample": 2,
        "budgets__sampled": True,
        "evaluation__every": 100,
        "credit__mask_overlong": True,
    }
    whole = run(tmp_path / "whole", **options)
    run(tmp_path / "parts", steps=3, **options)
    assert_same_run(run(tmp_path / "parts", **options), whole)
    rows = [row for row in metrics.read_rows(whole) if "score/anytime" in row]
    assert len(rows) == 6 and any(row["resample/rounds"] for row in rows)
    before = 0
    for row in rows:
        assert {"score/budget_1", "score/budget_2"} <= set(row) and "score/6" not in row
        assert 0 <= row["resample/rounds"] <= 2 and (row["resample/rounds"] == 2 or not row["resample/lacking"])
        assert (row["resample/dropped_tokens"] > 0) == (row["resample/rounds"] > 0)
        assert row["groups/without_signal"] >= row["resample/lacking"] / 4
        assert row["tokens"] - before > row["resample/dropped_tokens"]
        before = row["tokens"]
