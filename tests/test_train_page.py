"""The training page at its smallest: what it writes, that it resumes bitwise, that it compiles once."""

import ast
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath

from configs import chain, common, peak
from tto_jax import (
    checkpoint,
    evaluation,
    host,
    inputs,
    learner,
    metrics,
    profiling,
    report,
    settings,
    sharding,
    train,
    warm_start,
)
from tto_jax.models import decoder

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
# 8 problems, 4 a step: an epoch is 2 steps.
SMALL = {
    "task.num_values": 3,
    "data.problems": 8,
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "model.mlp_size": 32,
    "warm_start.steps": 5,
    "warm_start.batch_size": 8,
    "warm_start.optimizer.warmup_steps": 1,
    "budgets.tokens": (3, 6),
    "rollout.problems": 4,
    "rollout.group_size": 4,
    "rollout.answers": 2,
    "learner.micro_tokens": 200,
    "steps": STEPS,
    "evaluation.every": 2,
    "evaluation.problems": 16,
    "evaluation.final_problems": 16,
    "evaluation.budgets": (3, 6, 9),
    "evaluation.answers": 2,
    "checkpoint.every": 2,
    "log.samples_every": 2,
    "log.samples": 2,
}
TIMES = re.compile(r"^(seconds$|seconds/|speed/|memory/)")


def config_of(cache, **changes):
    """peak:brpo with SMALL and `changes` (double underscores for dots)."""
    config = peak.get_config("brpo")
    given = SMALL | {"warm_start.cache": str(cache)}
    config.update_from_flattened_dict(given | {name.replace("__", "."): value for name, value in changes.items()})
    return config


def run(workdir, **changes):
    flags.FLAGS.mark_as_parsed()  # the page's own flags at their defaults
    config = config_of(workdir.parent, **changes)
    train.train(config, settings.build(config), epath.Path(workdir))
    return workdir


class Compilations:
    """Counts what the backend compiles, and remembers the count at every row that is written."""

    def __init__(self, patch):
        self.count, self.at, self.names = 0, [], []
        write = metrics.MetricsWriter.write

        def listen(event, _seconds, **_):
            self.count += event == "/jax/core/compile/backend_compile_duration"

        def count_and_write(writer, step, row):
            self.at.append((step, self.count))
            write(writer, step, row)

        patch.setattr(metrics.MetricsWriter, "write", count_and_write)
        jax.monitoring.register_event_duration_secs_listener(listen)
        self.stop = lambda: jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Holds the workdirs and beside them the one warm start."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(base):
    """A run without interruption, and what it compiled: the first to run, so that it meets nothing compiled already."""
    with pytest.MonkeyPatch.context() as patch:
        compilations = Compilations(patch)
        workdir = run(base / "whole")
        compilations.stop()
    return workdir, compilations


@pytest.fixture(scope="module")
def rows(whole):
    """The rows of the training steps."""
    return [row for row in metrics.read_rows(whole[0]) if "score/anytime" in row]


def last_checkpoint(workdir):
    """State and host record of the last checkpoint, as the run of SMALL would restore it."""
    plan = settings.build(config_of(workdir.parent))
    like = jax.eval_shape(lambda: learner.init_state(decoder.init_params(plan.model, 0), plan.optimizer))
    with checkpoint.Checkpointer(workdir / "checkpoints", keep=2) as saved:
        step = saved.latest_step()
        return step, *saved.restore(step, like)


def without_times(rows):
    return [{name: value for name, value in row.items() if not TIMES.match(name)} for row in rows]


def assert_same_run(workdir, other):
    (step, state, host), (other_step, other_state, other_host) = last_checkpoint(workdir), last_checkpoint(other)
    assert step == other_step == STEPS
    named, others = (jax.tree_util.tree_leaves_with_path(x) for x in (state, other_state))
    differ = [jax.tree_util.keystr(p) for (p, a), (_, b) in zip(named, others, strict=True) if not bitwise_equal(a, b)]
    assert differ == []
    assert host["cursor"] == other_host["cursor"]
    assert host["totals"]["tokens"] == other_host["totals"]["tokens"]
    assert without_times(metrics.read_rows(workdir)) == without_times(metrics.read_rows(other))
    for name in ("samples.jsonl", "samples.txt"):
        assert (workdir / name).read_text() == (other / name).read_text()


