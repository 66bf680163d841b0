"""Thinking that takes steps back, linearised before every round: what the model sees, what is kept, its numbers."""

import dataclasses
import functools
import re
import shutil

import numpy as np
import pytest
import tokenizers
import transformers
from absl import app
from etils import epath
from test_evaluate_page import of_texts, page, results_of, texts  # noqa: F401
from test_evaluation import OPTIONS, A, N, assert_same, params, plan, read_lines
from test_extrapolation import likeliest

from tto_jax import evaluation, linearised, report, summary
from tto_jax.core import token_tree
from tto_jax.tasks import Problem

WINDOW, TOKENS, ROUNDS = 6, 5, 3
GO_ON = {"linearise": WINDOW, "rounds": ROUNDS, "extension_tokens": TOKENS}
MARKERS = ("Node 1: ", "\n\nBacktrack to beginning\n\n", "Node 2: ", "\n\nBacktrack to Line 1", "\n\n")
WORDS = ("<pad>", "<s>", "<think>", "</think>", "ANS", *MARKERS, *"1abcdefghijklmno")  # as many as the model has


def exact(words):
    """A tokenizer of these words, whatever stands between them."""
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    longest = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(longest), "isolated")
    found.decoder = tokenizers.decoders.Fuse()
    return found


@functools.cache
def backtracking_plan():
    """The plan of the other tests, whose words are steps and backtracks."""
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=exact(WORDS), pad_token="<pad>")
    return dataclasses.replace(plan(), tokenizer=dataclasses.replace(plan().tokenizer, hf=hf))


PROBLEMS = tuple(Problem(id=7 * i + 1, prompt=f"{x}{x}b", answers=("",)) for i, x in enumerate("abcdefghijk"))


def evaluate(folder=None, **changes):
    options = dataclasses.replace(OPTIONS, **GO_ON | changes)
    return evaluation.evaluate(backtracking_plan(), params(), PROBLEMS, options, folder=folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("linearised"))
    return evaluate(folder), read_lines(folder)


def follow(text):
    """What is left of a text, paragraph by paragraph; a backtrack that ends the text waits."""
    lines, paragraphs = [[]], text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        back = re.fullmatch(r"Backtrack to (?:Line (\d+)|beginning)", paragraph)
        node = re.match(r"Node (\d): ", paragraph)
        if node:
            if int(node[1]) != len(lines):
                return text
            lines.append([paragraph])
        elif back and i < len(paragraphs) - 1:
            if int(back[1] or 0) >= len(lines):
                return text
            del lines[int(back[1] or 0) + 1 :]
        else:
            lines[-1].append(paragraph)
    return "\n\n".join(paragraph for line in lines for paragraph in line)


def rounds_of(line):
    """(what is left of the thinking before, the round) of those in which the trace goes on."""
    left, over = line["text"], line["ended"] or line["eos"]
    for one in line["extensions"]:
        if not over:
            left = follow(left)
            yield left, one
            left, over = left + one["text"], one["ended"] or one["eos"]


def test_what_is_kept_of_a_round(kept):
    encode = backtracking_plan().tokenizer.encode
    shorter = longer = ended = 0
    for line in kept[1]:
        before, spent, left_before = line, line["tokens"], line["text"]
        gone_on = list(rounds_of(line))
        assert len(line["extensions"]) == ROUNDS
        for left, one in gone_on:
            assert one["word"] == "" and one["seen"] == min(len(encode(left)), WINDOW)
            assert one["sampled"] == len(encode(one["text"])) <= TOKENS
            assert one["ended"] == one["text"].endswith("</think>") and (one["ended"] or one["sampled"] == TOKENS)
            assert one["tokens"] == spent + one["sampled"] and len(one["answers"]) == A
            shorter += len(left) < len(left_before)
            longer += len(encode(left)) > WINDOW
            before, spent, left_before = one, one["tokens"], left + one["text"]
        for one in line["extensions"][len(gone_on) :]:
            ended += 1
            assert (one["sampled"], one["seen"], one["text"], one["tokens"]) == (0, 0, "", spent)
            assert one["answers"] == (before["answers"][-1] if before is line else before["answers"])
    assert min(shorter, longer, ended) > 3, "some took steps back, some windows were full, some had ended"


