"""The page of STaR: what it keeps and learns, that it comes to the same bits however often it is killed, its errors."""

import gzip
import json
import re
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath
from test_math_path import MODEL, model_dir, problem_set  # noqa: F401

from configs import star as configuration
from tto_jax import (
    backtracking,
    chats,
    checkpoint,
    completions,
    evaluate,
    evaluation,
    learner,
    metrics,
    pretrained,
    report,
    selected,
    star,
    variants,
)
from tto_jax.core.selection import Rule
from tto_jax.models import decoder

flags.FLAGS.mark_as_parsed()

TINY = {
    "task.num_values": 3,
    "data.problems": 12,
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "model.mlp_size": 32,
    "warm_start.steps": 40,
    "warm_start.batch_size": 8,
    "warm_start.optimizer.warmup_steps": 1,
    "budgets.tokens": (3, 6),
    "rollout.group_size": 4,
    "rollout.answers": 2,
    "evaluation.budgets": (3, 6),
    "evaluation.traces": 4,
    "evaluation.answers": 2,
    "checkpoint.every": 2,
    "steps": 2,
    "star.problems": 8,
    "star.rows": 4,
    "star.micro_tokens": 0,
    "star.epochs": 2,
    "star.warmup": 0.0,
    "star.optimizer.learning_rate": 1e-2,
}


def tiny(cache, variant="peak", **changes):
    config = configuration.get_config(variant)
    given = TINY | {"warm_start.cache": str(cache)}
    config.update_from_flattened_dict(given | {name.replace("__", "."): value for name, value in changes.items()})
    return config


def run(workdir, config):
    star.run(config, star.build(config), epath.Path(workdir))
    return metrics.read_rows(workdir)


def params_of(workdir, config, step):
    like = jax.eval_shape(lambda: decoder.init_params(star.build(config).sampling.model, 0))
    return checkpoint.restore_params(epath.Path(workdir) / "checkpoints", like, step)[0]


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


def lines_of(folder, name):
    found = []
    for path in sorted(folder.glob(name)):
        with gzip.open(path, "rt") as file:
            found += [json.loads(line) for line in file]
    return found


@pytest.fixture(scope="module", autouse=True)
def two_parts():
    """The 32 traces of an iteration are sampled in two parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "MOST_ROWS", 16)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("warm_starts")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    workdir = epath.Path(tmp_path_factory.mktemp("runs") / "whole")
    return workdir, run(workdir, tiny(cache))


def test_what_is_kept(whole, cache):
    """Of the completions' files alone: the best prefix of each trace, the best of each problem, a right answer."""
    workdir, rows = whole
    tokenizer = star.build(tiny(cache)).sampling.tokenizer
    for iteration, row in enumerate(rows, 1):
        folder = selected.folder_of(workdir, iteration)
        sampled = lines_of(folder, "sampling/completions/train/*.jsonl.gz")
        assert len(sampled) == 8 * 4 and len({line["id"] for line in sampled}) == 8
        best = {}
        for line in sampled:
            assert line["forks"] == [0, *(min(b, line["tokens"]) for b in (3, 6))]
            scores = {}
            for fork, answers in zip(line["forks"][1:], line["answers"][1:]):
                scores.setdefault(fork, []).extend(answer["correct"] for answer in answers)
            rate, fork = max((sum(found) / len(found), -fork) for fork, found in scores.items())
            best[line["index"], line["trace"]] = rate, -fork
        most = {index: max(rate for (i, _), (rate, _) in best.items() if i == index) for index, _ in best}
        wanted = {key: fork for key, (rate, fork) in best.items() if 0 < rate == most[key[0]]}
        kept = lines_of(folder, "responses.jsonl.gz")
        assert {(x["index"], x["trace"]): x["lengths"][1] for x in kept} == wanted and wanted
        of = {(line["index"], line["trace"]): line for line in sampled}
        for response in kept:
            line = of[response["index"], response["trace"]]
            prompt, trace, inserted, answer = response["lengths"]
            words = tokenizer.decode(response["tokens"]).split()
            assert words[:prompt] == line["prompt"].split()
            assert words[prompt : prompt + trace] == line["text"].split()[:trace]
            assert words[prompt + trace : -1] == ["</think>", "ANS"][2 - inserted :] and answer == 1
            assert words[prompt + trace - 1] == "</think>" or inserted == 2
            right = [a["text"] for f, found in zip(line["forks"], line["answers"]) for a in found if a["correct"] and f]
            assert words[-1] in right
        assert row["kept/traces"] == len(kept) and row["kept/share"] == len(kept) / 32
        assert row["kept/length"] == np.mean([x["lengths"][1] for x in kept])
        means = [np.mean([[a["correct"] for a in line["answers"][s]] for line in sampled]) for s in range(3)]
        np.testing.assert_allclose([row["score/start"], row["score/3"], row["score/6"]], means, rtol=1e-6)
        assert row["length/mean"] == np.mean([line["tokens"] for line in sampled])


