import json
import re

import jax
import numpy as np
import pytest

from tto_jax import report
from tto_jax.core import anytime

BUDGETS = [8, 16, 32]


def make_run(path, *, variant=None, seed=0, warm=0, skill=0.4, first=0, budgets=BUDGETS, order=None, **changes):
    ids = np.arange(first, first + 40, dtype=np.uint32)
    B, G, S, A = len(ids), 4, len(budgets), 2
    draws = np.random.default_rng([seed, warm])
    hardness = np.random.default_rng(7).random(10_000)[ids][:, None, None, None]
    p = np.clip(skill + 0.1 * np.arange(S)[:, None] + 0.4 * (hardness - 0.5), 0, 1)
    correct = (draws.random((B, G, S, A)) < p).astype(np.float32)
    if order is not None:
        ids, correct = ids[order], correct[order]
    accuracy = correct.mean((0, 1, 3))
    low, high = anytime.bootstrap_interval(correct.mean((1, 3)), jax.random.key(0), 100)
    results = {
        "budgets": list(budgets),
        "accuracy": accuracy.tolist(),
        "accuracy_ci95": np.stack([low, high], 1).tolist(),
        "anytime": float(accuracy.mean()),
        "anytime_ci95": [float(accuracy.mean()) - 0.02, float(accuracy.mean()) + 0.02],
        "final": float(accuracy[-1]),
        "mean_length": 21.5 + seed,
        "spent": [budget + 5.5 for budget in budgets],
        "regret_tokens": [32],
        "regret@32": 0.7 - skill / 2,
        "problems": B,
        "seed": seed,
        "warm_start_seed": warm,
        "tokens": 1_234_567,
        "seconds": 61.2,
        "config_hash": "0123456789ab",
        "commit": "abc",
        "versions": {"jax": "0.10"},
    } | changes
    (path / "evaluation").mkdir(parents=True)
    (path / "evaluation" / "results.json").write_text(json.dumps(results))
    forks = np.broadcast_to(np.array(budgets, np.int32), (B, G, S))
    np.savez(path / "evaluation" / "scores.npz", correct=correct, forks=forks, id=ids)
    if variant:
        (path / "config.json").write_text(json.dumps({"variant": variant}))
    rows = [{"step": s, "tokens": 1000 * s, "loss": 0.1} for s in range(6)]
    for row in rows[::2]:
        row["eval/anytime"] = skill + row["step"] / 100
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    for k in range(3):
        make_run(tmp_path / f"grpo_{k}", variant="grpo", seed=k, warm=k, skill=0.4)
        make_run(tmp_path / f"brpo_{k}", variant="brpo", seed=k, warm=k, skill=0.55)
    return [tmp_path / f"{v}_{k}" for v in ("grpo", "brpo") for k in range(3)]


def test_a_run_as_loaded(tmp_path):
    order = np.random.default_rng(0).permutation(40)
    a = report.load_run(make_run(tmp_path / "a", order=order))
    b = report.load_run(make_run(tmp_path / "b"), name="other")
    assert (a.name, a.variant, b.name, b.variant) == ("a", "a", "other", "other")
    np.testing.assert_array_equal(a.id, np.arange(40))
    np.testing.assert_array_equal(a.correct, b.correct)
    np.testing.assert_allclose(a.per_problem.mean(0), [a.results["anytime"], a.results["final"]], rtol=1e-5)
    (record,) = report.compare([a, b])
    assert record["anytime"] == {"difference": 0.0, "ci95": [0.0, 0.0]}


def test_two_runs_are_compared_over_problems(tmp_path):
    a = report.load_run(make_run(tmp_path / "a", skill=0.4, seed=1))
    b = report.load_run(make_run(tmp_path / "b", skill=0.5, seed=2))
    (record,) = report.compare([a, b])
    assert (record["over"], record["run"], record["baseline"], record["problems"]) == ("problems", "b", "a", 40)
    for i, what in enumerate(("anytime", "final")):
        np.testing.assert_allclose(record[what]["difference"], (b.per_problem - a.per_problem).mean(0)[i], rtol=1e-4)
        assert record[what]["ci95"][0] < record[what]["difference"] < record[what]["ci95"][1]
    (reverse,) = report.compare([a, b], baseline="b")
    np.testing.assert_allclose(reverse["final"]["difference"], -record["final"]["difference"], rtol=1e-5)


