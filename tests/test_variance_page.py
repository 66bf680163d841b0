"""`python -m tto_jax.variance` after `evaluate --as_training`: numbers of the kept scores, files, misuse."""

import json

import numpy as np
import pytest
from test_evaluate_page import SMALL, page, results_of, save_run
from test_report import make_run

from configs import peak
from tto_jax import settings, variance
from tto_jax.core import variance as core
from tto_jax.models import decoder

TRAINED = {
    "budgets.tokens": (3, 6),
    "rollout.group_size": 4,
    "rollout.answers": 3,
    "rollout.temperature": 1.5,
    "evaluation.final_problems": 12,
}


def with_config(path, prior="uniform"):
    section = {"estimator": {"decay": 0.5}, "baseline_ridge": 1.0}
    config = {"variant": path.name, "budgets": {"prior": prior}, "credit": section}
    (path / "config.json").write_text(json.dumps(config))
    return path


def share_of_others(correct, forks, s):
    """Var[R - V2 of the others] / Var[R], Var[R] and the share of traces in block s, uniform prior, by loops."""
    B, G, S, _ = correct.shape
    left, returns = [], []
    for b in range(B):
        R = []
        for g in range(G):
            pooled = [
                np.mean([correct[b, g, j] for j in range(S) if forks[b, g, j] == forks[b, g, k]]) for k in range(S)
            ]
            R.append(sum(pooled[s:]) / S)
        for g in range(G):
            if forks[b, g, s] > (forks[b, g, s - 1] if s else 0):
                returns.append(R[g])
                left.append(R[g] - (sum(R) - R[g]) / (G - 1))
    return np.var(left) / np.var(returns), np.var(returns), len(returns) / (B * G)


def test_of_what_training_samples(tmp_path, capsys):
    config = peak.get_config("brpo")
    config.update_from_flattened_dict(SMALL | TRAINED)
    save_run(tmp_path / "run", config, decoder.init_params(settings.build(config).model, 0), steps=(1,))
    out = tmp_path / "as_training"
    page(f"--workdir={tmp_path / 'run'}", "--as_training", f"--out={out}")
    results = results_of(out)
    assert (results["budgets"], results["traces"], results["answers"]) == ([3, 6], 4, 3)
    assert results["temperature"] == 1.5 and results["problems"] == 12

    capsys.readouterr()
    variance.main([str(out), f"--out={tmp_path / 'study'}"])
    record = json.loads((tmp_path / "study" / "results.json").read_text())["studies"]["as_training"]
    assert record["prior"] == [0.5, 0.5] and record["set"] == "peak" and record["step"] == 1
    scores = np.load(out / "evaluation" / "scores.npz")
    for s in (0, 1):
        share, var, reached = share_of_others(scores["correct"], scores["forks"], s)
        np.testing.assert_allclose(record["residual"]["group_leave_one_out"][s], share, rtol=1e-4)
        np.testing.assert_allclose((record["variance"][s], record["reached"][s]), (var, reached), rtol=1e-4)
    for name in core.BASELINES:
        for key in ("residual", "difference"):
            values, intervals = np.asarray(record[key][name]), np.asarray(record[f"{key}_ci95"][name])
            assert (intervals[:, 0] <= values + 0.2).all() and (values - 0.2 <= intervals[:, 1]).all()
    assert record["difference"]["group_leave_one_out"] == [0, 0]
    text = capsys.readouterr().out
    assert (tmp_path / "study" / "table.txt").read_text() == text
    assert f"{record['residual']['brpo'][1]:.3f} [" in text and "12 problems x 4 traces x 3 answers" in text
    assert (tmp_path / "study" / "residuals.png").read_bytes().startswith(b"\x89PNG")

    # A seed of the bootstrap decides the intervals and nothing else.
    (again,), (other,) = (variance.measure(out, seed) for seed in (0, 1))
    assert again.record == record and other.record["residual"] == record["residual"]
    assert other.record["residual_ci95"] != record["residual_ci95"]


def test_several_runs_of_a_variant(tmp_path, capsys):
    """Their mean and extremes; a start has no block; two sets are told apart."""
    paths = [with_config(make_run(tmp_path / f"run_{seed}", seed=seed)) for seed in (0, 1)]
    for path in paths:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"variant": "brpo"}))
    variance.main([*map(str, paths), f"--out={tmp_path / 'study'}"])
    studies = json.loads((tmp_path / "study" / "results.json").read_text())["studies"]
    values = [studies[path.name]["residual"]["regression"][2] for path in paths]
    text = capsys.readouterr().out
    assert "2 runs: mean (lowest, highest)" in text
    assert f"{np.mean(values):.3f} ({min(values):.3f}, {max(values):.3f})" in text

    started = with_config(make_run(tmp_path / "started", budgets=[0, 8, 16]))
    (found,) = variance.measure(started, 0)
    assert found.record["columns"] == [8, 16] and found.values("residual").shape == (6, 2)

    file = started / "evaluation" / "scores.npz"
    scores = dict(np.load(file))
    results = json.loads((started / "evaluation" / "results.json").read_text())
    accuracy = scores["correct"].mean(axis=(1, 3))
    results["accuracy"] = np.mean([accuracy[:10].mean(axis=0), accuracy[10:].mean(axis=0)], axis=0).tolist()
    (started / "evaluation" / "results.json").write_text(json.dumps(results))
    np.savez(file, **scores, set=np.repeat([0, 1], [10, 30]).astype(np.int32), set_names=np.array(["few", "many"]))
    found = variance.measure(started, 0)
    assert [(study.name, study.record["problems"]) for study in found] == [("started/few", 10), ("started/many", 30)]


@pytest.mark.parametrize(
    ("prepare", "arguments", "said"),
    [
        (lambda path: path, (), ("config.json is missing", "--as_training")),
        (lambda path: with_config(path, prior=[1, 2]), (), ("(2,)", "(3,)", "one weight a budget", "--as_training")),
        (with_config, ("--seed=-1",), ("--seed=-1", "[0, 2**32)")),
    ],
)
def test_refused(tmp_path, capsys, prepare, arguments, said):
    run = prepare(make_run(tmp_path / "run"))
    with pytest.raises(SystemExit):
        variance.main([str(run), f"--out={tmp_path / 'out'}", *arguments])
    text = capsys.readouterr().err
    assert all(words in text for words in said), text
    assert not (tmp_path / "out").exists()


def test_one_trace_a_problem_is_refused(tmp_path):
    run = with_config(make_run(tmp_path / "run"))
    file = run / "evaluation" / "scores.npz"
    scores = {name: x[:, :1] if x.ndim > 1 else x for name, x in np.load(file).items()}
    np.savez(file, **scores)
    results = json.loads((run / "evaluation" / "results.json").read_text())
    results["accuracy"] = scores["correct"].mean(axis=(0, 1, 3)).tolist()
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"40 problems of 1 traces .*2 or more of both"):
        variance.measure(run, 0)


def test_a_prior_by_tokens_over_episodes_is_refused(tmp_path):
    run = with_config(make_run(tmp_path / "run", budgets=[1, 2, 3], forks="episodes"), prior="linear")
    with pytest.raises(ValueError, match="prior='linear' over episodes"):
        variance.measure(run, 0)
    (found,) = variance.measure(with_config(run), 0)
    assert found.record["forks"] == "episodes"