def test_what_is_learned(whole, cache):
    """Trace and answer; of the tokens between them, which were inserted, only if so asked. Every epoch all of it."""
    workdir, rows = whole
    folder = selected.folder_of(workdir, 1)
    responses = lines_of(folder, "responses.jsonl.gz")
    for train_inserted in (True, False):
        found, _ = selected.read(folder, 20, train_inserted)
        for response, tokens, trained in zip(responses, found.tokens, found.trained, strict=True):
            prompt, trace, inserted, answer = response["lengths"]
            assert tokens.tolist() == response["tokens"]
            wanted = [False] * prompt + [True] * trace + [train_inserted] * inserted + [True] * answer
            assert trained.tolist() == wanted
    fit = metrics.read_rows(folder / "fit")
    trained = sum(sum(response["lengths"][1:]) for response in responses)
    assert sum(row["tokens/trained"] for row in fit) == 2 * trained
    assert rows[0]["fit/steps"] == len(fit) and rows[0]["fit/loss"] == fit[-1]["loss/total"]
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["tokens"] > rows[0]["tokens"] > 0


def test_iterations_have_samples_of_their_own(whole):
    of = lambda i: lines_of(selected.folder_of(whole[0], i), "sampling/completions/train/*.jsonl.gz")  # noqa: E731
    first, second = of(1), of(2)
    assert {line["id"] for line in first} != {line["id"] for line in second}
    assert [line["text"] for line in first] != [line["text"] for line in second]


class Killed(BaseException):
    pass