def of_two_sets(path, few, many, **changes):
    """An evaluation of 10 problems of one set and 30 of another, of these skills; results say the mean over sets."""
    make_run(path, **changes)
    file = path / "evaluation" / "scores.npz"
    scores = dict(np.load(file))
    number = np.repeat([0, 1], [10, 30]).astype(np.int32)
    rng = np.random.default_rng(changes.get("seed", 0))
    skill = np.array([few, many])[number][:, None, None, None]
    scores["correct"] = (rng.random(scores["correct"].shape) < skill).astype(np.float32)
    scores["id"] = scores["id"][::-1]
    np.savez(file, **scores, set=number, set_names=np.array(["few", "many"]))
    each = [scores["correct"][number == i].mean((0, 1, 3)) for i in (0, 1)]
    results = json.loads((path / "evaluation" / "results.json").read_text())
    names = ("accuracy", "accuracy_ci95", "anytime", "anytime_ci95", "final")
    results["sets"] = {
        name: {key: results[key] for key in names} | {"accuracy": mean.tolist()}
        for name, mean in zip(("few", "many"), each)
    }
    accuracy = np.mean(each, axis=0)
    results |= {"accuracy": accuracy.tolist(), "anytime": float(accuracy.mean()), "final": float(accuracy[-1])}
    (path / "evaluation" / "results.json").write_text(json.dumps(results))
    return path


def test_runs_of_several_sets_are_compared_by_the_mean_over_sets(tmp_path):
    a = report.load_run(of_two_sets(tmp_path / "a", 0.2, 0.6, seed=1))
    b = report.load_run(of_two_sets(tmp_path / "b", 0.7, 0.6, seed=2))
    assert a.set_names == ("few", "many") and a.set.tolist() == [0] * 10 + [1] * 30
    assert (np.diff(a.id[:10]) > 0).all() and (np.diff(a.id[10:]) > 0).all()
    (record,) = report.compare([a, b])
    each = [(b.per_problem - a.per_problem)[a.set == i] for i in (0, 1)]
    for i, what in enumerate(("anytime", "final")):
        means = [x[:, i].mean() for x in each]
        np.testing.assert_allclose(record[what]["difference"], np.mean(means), atol=1e-6)
        # Resampled within each set: the variances of both means add up, each with its own number of problems.
        error = np.sqrt(sum(x[:, i].var() / len(x) for x in each)) / 2
        low, high = record[what]["ci95"]
        np.testing.assert_allclose([low, high], np.mean(means) + np.array([-1.96, 1.96]) * error, atol=0.25 * error)
    one = make_run(tmp_path / "one")
    (note,) = report.compare([a, report.load_run(one)])
    assert "different sets (unnamed and few, many)" in note["note"]
    picture = report.curves(report.with_sets(a))
    assert [text.get_text() for text in picture.axes[0].get_legend().get_texts()] == [
        f"{name} (95% band)" for name in ("mean over sets", "few", "many")
    ]
    assert [run.name for run in report.with_sets(report.load_run(one))] == ["one"]


def test_pairs_of_seeds_give_a_t_interval(pairs):
    runs = [report.load_run(path) for path in pairs]
    records = report.compare(runs, baseline="grpo")
    assert [r["over"] for r in records] == ["problems"] * 3 + ["runs"]
    assert [(r["run"], r["baseline"]) for r in records[:3]] == [(f"brpo_{k}", f"grpo_{k}") for k in range(3)]
    differences = [r["anytime"]["difference"] for r in records[:3]]
    summary = records[3]
    assert (summary["run"], summary["baseline"], summary["pairs"]) == ("brpo", "grpo", 3)
    mean, low, high = anytime.t_interval(differences)
    assert summary["anytime"]["differences"] == pytest.approx(differences, abs=1e-6)
    assert [summary["anytime"]["difference"], *summary["anytime"]["ci95"]] == pytest.approx([mean, low, high], abs=1e-5)
    assert 0.08 < mean < 0.2
    assert summary["mean_length"]["ci95"] == [0, 0] and summary["regret@32"]["difference"] == pytest.approx(-0.075)
    assert len(summary["tokens_to"]["ratio"]) == 3


def test_a_run_without_its_partner_is_noted(tmp_path, pairs):
    extra = make_run(tmp_path / "brpo_9", variant="brpo", seed=9)
    records = report.compare([report.load_run(path) for path in [*pairs, extra]])
    (note,) = [r for r in records if "note" in r]
    assert note["run"] == "brpo_9" and "no grpo with seeds (0, 9)" in note["note"]
    assert records[-1]["pairs"] == 3


def test_other_problems_or_budgets_are_never_compared_silently(tmp_path):
    runs = [
        report.load_run(make_run(tmp_path / "a")),
        report.load_run(make_run(tmp_path / "b", first=20)),
        report.load_run(make_run(tmp_path / "c", budgets=[8, 16, 64])),
    ]
    records = report.compare(runs)
    assert "different problems (20 shared of 40 and 40)" in records[0]["note"]
    assert "different budgets" in records[1]["note"]
    assert not any("anytime" in r for r in records)
    text = report.table(runs, records)
    assert "b - a: different problems" in text and "@32" in text and "@64" in text