def bitwise_equal(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------- what a run leaves


def test_every_row_is_there_once(whole):
    written = [(row["step"], "train" if "score/anytime" in row else "eval") for row in metrics.read_rows(whole[0])]
    expected = [(0, "eval")]
    for step in range(1, STEPS + 1):
        expected += [(step, "train")] + [(step, "eval")] * (step % SMALL["evaluation.every"] == 0)
    assert written == expected


def test_later_steps_compile_nothing(whole):
    """After the first step (before which stands an evaluation): steps, evaluations, checkpoints, samples."""
    compilations = whole[1]
    first = next(count for step, count in compilations.at if step == 1)
    assert first > 5, "nothing was compiled before the end of the first step: is anything counted?"
    assert [(step, count - first) for step, count in compilations.at if step > 1 and count > first] == []
    assert compilations.count == first, "the last checkpoint compiled something"


def test_rows_have_what_the_page_promises(rows):
    budgets, blocks = SMALL["budgets.tokens"], range(len(SMALL["budgets.tokens"]))
    names = {"step", "tokens", "seconds"}
    names |= {f"{name}/{b}" for name in ("score", "formatted", "unfinished", "overthinking") for b in budgets}
    names |= {f"{name}/{b}" for name in ("progress", "regret/normalized") for b in budgets}
    names |= {"regret/cumulative", "regret/group"}
    names |= {"score/anytime", "length/mean", "length/correct", "length/wrong", "groups/without_signal"}
    names |= {f"advantage/{name}/{s}" for name in ("mean", "std") for s in blocks}
    names |= {f"{name}/{v}/{s}" for name in ("residual", "correlation") for v in ("v1", "v2", "v") for s in blocks}
    names |= {"logprob_gap/mean", "logprob_gap/max", "entropy/thinking", "entropy/answers"}
    names |= {f"loss/{name}" for name in ("total", "kl_old", "clip_fraction", "ratio_min", "ratio_max")}
    names |= {"loss/share_thinking", "loss/share_answers"}
    names |= {f"update/{name}" for name in ("grad_norm", "skipped", "padding_share")}
    names |= {f"seconds/{phase}" for phase in ("think", "answer", "grade", "credit", "score", "update", "step")}
    names |= {"speed/tokens_per_second", "speed/mfu", "speed/goodput"}
    names |= {f"{name}/{p}" for name in ("flops", "speed/mfu") for p in ("think", "answer", "score", "update")}
    names |= {f"memory/{name}" for name in ("in_use", "peak", "limit")}
    for row in rows:
        assert names - set(row) == set()
        phases = sum(value for name, value in row.items() if name.startswith("seconds/") and name != "seconds/step")
        assert 0 < phases <= row["seconds/step"]


def test_numbers_are_possible(rows):
    tokens, seconds = 0, 0.0
    entropy = np.log(len(settings.build(config_of(".")).task.vocabulary))
    for row in rows:
        fractions = [
            v for k, v in row.items() if k.startswith(("score/", "formatted/", "unfinished/", "overthinking/"))
        ]
        fractions += [row[f"loss/{k}"] for k in ("clip_fraction", "share_thinking", "share_answers")]
        assert all(0 <= value <= 1 for value in [*fractions, row["groups/without_signal"]])
        assert row["score/anytime"] == pytest.approx(np.mean([row[f"score/{b}"] for b in SMALL["budgets.tokens"]]))
        assert row["overthinking/3"] == 0, "nothing comes before the first budget"
        assert 1 <= row["length/mean"] <= 6
        assert 0 < row["entropy/thinking"] <= entropy and 0 < row["entropy/answers"] <= entropy
        assert 0 < row["loss/ratio_min"] <= 1 <= row["loss/ratio_max"]
        assert 0 < row["update/padding_share"] < 1
        assert row["loss/kl_old"] >= 0 and row["update/skipped"] == 0
        assert all(-1 <= value <= 1 for k, value in row.items() if k.startswith("correlation/") and value is not None)
        # 16 traces of up to 6 tokens, 2 budgets x 2 one-token answers each.
        assert row["length/mean"] * 16 + 64 == pytest.approx(row["tokens"] - tokens)
        assert row["seconds"] > seconds
        assert row["speed/tokens_per_second"] * row["seconds/step"] == pytest.approx(row["tokens"] - tokens, rel=0.05)
        assert 0 < row["speed/goodput"] < 1
        assert row["flops/update"] == 3 * row["flops/score"] > row["flops/think"] > row["flops/answer"] > 0
        tokens, seconds = row["tokens"], row["seconds"]


def test_sampler_and_trainer_agree(rows):
    """The packed row, the cached decoding and the loss see the same distribution."""
    assert max(row["logprob_gap/mean"] for row in rows) <= max(row["logprob_gap/max"] for row in rows) <= 1e-5


def test_mixed_scores_teach(whole, rows):
    mixed = [row for row in rows if row["groups/without_signal"] < 1]
    assert len(mixed) >= 3, "scores must be mixed for this test to say something"
    for row in mixed:
        assert row["advantage/std/0"] > 0
        assert row["update/grad_norm"] > 1e-6
        # The mean over two minibatches; the shares of one without signal are both 0.
        assert row["loss/share_thinking"] + row["loss/share_answers"] in (pytest.approx(0.5), pytest.approx(1))
        assert row["loss/ratio_max"] > row["loss/ratio_min"]
    config = config_of(whole[0].parent)
    initial = warm_start.get(config, settings.build(config), epath.Path(whole[0]))
    _, state, _ = last_checkpoint(whole[0])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), initial, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-6, "some parameters did not change"
    assert int(state.step) == 2 * STEPS


