"""`python -m tto_jax.evaluate` on an embedded run and on a tiny pretrained model: files, kill and resume, misuse."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from absl import app, flags
from absl.testing import flagsaver
from etils import epath
from test_evaluation import assert_equals_loops, read_lines

from configs import peak
from tto_jax import checkpoint, evaluate, learner, metrics, pretrained, problem_files, problem_sets, report, settings
from tto_jax.models import decoder, hf_config, hf_weights
from tto_jax.models.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "task.num_values": 3,
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "model.mlp_size": 32,
    "evaluation.final_problems": 6,
    "evaluation.budgets": (3, 6, 9),
    "evaluation.answers": 2,
    "evaluation.extension_words": ("a", "b"),
}
WORDS = ("<unk>", "<end>", "</think>", "Answer", "so", *(f"\\boxed{{{n}}}" for n in range(4)), *"0123", "+")
MODEL = ModelConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=32,
    max_position=64,
    attention_bias=True,
)
EXPERIMENT = """
from configs import math

def get_config(variant="brpo"):
    config = math.get_config(variant)
    config.update_from_flattened_dict({
        "model.dtype": "float32", "model.remat": "none", "task.max_prompt_tokens": 5, "task.max_answer_tokens": 3,
        "task.prompting.instruction": " so", "task.prompting.elicit_ended": " Answer",
        "task.prompting.elicit_cut": " </think> Answer", "task.prompting.paragraph": "", "task.verifier.workers": 1,
        "budgets.tokens": (20, 4000), "evaluation.budgets": (2, 4, 6), "evaluation.traces": 4,
    })
    return config
"""


def page(*arguments):
    """The page in this process; what it would print as an error is raised."""
    with flagsaver.flagsaver():
        evaluate.main(flags.FLAGS(["evaluate", *map(str, arguments)]))


def results_of(out):
    return json.loads((out / "evaluation" / "results.json").read_text())


def without_timing(results):
    return {name: value for name, value in results.items() if name not in ("timing", "commit")}  # git may move on


def save_run(workdir, config, params, steps):
    """A workdir as training leaves it: what the page reads of one."""
    plan = settings.build(config)
    checkpoint.claim_workdir(workdir, config.to_dict())
    with checkpoint.Checkpointer(workdir / "checkpoints", keep=len(steps)) as saved:
        for step in steps:
            state = learner.init_state(jax.tree.map(lambda x, s=step: x * s, params), plan.optimizer)
            saved.save(step, state, {})
    rows = [{"step": step, "tokens": 100 * step, "seconds": 2.0 * step} for step in range(max(steps) + 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An embedded run with checkpoints of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = peak.get_config("brpo")
    config.update_from_flattened_dict(SMALL)
    save_run(workdir, config, decoder.init_params(settings.build(config).model, 0), steps=(2, 4))
    return workdir


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with a model whose half of the words are boxes, two sets of sums, and an experiment on them."""
    folder = tmp_path_factory.mktemp("texts")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    hf.chat_template = "{{ messages[-1]['content'] }}"
    hf.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(hf_config.to_hf(MODEL, "float32", None)))
    hf_weights.save(
        folder / "model", MODEL, jax.tree.map(lambda x: 2 * x, decoder.init_params(MODEL, 0)), dtype="float32"
    )
    for name, size in (("sums", 3), ("more", 2)):
        found = [{"problem": f"{a} + {b}", "answer": f"{(a + b) % 4}"} for a in range(size) for b in range(size)]
        found += [{"problem": "1 + 1 + 1 + 1", "answer": "0"}] * (name == "sums")  # longer than the prompts' limit
        (folder / f"{name}.json").write_text(json.dumps(found))
        problem_sets.write_set(problem_files.read_files([folder / f"{name}.json"]), folder / name, name=name)
    (folder / "experiment.py").write_text(textwrap.dedent(EXPERIMENT))
    return folder


def of_texts(folder, out, *more):
    sets = f"--data={folder / 'sums'},{folder / 'more'}"
    return (
        f"--config={folder / 'experiment.py'}",
        f"--model={folder / 'model'}",
        sets,
        f"--out={out}",
        "--mesh=1,1,1",
        *more,
    )


@pytest.fixture(scope="module")
def whole(texts):
    """Both sets, without interruption: 9 problems of `sums`, 4 of `more`, 4 traces each, 8 rows a part."""
    page(*of_texts(texts, texts / "whole", "--rows=8"))
    return texts / "whole"


# A model without a run, on prepared sets.