def test_errors_of_compare(tmp_path, pairs):
    a = report.load_run(pairs[0])
    with pytest.raises(ValueError, match=r"called grpo_0; .*--name NAME=RUN"):
        report.compare([a, a])
    b = report.load_run(pairs[0], name="again")
    with pytest.raises(ValueError, match=r"both variant grpo with .* \(0, 0\)"):
        report.compare([a, b])
    with pytest.raises(ValueError, match=r"called ppo; the choices are variants \['grpo'\] and runs \['grpo_0'\]"):
        report.compare([a], baseline="ppo")


@pytest.mark.parametrize(
    ("file", "page"),
    [("evaluation/results.json", "evaluate"), ("evaluation/scores.npz", "evaluate"), ("metrics.jsonl", "train")],
)
def test_a_missing_file_is_named_with_its_command(tmp_path, file, page):
    path = make_run(tmp_path / "a")
    (path / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing; `python -m tto_jax.{page} --workdir="):
        report.load_run(path)


def test_an_untrained_model_needs_no_metrics(tmp_path):
    path = make_run(tmp_path / "base", tokens=0)
    (path / "metrics.jsonl").unlink()
    assert report.load_run(path).rows == []


def test_files_that_contradict_each_other(tmp_path):
    path = make_run(tmp_path / "a", accuracy=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="different evaluations"):
        report.load_run(path)
    path = make_run(tmp_path / "b", budgets=[1, 2])
    file = path / "evaluation" / "results.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"budgets": [1, 2, 3]}))
    with pytest.raises(ValueError, match=r"correct\[40, 4, 2, 2\].* 3 budgets"):
        report.load_run(path)
    del results["tokens"], results["seed"]
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="lacks seed, tokens"):
        report.load_run(path)


def test_the_table_is_aligned(tmp_path, pairs):
    runs = [report.load_run(path) for path in pairs]
    text = report.table(runs, report.compare(runs))
    first, second = text.split("\n\n")
    lines = first.splitlines()
    assert lines[0].split() == ["run", "@8", "@16", "@32", "anytime", "[95%]", "final", "length", "tokens", "seconds"]
    assert len(lines) == 1 + 6 + 2 and "brpo, mean of 3" in first and "1.23M" in lines[1]
    end = lines[0].index("@16") + 3
    assert all(line[end - 1].isdigit() and line[end] == " " for line in lines[1:])
    assert "brpo - grpo" in second and "3 pairs of runs" in second and "40 problems" in second
    many = make_run(tmp_path / "many", budgets=list(range(250, 8001, 250)))
    header = report.table([report.load_run(many)], []).splitlines()[0]
    assert header.count("@") == 8 and "@250 " in header and "@8000" in header


def test_the_page(tmp_path, pairs, capsys):
    one = make_run(tmp_path / "single", skill=0.3, commit="other")
    out = tmp_path / "out"
    report.main([*map(str, pairs), f"--name=base={one}", f"--out={out}", "--baseline=grpo"])
    got = json.loads((out / "results.json").read_text())
    assert list(got) == ["runs", "commit", "versions", "config_hash", "paired"]
    assert list(got["runs"]) == [*(p.name for p in pairs), "base"]
    assert got["commit"] is None and got["versions"] == {"jax": "0.10"}
    assert got["config_hash"]["base"] == "0123456789ab"
    assert got["runs"]["brpo_1"]["variant"] == "brpo"
    for name in ("curves.png", "training.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "brpo - grpo" in printed.out and "differ in commit" in printed.err
    assert re.search(r"^\| brpo +\| 3 +\| ", printed.out, re.MULTILINE)
    assert re.search(r"^\| base +\| 1 +\| ", printed.out, re.MULTILINE)
    assert str(tmp_path) not in (out / "results.json").read_text()


def test_misuse_of_the_page(tmp_path, capsys):
    for argv, message in (
        ([], "at least one RUN"),
        ([str(tmp_path / "nowhere")], "does not exist"),
        (["--name=x"], "NAME=RUN"),
    ):
        with pytest.raises(SystemExit) as stop:
            report.main(argv)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_gap_closed_is_the_mean_share_over_pairs():
    def record(variant, difference, **more):
        return {"over": "problems", "variant": variant, "anytime": {"difference": difference}} | more

    paired = [record("brpo", 0.3), record("brpo", 0.1), record("length", 0.1), record("length", 0.2)]
    paired += [{"over": "problems", "variant": "length", "note": "other problems"}, {"over": "runs", "variant": "brpo"}]
    assert report.gap_closed(paired, "brpo") == pytest.approx({"length": 0.75})
    with pytest.raises(ValueError, match=r"--target=mrt.*brpo.*length"):
        report.gap_closed(paired, "mrt")