def test_equal_scores_teach_nothing(base, monkeypatch):
    """Without differences between answers every advantage is zero, and the parameters stay as they are."""
    grade = train.grading.grade

    def all_right(*arguments):
        graded = grade(*arguments)
        scores = dataclasses.replace(graded.scores, correct=np.ones_like(graded.scores.correct))
        return dataclasses.replace(graded, scores=scores)

    monkeypatch.setattr(train.grading, "grade", all_right)
    workdir = run(base / "equal", steps=2, evaluation__every=100)
    config = config_of(base)
    initial = warm_start.get(config, settings.build(config), epath.Path(workdir))
    _, state, _ = last_checkpoint(workdir)
    assert all(jax.tree.leaves(jax.tree.map(bitwise_equal, initial, state.params)))
    for row in metrics.read_rows(workdir):
        if "score/anytime" in row:
            assert row["groups/without_signal"] == 1 and row["score/anytime"] == 1
            assert row["update/grad_norm"] == 0 and row["advantage/std/0"] == 0
            assert row["length/wrong"] is None and row["residual/v/0"] is None


@pytest.mark.parametrize("mesh", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str)
def test_a_run_on_a_mesh_is_the_run_on_one_device(base, rows, mesh):
    """Two steps and two evaluations; the same tokens, so the same scores; sums differ by rounding."""
    workdir = run(base / f"mesh{mesh}", mesh=mesh, steps=2, learner__micro_tokens=100)
    found = metrics.read_rows(workdir)
    assert [row["step"] for row in found] == [0, 1, 2, 2]
    for one, many in zip(rows, [row for row in found if "score/anytime" in row]):
        for name in ("score/anytime", "length/mean", "tokens", "groups/without_signal"):
            assert one[name] == many[name]
        for name in ("loss/total", "update/grad_norm", "entropy/thinking", "logprob_gap/mean"):
            assert one[name] == pytest.approx(many[name], rel=1e-3, abs=1e-6), name
    plan = settings.build(config_of(base, mesh=mesh))
    meshed = sharding.make_mesh(mesh)
    like = sharding.abstract(meshed, learner.abstract_state(plan.model, plan.optimizer), plan.model.num_kv_heads)
    with checkpoint.Checkpointer(workdir / "checkpoints", keep=1) as saved:
        on_mesh, alone = (
            saved.restore(2, like)[0],
            saved.restore(2, learner.abstract_state(plan.model, plan.optimizer))[0],
        )
    assert on_mesh.params["layers"]["down"]["kernel"].sharding.spec[-1] == "fsdp"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(on_mesh), jax.device_get(alone))