def dying(function, call):
    """`function`, which a kill ends at its call number `call`, from 1, before it has done anything."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise Killed
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_run_comes_to_the_same_bits(whole, tmp_path, monkeypatch, cache):
    """While it samples, between the responses and their record, in the fine-tuning, before an iteration is saved."""
    config = tiny(cache)
    for owner, name, call in (
        (completions, "write", 2),
        (selected, "_sha256", 1),
        (learner, "supervised_step", 2),
        (star, "summary", 1),
        (completions, "write", 1),
        (checkpoint.Checkpointer, "save", 2),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, dying(getattr(owner, name), call))
            run(tmp_path / "run", config)
    rows = run(tmp_path / "run", config)
    without = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert without(rows) == without(whole[1])
    for iteration in (1, 2):
        one, other = (selected.folder_of(epath.Path(x), iteration) for x in (whole[0], tmp_path / "run"))
        for name in ("responses.jsonl.gz", "selection.json", "fit/metrics.jsonl"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
        assert equal(params_of(whole[0], config, iteration), params_of(tmp_path / "run", config, iteration))
        assert not (other / "fit" / "checkpoints").exists()
    assert len(list((other / "sampling" / "completions" / "train").iterdir())) == 2


def test_fine_tuning_begins_where_it_is_told(whole, tmp_path, cache):
    shutil.copytree(selected.folder_of(whole[0], 1) / "sampling", tmp_path / "run" / "iterations" / "0001" / "sampling")
    config = tiny(cache, star__begin="current")
    run(tmp_path / "run", config)
    first, second = (equal(params_of(whole[0], config, i), params_of(tmp_path / "run", config, i)) for i in (1, 2))
    assert first and not second


def test_damaged_responses(whole, tmp_path, cache):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    path = selected.folder_of(epath.Path(tmp_path / "run"), 1) / "responses.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not what was written: remove"):
        run(tmp_path / "run", tiny(cache))


def test_traces_are_cut_at_episodes(tmp_path, cache):
    """A check of peak is a label and two digits; here every label opens an episode, two at most."""
    markers = tuple("abc")
    changes = {"markers": markers, "separator": " ", "gap": 0, "max_cuts": 1, "group": 1}
    changes = {f"episodes__{name}": value for name, value in (changes | {"rule": "delimiters"}).items()}
    config = tiny(cache, steps=1, star__select__ties="shortest", **changes)
    (row,) = run(tmp_path / "run", config)
    folder, cut = selected.folder_of(epath.Path(tmp_path / "run"), 1), 0
    for line in lines_of(folder, "sampling/completions/train/*.jsonl.gz"):
        words = line["text"].split()
        opened = [i for i, word in enumerate(words) if i and word in markers]
        assert line["forks"] == [0, *opened[:1], *[len(words)] * (1 if opened else 2)]
        cut += bool(opened)
    kept = lines_of(folder, "responses.jsonl.gz")
    assert cut > 8 and len(kept) == len({x["index"] for x in kept}) == row["kept/traces"]
    assert {"score/episode_1", "score/episode_2"} <= set(row) and "score/3" not in row


def test_a_model_that_is_never_right(tmp_path, cache, monkeypatch):
    config = tiny(cache)
    monkeypatch.setattr(type(star.build(config).sampling.task), "is_correct", lambda *_: False)
    with pytest.raises(ValueError, match="none of the 32 traces can be kept"):
        run(tmp_path / "run", config)
    assert not selected.exists(selected.folder_of(epath.Path(tmp_path / "run"), 1))


def test_evaluate_and_report_take_the_run(whole, tmp_path, capsys):
    workdir, rows = whole
    for flag in ((), ("--warm_start", f"--out={tmp_path / 'warm'}")):
        with flagsaver.flagsaver():
            evaluate.main(flags.FLAGS(["evaluate", f"--workdir={workdir}", "--problems=4", *flag]))
    results = json.loads((workdir / "evaluation" / "results.json").read_text())
    assert (results["variant"], results["step"], results["problems"]) == ("mrt_star", 2, 4)
    sampled = [
        line
        for i in (1, 2)
        for line in lines_of(selected.folder_of(workdir, i), "sampling/completions/train/*.jsonl.gz")
    ]
    of_answers = sum(
        len(answer["ids"]) - n for x in sampled for n, of in zip(x["inserted"], x["answers"]) for answer in of
    )
    assert results["tokens"] == rows[-1]["tokens"] == sum(line["tokens"] for line in sampled) + of_answers
    report.main([str(workdir), str(tmp_path / "warm"), "--baseline=warm_start", f"--out={tmp_path / 'report'}"])
    printed = capsys.readouterr().out
    assert re.search(rf"^\| mrt_star .* {variants.count(results['tokens'])}, [+]", printed, re.MULTILINE)
    (workdir / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing; `python -m tto_jax\.star"):
        report.load_run(workdir)
    (tmp_path / "metrics.jsonl").rename(workdir / "metrics.jsonl")


@pytest.mark.slow
def test_texts_and_a_pretrained_model(tmp_path, model_dir, problem_set):  # noqa: F811
    config = configuration.get_config("math,plain")
    given = {
        "init": str(model_dir),
        "data.train": str(problem_set),
        "mesh": (1, 1, 1),
        "model.dtype": "float32",
        "model.remat": "none",
        "task.max_prompt_tokens": 8,
        "task.max_answer_tokens": 4,
        "task.prompting.style": "anytime",
        "task.prompting.instruction": " so",
        "task.prompting.elicit_ended": " Answer",
        "task.prompting.elicit_cut": " </think> Answer",
        "task.prompting.paragraph": "",
        "task.verifier.workers": 1,
        "task.verifier.wall_seconds": 300.0,  # on a machine that is busy otherwise
        "budgets.tokens": (2, 6),
        "evaluation.budgets": (2, 6),
        "rollout.answers": 2,
        "rollout.temperature": 3.0,  # of a random model that is too sure of one token
        "steps": 1,
        "star.select.unfinished": True,
        "star.rows": 4,
        "star.epochs": 1,
        "star.optimizer.learning_rate": 1e-2,
    }
    config.update_from_flattened_dict(given)
    (row,) = run(tmp_path / "run", config)
    assert 0 < row["kept/share"] < 1 and row["step"] == 1
    found = pretrained.find(tmp_path / "run")
    assert found.kind == "run"
    assert not equal(found.load(MODEL), pretrained.find(model_dir).load(MODEL))
    backtracking.main([f"--run={tmp_path / 'run'}", "--scheme=stitched", f"--out={tmp_path / 'examples.jsonl'}"])
    examples = chats.read([tmp_path / "examples.jsonl"])
    assert all(chat.messages[-1]["content"].endswith(" so") and "\\boxed" in chat.target for chat in examples)
    assert all(chat.prefix.startswith("Node 1: ") and "Backtrack to beginning" in chat.target for chat in examples)


# ---------------------------------------------------------------- the configurations


def test_the_numbers_of_the_paper():
    config = configuration.get_config("math")
    optimizer = config.star.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, config.star.warmup) == (1e-6, 0.01, 0.1)
    assert (config.star.epochs, config.star.rows, config.rollout.group_size) == (3, 256, 4)
    assert (config.rollout.temperature, config.task.max_prompt_tokens) == (0.9, 4096)
    assert (config.episodes.rule, config.episodes.max_cuts, config.episodes.group) == ("delimiters", 49, 5)
    assert 24_000 < config.budgets.tokens[-1] + config.task.max_answer_tokens <= 24_576


@pytest.mark.parametrize("variant", ["peak", "chain", "peak,plain", "chain,mrt,fast"])
def test_variants_are_accepted(variant):
    plan = star.build(configuration.get_config(variant))
    criterion = "final" if "plain" in variant else "best"
    assert plan.rule == Rule(criterion, cut=criterion == "best", unfinished=criterion == "final")
    assert plan.fitting.row_length == plan.sampling.prompt_pad + plan.options.budgets[-1] + plan.sampling.answer_pad
    assert plan.fitting_of(200).optimizer.warmup_steps == 20


@pytest.mark.parametrize("variant", ["", "chess", "peak,mrt,plain", "math,fast", "peak,grpo"])
def test_variants_that_do_not_exist(variant):
    with pytest.raises(ValueError, match=r"choose one of \('peak', 'chain', 'math'\)"):
        configuration.get_config(variant)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"star__problems": 13}, r"star.problems=13 exceeds data.problems=12: choose 0"),
        ({"star__problems": -1}, "star.problems=-1: it must be at least 0"),
        ({"star__epochs": 0}, "star.epochs=0: it must be at least 1"),
        ({"star__rows": 0}, "star.rows=0: it must be at least 1"),
        ({"star__row_length": 200}, "star.row_length=200: the model has model.max_position=128"),
        ({"star__begin": "last"}, r"star.begin='last' is unknown: choose one of \('initial', 'current'\)"),
        ({"rollout__start": False}, "rollout.start=False: progress begins with scores before any thinking"),
        ({"episodes__rule": "words"}, "episodes.rule='words' is unknown: choose one of"),
        ({"star__warmup": 1.0}, r"star.warmup=1.0: a share of the steps in \[0, 1\)"),
        ({"star__select__criterion": "progress"}, "criterion='progress' is unknown: choose one of"),
        ({"star__select__criterion": "final"}, "STaR keeps whole traces"),
        ({"star__optimizer__schedule": "linear"}, "schedule='linear' is unknown: choose one of"),
        ({"rollout__temperature": 0.0}, "rollout.temperature=0.0"),
    ],
)
def test_refused_before_any_work(cache, change, said):
    with pytest.raises(ValueError, match=said):
        star.build(tiny(cache, **change))