def test_files_of_an_evaluation(whole, capsys):
    folder = whole / "evaluation"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    parts = {f"completions/sums/{n:05d}.jsonl.gz" for n in range(5)} | {
        f"completions/more/{n:05d}.jsonl.gz" for n in (0, 1)
    }
    pictures = {"curve.png", "tokens.png", "regret.png"}
    assert names == parts | pictures | {"results.json", "scores.npz", "options.json"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    results = results_of(whole)
    assert results["budgets"] == [2, 4, 6] and results["traces"] == 4 and results["answers"] == 1
    assert results["temperature"] == 0.6 and results["variant"] == "model" and results["step"] == 0
    assert set(results["versions"]) >= {"jax", "python"} and len(results["config_hash"]) == 12 and results["commit"]
    timing = results["timing"]
    assert timing["tokens"] == results["evaluation_tokens"] > 0
    assert timing["tokens_per_second"] == timing["tokens"] / timing["seconds"] > 0
    assert str(whole) not in (folder / "results.json").read_text()


def test_numbers_are_those_of_the_kept_completions(whole):
    results = results_of(whole)
    assert set(results["sets"]) == {"sums", "more"}
    for name, record in results["sets"].items():
        lines = read_lines(whole / "evaluation" / "completions" / name)
        assert_equals_loops(record, lines, name, (2, 4, 6), (6,), 0)
        assert record["problems"] == len(lines) / 4 and record["dropped"] == (name == "sums")
    for key in ("accuracy", "anytime", "maj@4", "pass@2", "regret@6"):
        want = np.mean([record[key] for record in results["sets"].values()], axis=0)
        np.testing.assert_allclose(results[key], want, rtol=1e-6)
    assert 0 < results["anytime"] < 1 and 0 < results["formatted"][-1] < 1, "scores are mixed"


def test_scores_are_those_of_the_texts(whole):
    """Read as a person would: the last box of the answer's text, and one end of thinking."""
    sums = [(a, b) for a in range(3) for b in range(3)]
    for line in read_lines(whole / "evaluation" / "completions" / "sums"):
        a, b = sums[line["index"]]
        for answers, fork in zip(line["answers"], line["forks"]):
            for answer in answers:
                boxes = [word for word in answer["text"].split() if word.startswith("\\boxed")]
                before = line["text"].split()[:fork]
                right = bool(boxes) and boxes[-1] == f"\\boxed{{{(a + b) % 4}}}"
                ended = "<end>" in before or "</think>" in answer["text"]
                assert answer["correct"] == (right and not ended)
                assert answer["answer"] == (boxes[-1][7:-1] if boxes else "")


def test_what_is_left_out_is_said(texts, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "again")
    page(*of_texts(texts, tmp_path / "again"))
    said = capsys.readouterr().out
    assert "sums: 9 problems, 1 left out: prompts too long" in said
    assert "more: 4 problems, 0 left out" in said
    assert "model: 2:0." in said and "anytime" in said


KILLED = """
import os, signal
from absl import app
from tto_jax import completions, evaluate
write, written = completions.write, []
def write_and_die(path, lines):
    write(path, lines)
    written.append(path)
    if len(written) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
completions.write = write_and_die
app.run(evaluate.main)
"""


def test_killed_and_resumed_is_the_same_evaluation(texts, whole, tmp_path):
    """Killed after its first part, called again without --rows: every number to the bit, every file of completions."""
    out = tmp_path / "whole"
    command = [sys.executable, "-c", KILLED, *map(str, of_texts(texts, out, "--rows=8"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    parts = list((out / "evaluation" / "completions").rglob("*.gz"))
    assert len(parts) == 1 and not (out / "evaluation" / "results.json").exists()
    first = (parts[0].stat().st_mtime_ns, gzip.decompress(parts[0].read_bytes()).count(b"\n"))
    assert first[1] == 8
    page(*of_texts(texts, out))
    again, once = results_of(out), results_of(whole)
    assert without_timing(again) == without_timing(once)
    assert 0 < again["timing"]["tokens"] < once["timing"]["tokens"]
    assert parts[0].stat().st_mtime_ns == first[0], "the first part was read back"
    for path in (whole / "evaluation" / "completions").rglob("*.gz"):
        assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes()
    page(*of_texts(texts, out))
    assert without_timing(results_of(out)) == without_timing(once)
    assert results_of(out)["timing"] == {"seconds": 0.0, "tokens": 0, "tokens_per_second": None}


def test_another_evaluation_into_the_same_place_is_refused(texts, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as error:
        page(*of_texts(texts, whole, "--seed=5", "--budgets=2,6"))
    for words in ("options.seed: 0 there, 5 here", "options.budgets: [2,4,6] there, [2,6] here", "--out=DIR"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"sets.more.problems: 4 there, nothing here"):
        page(*of_texts(texts, whole), f"--data={texts / 'sums'}")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_the_report_reads_several_sets(whole):
    run = report.load_run(whole)
    assert run.set_names == ("sums", "more") and run.correct.shape == (13, 4, 3, 1)
    each = report.with_sets(run)
    assert [one.name for one in each] == ["mean over sets", "sums", "more"]
    assert [one.results["problems"] for one in each] == [13, 9, 4]


# A training run.


def test_an_embedded_run(run, tmp_path):
    page(f"--workdir={run}")
    results = results_of(run)
    assert (results["step"], results["tokens"], results["seconds"], results["problems"]) == (4, 400, 8.0, 6)
    assert results["variant"] == "brpo" and results["traces"] == 1 and results["warm_start_seed"] == 0
    assert results["config_hash"] == checkpoint.config_hash(json.loads((run / "config.json").read_text()))
    lines = read_lines(run / "evaluation" / "completions" / "peak")
    assert_equals_loops(results, lines, "peak", (3, 6, 9), (9,), 0)
    assert report.load_run(run).correct.shape == (6, 1, 3, 2)
    # Scores of a shape that another test has: what sums them up compiles for each shape.
    given = (
        "--step=2",
        "--traces=4",
        "--answers=1",
        "--budgets=2,5",
        "--seed=2",
        "--problems=4",
        "--start",
        "--extend=2",
    )
    page(f"--workdir={run}", f"--out={tmp_path}", *given, "--temperature=1.5", "--regret_tokens=5")
    other = results_of(tmp_path)
    assert (other["step"], other["tokens"], other["budgets"], other["problems"]) == (2, 200, [0, 2, 5], 4)
    assert (other["traces"], other["answers"], other["temperature"], other["evaluation_seed"]) == (4, 1, 1.5, 2)
    lines = read_lines(tmp_path / "evaluation" / "completions" / "peak")
    assert {len(line["answers"][0]) for line in lines} == {1} and len(lines) == 16
    assert {line["forks"][0] for line in lines} == {0} and {len(line["extensions"]) for line in lines} == {2}
    assert_equals_loops(other, lines, "peak", (0, 2, 5), (5,), 2)
    found = other["extrapolation"]
    assert len(found["accuracy"]) == 3 and found["accuracy"][0] == other["final"] and found["gain"][0] == 0
    assert found["thinking"] == sorted(found["thinking"]) and set(found["sets"]) == {"peak"}
    with np.load(tmp_path / "evaluation" / "extended.npz") as scores:
        assert scores["correct"].shape == (4, 4, 3, 1)


def test_a_run_of_a_pretrained_model(texts, whole, tmp_path):
    """Its checkpoint, tokenizer and sets; of equal parameters the same completions as of the model itself."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("experiment", texts / "experiment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.init, config.data.eval = str(texts / "model"), (str(texts / "sums"), str(texts / "more"))
    config.budgets.tokens = (2, 4)  # those of the experiment exceed the model's context, which only training minds
    workdir = epath.Path(tmp_path / "run")
    start = pretrained.find(texts / "model")
    pretrained.copy_small_files(start, workdir / "hf")
    save_run(workdir, config, start.load(MODEL), steps=(1, 3))
    page(f"--workdir={workdir}", "--step=1", "--rows=8", f"--out={tmp_path / 'out'}")
    results, same = results_of(tmp_path / "out"), results_of(whole)
    assert results["sets"] == same["sets"] and results["variant"] == "brpo" and results["tokens"] == 100
    page(f"--workdir={workdir}", f"--data={texts / 'more'}", "--rows=8")
    assert list(results_of(workdir)["sets"]) == ["more"] and results_of(workdir)["step"] == 3
    assert metrics.read_rows(workdir)[-1]["step"] == 3


# Two evaluations.


def test_compare_prints_and_writes(run, texts, whole, tmp_path, capsys):
    page(*of_texts(texts, tmp_path / "other", "--seed=1", "--rows=8"))
    capsys.readouterr()
    page("--compare", whole, tmp_path / "other", f"--out={tmp_path / 'compared'}")
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert "sums (9 problems)" in text and "mean over sets" in text and "note: evaluation_seed: 0 and 1" in text
    a, b = results_of(whole), results_of(tmp_path / "other")
    for key in ("anytime", "final", "maj@4", "accuracy", "mean_length", "unfinished"):
        found = record["metrics"][key]
        np.testing.assert_allclose(found["difference"], np.array(a[key]) - b[key], atol=1e-6)
        low, high = np.transpose(found["ci95"])
        assert np.all(low <= np.array(found["difference"]) + 1e-6) and np.all(
            high >= np.array(found["difference"]) - 1e-6
        )
    assert f"{100 * record['metrics']['final']['difference']:+.1f}" in text
    with pytest.raises(app.UsageError, match="budgets differ"):
        page("--compare", whole, run)


# Misuse, before any work.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either --workdir=RUN"),
        (("--workdir=RUN", "--config=TEXTS/experiment.py"), "give either --workdir=RUN"),
        (("RUN",), "unexpected arguments"),
        (("--workdir=RUN", "--model=TEXTS/model"), "--model goes with --config"),
        (("--config=TEXTS/experiment.py", "--model=TEXTS/model"), "--config needs --out=DIR"),
        (("--config=TEXTS/experiment.py", "--out=OUT", "--warm_start"), "--warm_start goes with --workdir"),
        (("--config=TEXTS/experiment.py", "--out=OUT", "--step=3"), "--step goes with --workdir"),
        (("--config=TEXTS/experiment.py", "--model=TEXTS/model", "--out=OUT"), "no problems: give --data=SET"),
        (("--config=configs/peak.py", "--out=OUT"), "starts from a warm start; train it and give --workdir"),
        (("--workdir=RUN", "--warm_start"), "--warm_start needs --out"),
        (("--workdir=RUN", "--warm_start", "--out=OUT", "--step=1"), "two different models"),
        (("--workdir=RUN", "--data=TEXTS/sums"), "--data: this run's problems are made by its task"),
        (("--workdir=RUN", "--budgets=3,x"), "--budgets=3,x: give integers"),
        (("--workdir=RUN", "--budgets=-3,6"), "--budgets=-3,6: give positive integers"),
        (("--workdir=RUN", "--regret_tokens=0"), "--regret_tokens=0: give positive integers"),
        (("--workdir=OUT",), "holds no config.json"),
        (("--compare", "RUN"), "--compare takes two evaluated runs, got 1"),
        (("--compare", "RUN", "OUT"), "OUT/evaluation/results.json is missing"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_misuse(run, texts, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("work began"))
    places = {"RUN": run, "TEXTS": texts, "OUT": tmp_path / "out"}
    if not (run / "evaluation").exists() and "--compare" in arguments:
        page(f"--workdir={run}")
    given = []
    for word in arguments:
        for name, path in places.items():
            word = word.replace(name, os.fspath(path))
        given.append(word)
    with pytest.raises(app.UsageError) as error:
        page(*given)
    assert said in str(error.value).replace(os.fspath(tmp_path / "out"), "OUT")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workdir=RUN", "--budgets=6,3"), "strictly increase"),
        (("--workdir=RUN", "--budgets=3,200"), "model.max_position=128"),
        (("--workdir=RUN", "--temperature=-1"), "evaluation.temperature=-1"),
        (("--workdir=RUN", "--extend=9"), "extensions=9 of evaluation.extension_tokens=12 .*model.max_position=128"),
        (("--workdir=RUN", "--temperature=0"), "greedy samples are all alike"),
        (("--workdir=RUN", "--step=3", "--out=OUT"), r"No checkpoint of step 3 .*\[2, 4\]"),
        (("--config=TEXTS/experiment.py", "--data=TEXTS/sums", "--out=OUT"), "init is empty: name the model"),
        (("--config=TEXTS/experiment.py", "--data=TEXTS/sums", "--out=OUT", "--model=OUT"), "is no directory"),
        (("--config=TEXTS/experiment.py", "--data=OUT", "--out=OUT", "--model=TEXTS/model"), "OUT"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_what_cannot_work_is_refused(run, texts, tmp_path, arguments, said):
    given = []
    for word in arguments:
        for name, path in {"RUN": run, "TEXTS": texts, "OUT": tmp_path / "out"}.items():
            word = word.replace(name, os.fspath(path))
        given.append(word)
    with pytest.raises((ValueError, FileNotFoundError), match=said.replace("OUT", os.fspath(tmp_path / "out"))):
        page(*given)
    assert not (tmp_path / "out").exists()