def test_an_evaluation_on_a_mesh_fills_its_rows(base):
    """Five problems on rows that are split in four: what fills the batch is left out."""
    config = config_of(base)
    plan = settings.build(config)
    options = evaluation.Options.from_config(config.evaluation)
    problems = inputs.evaluation_problems(config, plan.task, plan.tokenizer, 5)["peak"].problems
    params = decoder.init_params(plan.model, 0)
    alone = evaluation.evaluate(plan, params, problems, options)
    mesh = sharding.make_mesh((2, 2, 2))
    with sharding.use(mesh):
        placed = sharding.place(mesh, params, plan.model.num_kv_heads)
        many = evaluation.evaluate(plan.on(mesh), placed, problems, options)
    for name in ("correct", "length", "forks", "id", "vote"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(many, name))


def test_steps_are_profiled(base):
    """The traces of the named steps have a name for everything that a step does.

    In a process of its own: the profiler dereferences a null pointer where libtpu was loaded before, to compile only.
    """
    workdir = base / "profiled"
    given = SMALL | {"warm_start.cache": base, "steps": 4}
    options = [f"--config.{name}={value}" for name, value in given.items()]
    done = page("train", "--config=configs/peak.py:brpo", f"--workdir={workdir}", "--profile_steps=2,4", *options)
    assert done.returncode == 0, done.stderr
    folder = workdir / "profile" / "plugins" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_4"]
    for path in folder.glob("*/process_0.xplane.pb"):
        found = jax.profiler.ProfileData.from_file(str(path))
        events = [event for plane in found.planes for line in plane.lines for event in line.events]
        names = {event.name for event in events}
        assert {"train", *profiling.PHASES, "evaluation", "save"} <= names
        steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
        assert steps == [int(path.parent.name.removeprefix("step_"))]
    assert metrics.read_rows(workdir)[-1]["step"] == 4


@pytest.mark.parametrize(
    ("text", "steps"),
    [("", ()), ("3", (3,)), ("3:5", (3, 4, 5)), ("9,1:2, 2:3", (1, 2, 3, 9)), ("10", (10,)), ("7:7", (7,))],
)
def test_profile_steps_are_numbers_and_ranges(text, steps):
    assert profiling.parse_steps(text, 10) == steps


@pytest.mark.parametrize("text", ["0", "11", "5:3", "3-5", "3:", "3,,5", "a", "3,", "-1", "2:11", "1.5"])
def test_profile_steps_that_are_none(text):
    with pytest.raises(ValueError, match=re.escape(f"profile_steps={text!r}: ") + ".*which has 1 to 10.*such as 3 or"):
        profiling.parse_steps(text, 10)


def test_samples_are_readable(whole):
    text = (whole[0] / "samples.txt").read_text()
    samples = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 2, 4, 4, 6, 6]
    assert text.count("==== step") == len(samples)
    for sample in samples:
        assert re.fullmatch(r"<s> ((HI|lo) \d \S+ ){3}<think>", sample["prompt"])
        assert sample["prompt"] in text and re.fullmatch(r"\d", sample["reference"][0])
        assert len(sample["blocks"]) == 2
        for block, (begin, end) in zip(sample["blocks"], ((0, 3), (3, 6))):
            first, last = (int(x) for x in block["tokens"].split("-"))
            assert (first, last) == (begin, end) or last < end, "cut at the budget, or the trace ended before it"
            assert len(block["text"].split()) == last - first
            assert (block["advantage"] is None) == (first == last)
            assert len(block["answers"]) == len(block["scores"]) == 2
            for answer, score in zip(block["answers"], block["scores"]):
                assert score == 0 or answer == sample["reference"][0]


