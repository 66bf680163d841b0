"""The bench page: every target on a shape of a few seconds, what its lines hold, what it refuses."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from tto_jax import bench
from tto_jax.bench import credit, grading, iteration, limits, models, page, rollout, threads, timing, update
from tto_jax.core.budgets import BudgetSchedule, forks_at_budgets

GIVEN = ["--peak_flops=1e11", "--peak_bandwidth=1e10"]  # not measured anew in every test
ASKED = {"target", "median_s", "cpu_s", "tokens_per_s", "peak_bytes", "compile_s"}
SIDES = {
    "credit": ["tto_jax", "one write of f32[N,C]", "NumPy loop", "tight loop"],
    "token_logprobs": ["forward", "gradient"],  # of each implementation
    "tree_attention": ["forward", "gradient", "flattened forward", "flattened gradient"],
    "branch_decode": ["flattened"],
    "rollout": ["tto_jax"],
    "update": ["tto_jax"],
    "iteration": ["think", *(f"{b} {a}" for a in ("answer", "score", "update") for b in ("shared", "flattened"))],
}


def run(folder, target, *flags):
    """Lines of a run of the page."""
    file = folder / f"{target}.jsonl"
    bench.main([target, "--shape=ci", f"--json={file}", *GIVEN, *flags])
    return [json.loads(line) for line in file.read_text().splitlines()]


LONG = pytest.mark.slow  # compiles an update or a whole iteration, some more than once


@pytest.mark.parametrize("target", [pytest.param(x, marks=LONG if x == "iteration" else ()) for x in SIDES])
def test_every_target(target, tmp_path, capsys):
    lines = run(tmp_path, target, "--repeat=2")
    text = capsys.readouterr().out
    names = [line["name"] for line in lines]
    assert len(set(names)) == len(names) and all(any(side in name for name in names) for side in SIDES[target]), names
    for line in lines:
        assert set(line) >= ASKED and line["target"] == target and line["shape"] == "ci"
        assert line["name"] in text
        assert 0 < line["min_s"] <= line["median_s"] <= line["max_s"]
        assert line["cpu_s"] >= 0 and line["n"] == 2
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["median_s"])
        bounds = {"compute": line["flops"] / 1e11, "memory": line["bytes"] / 1e10}
        assert line["share_of_limit"] == pytest.approx(max(bounds.values()) / line["median_s"])
        assert line["bound_by"] == max(bounds, key=bounds.get)
        assert line["limits"]["source"] == "given"
        assert line["sizes"]["repeat"] == 2
        if "loop" not in line["name"]:
            assert line["peak_bytes"] > 1e7 and line["compiled_later"] == 0
            # Steps of the model may have been compiled by an earlier test, the others never.
            assert line["compile_s"] > 0 or target in ("rollout", "update", "iteration")
    assert "GFLOP/s" in text and "largest difference" in text


def test_json_lines_are_added(tmp_path):
    assert len(run(tmp_path, "credit", "--repeat=1")) == 4
    assert [line["n"] for line in run(tmp_path, "credit", "--repeat=3")[4:]] == [3, 3, 2, 2]


def test_ratios_of_an_iteration():
    seconds = {"think": 1, "shared answer": 2, "flattened answer": 20, "shared score": 1, "flattened score": 3}
    seconds |= {"shared update": 4, "flattened update": 20}
    rows = [timing.Row(name, timing.Timing.of([s]), limits.Work()) for name, s in seconds.items()]
    found = iteration.ratios(rows)
    assert found.pop("times faster in the iteration") == (1 + 20 + 3 + 20) / (1 + 2 + 1 + 4)
    assert found == {"times faster in answer": 10, "times faster in score": 3, "times faster in update": 5}
    assert iteration.ratios(rows[:3]) == {"times faster in answer": 10}


@LONG
def test_some_sides_only(tmp_path):
    lines = run(tmp_path, "iteration", "--repeat=1", "--only=shared answer,flattened answer")
    assert [line["name"] for line in lines] == ["shared answer", "flattened answer"]
    assert set(lines[0]["ratios"]) == {"times faster in answer"}


@LONG
def test_update_of_trees_beside_flattened_rows(tmp_path):
    file = tmp_path / "update.jsonl"
    bench.main(["update", "--shape=ci_trunk", f"--json={file}", "--repeat=1", *GIVEN])
    packed, flat = (json.loads(line) for line in file.read_text().splitlines())
    assert packed["name"] == "tto_jax" and flat["name"] == "flattened"
    assert packed["tokens"] == flat["tokens"] == 2 * (16 + 2 * 4)
    assert packed["difference"] < 1e-4, "the objectives differ"
    assert packed["ratios"] == {"times faster than flattened": flat["median_s"] / packed["median_s"]}
    assert flat["notes"]["tokens flattened"] == 2 * ((8 + 8 + 7) + (8 + 16 + 7))


@LONG
def test_update_in_buckets_beside_one_bucket(tmp_path):
    file = tmp_path / "update.jsonl"
    bench.main(["update", "--shape=ci_lengths", f"--json={file}", "--repeat=1", *GIVEN])
    ours, one = (json.loads(line) for line in file.read_text().splitlines())
    assert (ours["name"], one["name"]) == ("tto_jax", "one bucket")
    assert ours["tokens"] == one["tokens"] < 4 * (24 + 2 * 4) and ours["flops"] == one["flops"]
    assert ours["difference"] < 1e-4, "the objectives differ"
    assert ours["ratios"] == {"times faster than one bucket": one["median_s"] / ours["median_s"]}


@pytest.mark.parametrize(("target", "tokens"), [("rollout", 4 * 8), pytest.param("update", 4 * 16, marks=LONG)])
def test_a_checkpoint_directory(target, tokens, tmp_path):
    model = models.find("ci", "float32").config
    weights = jax.tree.map(lambda x: np.full(x.shape, 0.01, x.dtype), models.hf_weights.abstract_params(model))
    with models.exported(models.Loaded(model), jax.device_put(weights)) as directory:
        loaded = models.find("tiny", "float32", hf=directory)
        assert loaded.config == model
        assert all((x == np.float32(0.01)).all() for x in jax.tree.leaves(loaded.params()))
        (line,) = run(tmp_path, target, f"--hf={directory}", "--dtype=float32", "--repeat=1")
    assert line["tokens"] == tokens and line["notes"]["parameters"] == limits.parameters(model)


def test_sizes_by_flags():
    flags = ["--rows=2", "--prompt=4", "--new=6", "--dtype=bfloat16", "--repeat=1", "--hf=DIR", "--only=a,b c"]
    shape, options = page.resolve("rollout", "ci", page._parser().parse_args(["rollout", *flags]))
    assert (shape.rows, shape.prompt, shape.new, shape.dtype, shape.repeat) == (2, 4, 6, "bfloat16", 1)
    assert shape.group == page.TARGETS["rollout"].SHAPES["ci"].group
    assert (options.hf, options.only, options.peer) == ("DIR", ("a", "b c"), None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("speed", "invalid choice: 'speed'"),
        ("credit --shape=huge", r"--shape='huge' is unknown: choose one of \('paper'"),
        ("credit --rows=3", "credit has no --rows: it takes --repeat, --only"),
        ("grading --repeat=3", "grading has no --repeat: it takes none"),
        ("update --shape=ci --peer=transformers", "--peer='transformers': choose one of"),
        ("update --shape=ci_trunk --peer=tunix", "with a shape without forks"),
        ("update --shape=ci --buckets=3", "--buckets=3: rows of several lengths are trees"),
        ("rollout --shape=ci --rows=0", "--rows=0: it must be at least 1"),
        ("rollout --shape=ci --rows=3", "--rows=3: it must be a multiple of --group=2"),
        ("rollout --shape=ci --peer=vllm", "--peer='vllm' is unknown: choose one of"),
        ("rollout --shape=ci --model=large", "--model='large' is unknown: choose one of"),
        ("rollout --shape=ci --hf=FOLDER/none", "is no directory"),
        ("rollout --shape=ci --dtype=int8", "model.dtype='int8' is unknown"),
        ("token_logprobs --shape=ci --implementation=fast", "--implementation='fast' is unknown: choose of"),
        ("credit --shape=ci --only=theirs", "--only=theirs is unknown: choose of"),
        ("credit --shape=ci --peak_flops=0", "--peak_flops=0.0: it must be positive"),
        ("credit --shape=ci --threads=1000", "--threads=1000: this process may run on"),
    ],
)
def test_what_is_refused(arguments, said, tmp_path, capsys):
    flags = [word.replace("FOLDER", str(tmp_path)) for word in arguments.split()]
    with pytest.raises(SystemExit):
        bench.main([*flags, f"--json={tmp_path / 'x'}"] + (GIVEN if "peak" not in arguments else []))
    assert re.search(said, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_threads(tmp_path):
    """The page starts again on one CPU, and says so."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU only: nothing to limit")
    file = tmp_path / "x"
    command = [sys.executable, "-m", "tto_jax.bench", "credit", "--shape=ci", "--threads=1", f"--json={file}", *GIVEN]
    environment = {key: value for key, value in os.environ.items() if key != threads.MARK}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(file.read_text().splitlines()[0])
    assert line["threads"] == 1 and line["environment"]["NPROC"] == "1"
    assert "--xla_cpu_multi_thread_eigen=false" in line["environment"]["XLA_FLAGS"]


