"""Texts end to end: a pretrained directory, prepared problems, boxed answers, a training step, an export.

The model is random, its vocabulary small and half of it boxes, so that scores are mixed: a path that loses them on the
way would be seen.
"""

import json

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from absl import flags
from etils import epath

from configs import math
from tto_jax import metrics, pretrained, problem_files, problem_sets, settings, train
from tto_jax.models import decoder, hf_config, hf_weights
from tto_jax.models.config import ModelConfig

WORDS = (
    "<unk>",
    "<end>",
    "</think>",
    "Answer",
    "so",
    "wait",
    *(f"\\boxed{{{n}}}" for n in range(6)),
    *"0123456789",
    "+",
)
MODEL = ModelConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=32,
    max_position=64,
    attention_bias=True,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A Qwen2 directory with random weights and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    hf.chat_template = "{{ messages[-1]['content'] }}"
    hf.save_pretrained(folder)
    params = jax.tree.map(lambda x: x * 2.0, decoder.init_params(MODEL, 0))
    (folder / "config.json").write_text(json.dumps(hf_config.to_hf(MODEL, "float32", None)))
    hf_weights.save(folder, MODEL, params, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def problem_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sums = [{"problem": f"{a} + {b}", "answer": f"0{(a + b) % 6}"} for a in range(4) for b in range(4)]
    (folder / "sums.json").write_text(json.dumps(sums))
    return problem_sets.write_set(problem_files.read_files([folder / "sums.json"]), folder / "sums", name="sums").path


def config_of(model_dir, problem_set, **changes):
    config = math.get_config("brpo")
    given = {
        "init": str(model_dir),
        "data.train": str(problem_set),
        "data.eval": (str(problem_set),),
        "steps": 2,
        "mesh": (1, 1, 1),
        "model.dtype": "float32",
        "model.remat": "none",
        "task.max_prompt_tokens": 8,
        "task.max_answer_tokens": 4,
        "task.prompting.instruction": " so",
        "task.prompting.elicit_ended": " Answer",
        "task.prompting.elicit_cut": " </think> Answer",
        "task.prompting.paragraph": "",
        "task.verifier.workers": 1,
        "budgets.tokens": (2, 4, 6),
        "rollout.problems": 4,
        "rollout.group_size": 4,
        "rollout.answers": 2,
        "learner.micro_tokens": 200,
        "learner.tokens_per_row": 6,
        "learner.optimizer.learning_rate": 1e-2,
        "evaluation.budgets": (2, 6),
        "evaluation.every": 2,
        "evaluation.problems": 16,
        "evaluation.traces": 2,
        "checkpoint.every": 1,
        "log.samples_every": 1,
    }
    config.update_from_flattened_dict(given | {name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def run(model_dir, problem_set, tmp_path_factory):
    flags.FLAGS.mark_as_parsed()
    workdir = epath.Path(tmp_path_factory.mktemp("runs") / "run")
    config = config_of(model_dir, problem_set)
    train.train(config, settings.build(config), workdir)
    return workdir


def test_mixed_scores_move_the_parameters(run, model_dir):
    """A no-op anywhere between texts and parameters would pass on a random model of a large vocabulary; not here."""
    rows = [row for row in metrics.read_rows(run) if "score/anytime" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["score/anytime"] < 1 and row["groups/without_signal"] < 1
        assert row["advantage/std/0"] > 0 and row["update/grad_norm"] > 0 and row["update/skipped"] == 0
        assert 0 < row["formatted/6"] < 1 and row["grading/timeout"] == row["grading/crash"] == 0
        assert row["logprob_gap/max"] < 1e-4
    before, after = (pretrained.find(path).load(MODEL) for path in (model_dir, run))
    change = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), before, after)
    assert min(jax.tree.leaves(change)) > 0, "every array is trained"


def test_scores_are_those_of_the_texts(run):
    """The samples that were written, read as a person would."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    judged = set()
    for sample in samples:
        assert sample["prompt"].count("+") == 1 and sample["reference"] == [f"0{eval_sum(sample['prompt']) % 6}"]
        thought = ""
        for block in sample["blocks"]:
            thought += " " + block["text"]
            for text, score in zip(block["answers"], block["scores"]):
                boxes = [word for word in text.split() if word.startswith("\\boxed")]
                right = bool(boxes) and boxes[-1] == f"\\boxed{{{int(sample['reference'][0])}}}"
                ended = "<end>" in thought or "</think>" in text
                assert score == (right and not ended), (thought, text)
                judged.add(score)
    assert judged == {0.0, 1.0}


def eval_sum(prompt):
    a, b = prompt.split(" + ")
    return int(a) + int(b)


def test_evaluation_rows(run):
    rows = [row for row in metrics.read_rows(run) if "eval/anytime" in row]
    assert [row["step"] for row in rows] == [0, 2]
    assert 0 < rows[0]["eval/anytime"] < 1 and len(rows[0]["eval/accuracy"]) == 2


def test_a_resumed_run_is_the_same_run(run, model_dir, problem_set, tmp_path):
    """One step, then the other, in two processes' worth of calls: bitwise the uninterrupted parameters."""
    for steps in (1, 2):
        config = config_of(model_dir, problem_set, steps=steps)
        train.train(config, settings.build(config), epath.Path(tmp_path / "run"))
    again, whole = (pretrained.find(path).load(MODEL) for path in (tmp_path / "run", run))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": ""}, "init is empty: name the model"),
        ({"init": "nowhere"}, "nowhere"),
        ({"data__train": ""}, "data.train is empty"),
        ({"data__train": "nowhere"}, "nowhere"),
        (
            {"model__num_layers": 3, "model__qk_norm": True},
            r"num_layers: .* has 2, you gave 3\n.*qk_norm: .*you gave True",
        ),
        ({"task__prompting__style": "anytme"}, "'anytme' is unknown"),
        ({"task__prompting__think_end": "</thought>"}, "elicit_cut"),
        ({"task__max_answer_tokens": 0}, "task.max_answer_tokens=0"),
        ({"task__max_prompt_tokens": 2}, "max_prompt_tokens|no problem|prompt"),
        ({"budgets__tokens": (2, 60)}, "model.max_position=64"),
    ],
)
def test_what_cannot_work_is_refused(model_dir, problem_set, tmp_path, changes, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        config = config_of(model_dir, problem_set, **changes)
        train.train(config, settings.build(config), epath.Path(tmp_path / "run"))


def test_a_training_set_that_has_changed_is_refused(model_dir, tmp_path):
    for first in (1, 2):
        sums = [{"problem": f"{first} + {b}", "answer": str(first + b)} for b in range(4)]
        (tmp_path / "sums.json").write_text(json.dumps(sums))
        contents = problem_files.read_files([tmp_path / "sums.json"])
        path = problem_sets.write_set(contents, tmp_path / "sums", overwrite=True).path
        config = config_of(model_dir, path, steps=first, evaluation__problems=0)
        if first == 1:
            train.train(config, settings.build(config), epath.Path(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"data.train=.* has changed since step 1"):
        train.train(config, settings.build(config), epath.Path(tmp_path / "run"))