# ---------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("stop", [4, 3, 1], ids=["at_an_epoch's_end", "inside_an_epoch", "after_one_step"])
def test_resume_is_bitwise(whole, base, stop):
    workdir = base / f"stopped_{stop}"
    run(workdir, steps=stop)
    assert metrics.read_rows(workdir)[-1]["step"] == stop
    run(workdir)
    assert_same_run(workdir, whole[0])


def test_a_finished_run_is_left_alone(whole):
    before = metrics.read_rows(whole[0])
    run(whole[0])
    assert metrics.read_rows(whole[0]) == before


@pytest.mark.parametrize("stop", [2, 5], ids=["an_epoch's_end", "inside_an_epoch"])
def test_an_exception_loses_nothing(whole, base, monkeypatch, stop):
    """The process dies between two checkpoints: the rows since the last one are dropped and written again."""
    workdir = base / f"raised_{stop}"
    threads, begin = threading.active_count(), time.time()
    write = metrics.MetricsWriter.write

    def write_and_raise(writer, step, row):
        write(writer, step, row)
        if step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(metrics.MetricsWriter, "write", write_and_raise)
        run(workdir)
    assert threading.active_count() <= threads + 1, "writers, checkpoints and the notice are closed"
    again = time.time()
    run(workdir)
    assert_same_run(workdir, whole[0])

    # The share of the steps that count, of all the time since the first start.
    *_, last = (row for row in metrics.read_rows(workdir) if "score/anytime" in row)
    elapsed = last["seconds"] / last["speed/goodput"]
    assert again - begin < elapsed < time.time() - begin
    steps = sum(row["seconds/step"] for row in metrics.read_rows(workdir) if "score/anytime" in row)
    assert last["seconds"] == pytest.approx(steps, rel=0.05)


KILLED = """
import os, signal, sys
from absl import app
from tto_jax import train
write = train.MetricsWriter.write
def write_and_die(writer, step, row):
    write(writer, step, row)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
train.MetricsWriter.write = write_and_die
app.run(train.main)
"""