# Credit.


def inputs(*, group_size=3, answers=2, tokens=40, lengths=(1, 40, 17, 9, 30, 25)):
    rng = np.random.default_rng(1)
    correct = (rng.random((6 // group_size, group_size, 4, answers)) < 0.5).astype(np.float32)
    schedule = BudgetSchedule.from_prior((10, 20, 30, tokens), (1, 2, 3, 4))
    forks = np.asarray(forks_at_budgets(np.reshape(lengths, (-1, group_size)), schedule))
    return correct, forks, schedule


@pytest.mark.parametrize("spread", [credit.spread_in_array, credit.spread_in_lists])
@pytest.mark.parametrize(("group_size", "answers"), [(3, 2), (3, 1), (1, 2), (2, 4)])
def test_both_sides_agree(spread, group_size, answers):
    correct, forks, schedule = inputs(group_size=group_size, answers=answers)
    ours = jax.jit(credit.credit_to_tokens, static_argnums=3)(correct, forks, schedule, 40)
    plain = credit.loop_credit(correct, forks, np.asarray(schedule.weights).tolist(), 40, spread)
    for a, b in zip(ours, plain):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert np.abs(ours[0]).max() > 0.1


def test_a_wrong_side_is_not_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(credit, "spread_in_lists", lambda *args: credit.spread_in_array(*args) + 1e-3)
    with pytest.raises(RuntimeError, match=r"differ by .* allowed is 1e-06"):
        run(tmp_path, "credit")
    assert list(tmp_path.iterdir()) == []


def test_the_paper_shape_is_the_default():
    shape = next(iter(page.TARGETS["credit"].SHAPES.values()))
    assert dataclasses.astuple(shape)[:6] == (64, 8, 4, 4, 8000, True)


# Grading.


def test_grading(capsys):
    """The pool's verdicts are those of the same comparisons one by one."""
    bench.main(["grading", "--shape=ci", *GIVEN])
    assert re.search(r"times faster than one by one, [\d,.]+ answers a second.*difference 0", capsys.readouterr().out)
    references = grading.made_references(0, 200)
    items = grading.workload(references, seed=0, problems=4, answers=16)
    right = grading.judge_alone(items)
    spelled = [answer in grading.spellings(*reference) for answer, reference in items]
    assert 0.2 < np.mean(right) < 0.8 and all(r for r, s in zip(right, spelled) if s)


# A peer.


@pytest.mark.slow
def test_transformers_beside_ours(tmp_path):
    """The peer samples from the same weights: its log-probs of our tokens are ours."""
    pytest.importorskip("torch")
    ours, theirs = run(tmp_path, "rollout", "--peer=transformers", "--repeat=2")
    assert (ours["name"], theirs["name"]) == ("tto_jax", "transformers")
    assert ours["difference"] < 1e-4
    assert theirs["tokens"] == ours["tokens"] and theirs["peak_bytes"] > 1e8 and theirs["cpu_s"] > 0
    assert set(theirs["notes"]["peer"]) == {"torch", "transformers"}
    assert ours["ratios"] == {"times faster than transformers": theirs["median_s"] / ours["median_s"]}


@pytest.mark.slow
@pytest.mark.parametrize("peer", update.PEERS)
def test_a_peer_of_the_update_beside_ours(tmp_path, peer):
    """Where it is installed: the same log-probs, loss and norm of the gradient from the same weights."""
    pytest.importorskip(peer)
    ours, theirs = run(tmp_path, "update", f"--peer={peer}", "--repeat=2")
    assert (ours["name"], theirs["name"]) == ("tto_jax", peer)
    assert ours["difference"] < 1e-4 and theirs["tokens"] == ours["tokens"]
    assert ours["ratios"] == {f"times faster than {peer}": theirs["median_s"] / ours["median_s"]}


def test_rows_of_a_peers_micro_batch():
    shape = update.SHAPES["tiny"]  # rows of 384 tokens
    for tokens, wanted in ((100, 1), (384, 1), (768, 2), (384 * 4, 4), (384 * 8 - 1, 1), (384 * 100, 4)):
        assert update.micro_rows(dataclasses.replace(shape, rows=12, micro_tokens=tokens)) == wanted


def test_a_peer_whose_step_differs_is_found():
    """By its loss, as a share of the objective's scale, or by the norm of its gradient, as a share of ours."""
    ours = {"loss": 0.5, "grad_norm": 4.0}
    assert update.step_difference({"cpu_s": 1.0, **ours}, ours, 2.0) == 0
    assert update.step_difference({**ours, "loss": 0.75}, ours, 2.0) == 0.125
    assert update.step_difference({**ours, "grad_norm": 3.0}, ours, 2.0) == 0.25
    assert update.step_difference({}, ours, 2.0) == update.step_difference(ours, {}, 2.0) == 0


@pytest.mark.slow
def test_a_peer_with_other_weights_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    other = models.decoder.init_params(models.find("ci", "float32").config, 1)
    exported = models.exported
    monkeypatch.setattr(models, "exported", lambda loaded, _params: exported(loaded, other))
    with pytest.raises(RuntimeError, match="the sides differ by"):
        run(tmp_path, "rollout", "--peer=transformers")


@pytest.mark.slow
def test_a_peer_that_fails_says_why(tmp_path):
    prompts = {"prompts": np.zeros((1, 2), np.int32)}
    peer = rollout.Peer("transformers", prompts, "cpu", model=tmp_path / "none", new=2, dtype="float32")
    with pytest.raises(RuntimeError, match=r"--peer=transformers ended: (.|\n)*\w+Error"), peer:
        pass
