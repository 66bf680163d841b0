"""The training page with start scores, episodes, values of the reference answer, and the fitted baseline."""

import numpy as np
import pytest
from test_train_page import assert_same_run, last_checkpoint, run

from tto_jax import metrics

SHORT = {"evaluation__every": 100, "log__samples_every": 2, "steps": 2}
MRT = SHORT | {
    **{"credit__estimator__kind": "mrt", "budgets__prior": "base", "episodes__separator": " ", "episodes__gap": 0},
    **{"episodes__rule": "delimiters", "episodes__markers": ("a", "b", "c"), "episodes__group": 1},
    **{"episodes__max_cuts": 2, "credit__answers": "grpo"},
}
GAE = SHORT | {"credit__estimator__kind": "progress_gae", "credit__estimator__gamma": 0.5, "rollout__start": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Holds the workdirs and beside them the one warm start."""
    return tmp_path_factory.mktemp("runs")


def rows_of(workdir):
    return [row for row in metrics.read_rows(workdir) if "score/anytime" in row]


@pytest.fixture(scope="module")
def mrt(base):
    """The rows of a run with episodes of words."""
    return rows_of(run(base / "mrt", **MRT))


def test_mrt_with_episodes(mrt):
    """Columns have the numbers of their episodes."""
    names = {f"{kind}/episode_{s}" for kind in ("score", "progress", "overthinking") for s in (1, 2, 3)}
    for row in mrt:
        assert names <= set(row) and not [name for name in row if name.startswith("score/6")]
        assert row["logprob_gap/max"] <= 1e-5
    assert len(mrt) == 2


@pytest.mark.slow
def test_mrt_with_episodes_does_not_depend_on_slots(base, mrt):
    for row, other in zip(mrt, rows_of(run(base / "slots", rollout__slots=6, **MRT)), strict=True):
        for name in ("score/anytime", "length/mean", "tokens", "regret/cumulative"):
            assert row[name] == other[name], name
        assert row["update/grad_norm"] == pytest.approx(other["update/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("values", ["reference", pytest.param("scores", marks=pytest.mark.slow)])
def test_progress_with_start_scores(base, values):
    rows = rows_of(run(base / f"gae_{values}", credit__fork_values=values, **GAE))
    before = 0
    for row in rows:
        assert 0 <= row["score/start"] <= 1 and row["progress/3"] is not None
        # 16 traces, 3 forks x 2 one-token answers each.
        assert row["length/mean"] * 16 + 96 == pytest.approx(row["tokens"] - before)
        before = row["tokens"]
        assert row["logprob_gap/max"] <= 1e-5
        if values == "reference":
            assert row["advantage/std/0"] > 0, "probabilities differ where scores may not"
    assert len(rows) == 2


def test_a_resumed_run_goes_on_with_the_baseline_it_has_fitted(base):
    """Six steps at once, and in two parts: the same to the bit."""
    fit = {"credit__estimator__leave_one_out": True, "credit__baseline_fit": 0.9, "evaluation__every": 100}
    whole = run(base / "whole", **fit)
    run(base / "parts", steps=3, **fit)
    parts = run(base / "parts", **fit)
    assert_same_run(parts, whole)
    records = [last_checkpoint(workdir)[2]["baseline_fit"] for workdir in (whole, parts)]
    assert records[0] == records[1] and np.asarray(records[0]["gram"]).shape == (2, 3, 3)
    assert all("residual/fit/1" in row for row in rows_of(whole))