def test_resume_after_sigkill(whole, base):
    """The page as a process of its own, its options as flags, killed while its last checkpoint may still be written."""
    workdir = base / "killed"
    options = [f"--config.{name}={value}" for name, value in (SMALL | {"warm_start.cache": str(base)}).items()]
    command = [sys.executable, "-c", KILLED, "--config=configs/peak.py:brpo", f"--workdir={workdir}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert metrics.read_rows(workdir)[-1]["step"] == 5
    run(workdir)
    assert_same_run(workdir, whole[0])


# ---------------------------------------------------------------- the pages as processes


def page(name, *arguments, **options):
    command = [sys.executable, "-m", f"tto_jax.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **({"cwd": ROOT} | options))


def test_evaluate_then_report(whole, tmp_path, capsys):
    workdir = whole[0]
    done = page("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    done = page("evaluate", f"--workdir={workdir}", "--warm_start", f"--out={tmp_path / 'warm'}", "--seed=0")
    assert done.returncode == 0, done.stderr
    results = json.loads((workdir / "evaluation" / "results.json").read_text())
    assert results["step"] == STEPS and results["budgets"] == [3, 6, 9] and results["problems"] == 16
    assert results["anytime"] == pytest.approx(np.mean(results["accuracy"]))
    assert results["tokens"] == metrics.read_rows(workdir)[-1]["tokens"]
    scores = np.load(workdir / "evaluation" / "scores.npz")
    assert scores["correct"].shape == (16, 1, 3, 2) and len(set(scores["id"].tolist())) == 16
    # The page scores what the run's own evaluation scored: the same problems, keys and parameters.
    assert results["accuracy"] == pytest.approx(metrics.read_rows(workdir)[-1]["eval/accuracy"])
    warm = json.loads((tmp_path / "warm" / "evaluation" / "results.json").read_text())
    assert warm["step"] == 0 and warm["variant"] == "warm_start" and warm["tokens"] == 0
    assert warm["accuracy"] == pytest.approx(metrics.read_rows(workdir)[0]["eval/accuracy"])

    out = tmp_path / "report"
    report.main([str(workdir), str(tmp_path / "warm"), f"--out={out}", "--baseline=warm_start"])
    table = capsys.readouterr().out
    assert re.search(r"run +@3 +@6 +@9 +anytime", table) and re.search(r"^whole +\d", table, re.MULTILINE)
    assert re.search(r"^whole - warm +16 problems +[+-]\d", table, re.MULTILINE)
    assert re.search(r"^\| brpo +\| 1 +\| \d", table, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == {"results.json", "curves.png", "training.png"}
    for path in (out / "curves.png", out / "training.png", workdir / "evaluation" / "curve.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "results.json").read_text())
    assert {name: run["variant"] for name, run in summary["runs"].items()} == {"whole": "brpo", "warm": "warm_start"}


def test_programs_are_compiled_once(monkeypatch, tmp_path):
    """A page keeps them by default: below the user's cache; elsewhere or nowhere if told; not one folder a host."""
    given = []
    monkeypatch.setattr(jax.config, "update", lambda *arguments: given.append(arguments))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    host.keep_compiled_programs()
    assert given == [("jax_compilation_cache_dir", str(tmp_path / "tto_jax" / "jax_cache"))]
    with monkeypatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        host.keep_compiled_programs()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    host.keep_compiled_programs()
    assert len(given) == 1


def test_dry_run_writes_nothing(tmp_path):
    options = (f"--config={ROOT}/configs/peak.py:grpo,fast", f"--workdir={tmp_path / 'run'}", "--dry_run")
    done = page("train", *options, "--profile_steps=5", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    for words in ("parameters", "budgets", "[24] tokens", "bytes of KV cache", "LossConfig", "learning_rate: 0.001"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the experiments


VARIANTS = [
    (module, ",".join(words))
    for module, modifiers in ((peak, ("fast",)), (chain, common.MODIFIERS))
    for name in common.ALGORITHMS
    for n in range(len(modifiers) + 1)
    for words in ((name, *chosen) for chosen in itertools.combinations(modifiers, n))
] + [(peak, "fast"), (chain, "fast"), (chain, "two_digits,fast"), (peak, "brpo"), (chain, "fast,grpo")]


@pytest.mark.parametrize(("module", "variant"), VARIANTS, ids=lambda x: getattr(x, "__name__", x))
def test_every_variant_builds(module, variant):
    config = module.get_config(variant)
    plan = settings.build(config)
    assert config.is_locked and config.variant == variant
    budgets = config.budgets.tokens
    assert budgets == tuple(sorted(budgets)) and budgets[-1] == plan.rollout.trace_pad == config.evaluation.budgets[-1]
    at_the_end = ("grpo", "grpo_length", "mrt_termination", "mrt_joint")
    assert (len(budgets) == 1) == any(name in at_the_end for name in variant.split(","))
    assert plan.task.max_trace_tokens == budgets[-1]
    assert plan.rollout.answer_cap == (3 if "two_digits" in variant else 1)
    assert plan.credit.one_token_answers == ("two_digits" not in variant)
    assert train.describe(plan).count("\n") == 7


def test_headers_name_every_variant():
    """A reader finds the choices in the experiment's file."""
    named = ast.get_docstring(ast.parse(Path(peak.__file__).read_text()))
    assert [name for name in [*common.ALGORITHMS, "fast"] if not re.search(rf"\b{name}\b", named)] == []
    assert [w for w in common.MODIFIERS if not re.search(rf"\b{w}\b", named + Path(chain.__file__).read_text())] == []