def test_the_arrays_are_those_of_the_lines(kept):
    result, lines = kept
    extended = result.extended
    assert extended.correct.shape == (len(PROBLEMS), N, 1 + ROUNDS, A)
    for line in lines:
        at = line["index"], line["trace"]
        assert extended.forks[at].tolist() == [line["tokens"], *(one["tokens"] for one in line["extensions"])]
        columns = [line["answers"][-1], *(one["answers"] for one in line["extensions"])]
        for e, answers in enumerate(columns):
            assert extended.correct[(*at, e)].tolist() == [answer["correct"] for answer in answers]
    went_on = [one for line in lines for _, one in rounds_of(line)]
    new = sum(one["sampled"] + sum(answer["tokens"] for answer in one["answers"]) for one in went_on)
    assert result.new_tokens == result.tokens + new
    found = summary.extrapolation({"x": extended}, seed=0)
    assert found["thinking"] == pytest.approx(extended.forks.mean(axis=(0, 1)).tolist())
    assert found["accuracy"] == pytest.approx(extended.correct.mean(axis=(0, 1, 3)).tolist())


def test_what_was_sampled_at_the_budgets_is_the_same(kept):
    plain = evaluate(linearise=0, rounds=0, extension_tokens=0)
    assert plain.extended is None
    assert_same(plain, kept[0])


def test_greedy_rounds_follow_a_full_forward(tmp_path):
    """Every sampled token is the likeliest after the prompt and the window of what is left of the thinking."""
    evaluate(epath.Path(tmp_path), traces=1, answers=1, temperature=0.0)
    encode, sequences, shorter = backtracking_plan().tokenizer.encode, [], 0
    for line in read_lines(epath.Path(tmp_path)):
        for left, one in rounds_of(line):
            before = encode(PROBLEMS[line["index"]].prompt) + encode(left)[-WINDOW:]
            thought = before + encode(one["text"])
            sequences.append((before, encode(one["text"])))
            elicit = ["ANS"] if one["ended"] else ["</think>", "ANS"]
            sequences.append((thought + encode("".join(elicit)), encode(one["answers"][0]["text"])))
            shorter += "Backtrack" in line["text"]
    assert sequences and shorter
    tokens, length = np.zeros((len(sequences), 40), np.int32), []
    for row, (before, sampled) in zip(tokens, sequences):
        row[: len(before + sampled)] = before + sampled
        length.append(len(before + sampled))
    found = np.asarray(likeliest(params(), token_tree.sequences(tokens, length, np.zeros(tokens.shape, bool))))
    for row, best, (before, sampled) in zip(tokens, found, sequences):
        for t in range(len(before), len(before) + len(sampled)):
            assert best[t - 1] == row[t]


def test_a_linearised_text_is_tokenized_anew():
    tokenizer = backtracking_plan().tokenizer
    ids = tokenizer.encode("Node 1: a\n\nNode 2: b\n\nBacktrack to Line 1\n\nNode 2: c")
    assert tokenizer.decode(linearised.linearised(tokenizer, ids)) == "Node 1: a\n\nNode 2: c"
    assert linearised.linearised(tokenizer, ids[:-3]) == ids[:-3], "the backtrack is at the end"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"linearise": -1}, "evaluation.linearise=-1"),
        ({"rounds": 0}, "evaluation.rounds=0"),
        ({"extension_tokens": 0}, "evaluation.extension_tokens=0"),
        ({"extensions": 1, "extension_words": ("a",)}, "extensions=1 with evaluation.linearise=6: .*choose 0"),
        ({"linearise": 120}, "linearise=120 and evaluation.extension_tokens=5 take .*max_position=128"),
    ],
)
def test_what_cannot_work_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        linearised.check(backtracking_plan(), dataclasses.replace(OPTIONS, **GO_ON | changes))


