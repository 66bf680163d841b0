import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from tto_jax import bench, bench_grading

FIELDS = {"name", "median_s", "min_s", "max_s", "n", "bytes", "gb_per_s", "target", "shape", "sizes", "ratios"}
FIELDS |= {"difference", "device", "platform", "cpus", "commit", "versions"}


def inputs(*, group_size=3, answers=2, tokens=40, lengths=(1, 40, 17, 9, 30, 25)):
    rng = np.random.default_rng(1)
    correct = (rng.random((6 // group_size, group_size, 4, answers)) < 0.5).astype(np.float32)
    schedule = bench.BudgetSchedule.from_prior((10, 20, 30, tokens), (1, 2, 3, 4))
    forks = np.asarray(bench.forks_at_budgets(np.reshape(lengths, (-1, group_size)), schedule))
    return correct, forks, schedule


@pytest.mark.parametrize("spread", [bench.spread_in_array, bench.spread_in_lists])
@pytest.mark.parametrize(("group_size", "answers"), [(3, 2), (3, 1), (1, 2), (2, 4)])
def test_both_sides_agree(spread, group_size, answers):
    correct, forks, schedule = inputs(group_size=group_size, answers=answers)
    ours = jax.jit(bench.credit_to_tokens, static_argnums=3)(correct, forks, schedule, 40)
    plain = bench.loop_credit(correct, forks, np.asarray(schedule.weights).tolist(), 40, spread)
    for a, b in zip(ours, plain):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert np.abs(ours[0]).max() > 0.1


def test_the_page(tmp_path, capsys):
    file = tmp_path / "bench.jsonl"
    for _ in range(2):
        bench.main(["credit", "--shape=tiny", f"--json={file}"])
    text = capsys.readouterr().out
    assert re.search(r"times faster than loop, NumPy.*times one write", text) and "GB/s" in text
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = ["tto_jax", "one write of f32[N,C]", "loop, NumPy", "loop, tight"]
    assert [line["name"] for line in lines] == 2 * names
    for line in lines:
        assert set(line) == FIELDS
        assert 0 < line["min_s"] <= line["median_s"] <= line["max_s"]
        assert line["n"] == (2 if "loop" in line["name"] else 5)
        rows = line["sizes"]["problems"] * line["sizes"]["group_size"]
        answers = rows * line["sizes"]["forks"] * line["sizes"]["answers"]
        assert line["bytes"] == 4 * (rows * line["sizes"]["tokens"] + ("write" not in line["name"]) * answers)
        assert line["gb_per_s"] == pytest.approx(line["bytes"] / line["median_s"] / 1e9)
        assert line["difference"] <= 1e-6


def test_a_wrong_side_is_not_reported(monkeypatch):
    monkeypatch.setattr(bench, "spread_in_lists", lambda *args: bench.spread_in_array(*args) + 1e-3)
    with pytest.raises(RuntimeError, match=r"differ by .* allowed is 1e-06"):
        bench.run("credit", "tiny")


def test_unknown_names(capsys):
    with pytest.raises(ValueError, match=r"'speed' is unknown: choose one of \('credit'"):
        bench.run("speed", "tiny")
    with pytest.raises(SystemExit):
        bench.main(["credit", "--shape=huge"])
    assert re.search(r"--shape='huge' is unknown: choose one of \('paper'", capsys.readouterr().err)


def test_the_paper_shape_is_the_default():
    shape = next(iter(bench.TARGETS["credit"][1].values()))
    assert dataclasses.astuple(shape)[:6] == (64, 8, 4, 4, 8000, True)


def test_first_calls_are_left_out():
    seen = []
    timing = bench.measure({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, calls=3)
    assert seen == ["a", "b"] * 5
    assert timing["a"].n == 3


def test_grading(capsys):
    """The pool's verdicts are those of the same comparisons one by one."""
    bench.main(["grading", "--shape=tiny"])
    assert re.search(r"times faster than one by one, [\d,.]+ answers a second.*difference 0", capsys.readouterr().out)
    references = bench_grading.made_references(0, 200)
    items = bench_grading.workload(references, seed=0, problems=4, answers=16)
    right = bench_grading.judge_alone(items)
    spelled = [answer in bench_grading.spellings(*reference) for answer, reference in items]
    assert 0.2 < np.mean(right) < 0.8 and all(r for r, s in zip(right, spelled) if s)