def test_words_without_steps_are_refused():
    with pytest.raises(ValueError, match=r"linearise=6: the model's texts have no steps .*not in the vocabulary"):
        linearised.check(plan(), dataclasses.replace(OPTIONS, **GO_ON))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    lossy = dataclasses.replace(plan(), tokenizer=dataclasses.replace(plan().tokenizer, hf=hf))
    with pytest.raises(ValueError, match="it is read back as '<unk>"):
        linearised.check(lossy, dataclasses.replace(OPTIONS, **GO_ON))
    linearised.check(lossy, OPTIONS)


def test_rows_follow_the_window():
    wide = dataclasses.replace(plan(), model=dataclasses.replace(plan().model, num_layers=10**5))
    options = dataclasses.replace(OPTIONS, **GO_ON | {"linearise": 60}, rows=0)
    few, many = (evaluation.default_rows(wide, x, 1000) for x in (options, dataclasses.replace(options, linearise=0)))
    assert 1 < few < many


BOXES = ("\\boxed{0}", "\\boxed{1}", "0", "1", "2", "3", " + ")
TEXTS = ("<unk>", "<end>", "</think>", " Answer", " so", *BOXES, "Node 1: ", "\n\nBacktrack to beginning\n\n")


def test_the_page(texts, tmp_path, capsys):  # noqa: F811
    """A model on texts whose words are steps: results, picture, what is printed, and what is kept is read back."""
    shutil.copytree(texts / "model", tmp_path / "model")
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=exact(TEXTS), unk_token="<unk>", eos_token="<end>")
    hf.chat_template = "{{ messages[-1]['content'] }}"
    hf.save_pretrained(tmp_path / "model")
    experiment = (texts / "experiment.py").read_text().replace('" </think> Answer"', '"</think> Answer"')
    experiment = experiment.replace('"evaluation.traces"', '"evaluation.extension_tokens": 4, "evaluation.traces"')
    (tmp_path / "experiment.py").write_text(experiment)
    page(*of_texts(tmp_path, tmp_path / "out", f"--data={texts / 'more'}", "--linearise=5", "--rounds=2"))
    found = results_of(tmp_path / "out")["linearised"]
    assert len(found["accuracy"]) == len(found["gain_ci95"]) == 3 and set(found["sets"]) == {"more"}
    assert found["accuracy"][0] == results_of(tmp_path / "out")["final"] and "extrapolation" not in found
    lines = read_lines(tmp_path / "out" / "evaluation" / "completions" / "more")
    gone_on = [one for line in lines for _, one in rounds_of(line)]
    assert len(gone_on) > 4 and max(one["seen"] for one in gone_on) == 5
    means = [np.mean([line["tokens"] for line in lines])]
    means += [np.mean([line["extensions"][i]["tokens"] for line in lines]) for i in (0, 1)]
    assert found["thinking"] == pytest.approx(means)
    picture = report.by_tokens(report.load_run(tmp_path / "out", training=False))
    labels = [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
    assert labels[-1] == "linearised thinking going on (95% band)"
    assert f"model, going on: {means[0]:.1f}:{found['accuracy'][0]:.3f} " in capsys.readouterr().out
    with np.load(tmp_path / "out" / "evaluation" / "extended.npz") as scores:
        assert scores["correct"].shape == (4, 4, 3, 1)


def test_misuse_of_the_page(texts, tmp_path):  # noqa: F811
    with pytest.raises(app.UsageError, match="--rounds goes with --linearise"):
        page(*of_texts(texts, tmp_path / "out", "--rounds=2"))
    with pytest.raises(ValueError, match=r"evaluation.linearise=4: .*it is read back as"):
        page(*of_texts(texts, tmp_path / "out", "--linearise=4"))
    assert not (tmp_path / "out").exists()
