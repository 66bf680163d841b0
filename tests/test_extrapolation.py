"""Thinking that is made to go on: what is sampled, what is kept, and its numbers, on a tiny random model."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from etils import epath
from test_evaluation import BUDGETS, OPTIONS, PROBLEMS, A, N, assert_same, params, plan, problems, read_lines

from tto_jax import continuing, evaluation, extrapolation, summary
from tto_jax.core import token_tree
from tto_jax.core.types import Traces
from tto_jax.models import decoder

EXTEND = {"extensions": 2, "extension_tokens": 4, "extension_words": ("a", "b c")}


def evaluate(folder, **changes):
    options = dataclasses.replace(OPTIONS, **EXTEND | changes)
    return evaluation.evaluate(plan(), params(), problems(), options, folder=epath.Path(folder))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended")
    return evaluate(folder), read_lines(folder), folder


def states(line):
    """The trace's end, then after each extension: (ended, tokens of thinking)."""
    return [(line["ended"], line["tokens"]), *((x["ended"], x["tokens"]) for x in line["extensions"])]


def test_what_is_kept_of_an_extension(kept):
    _, lines, _ = kept
    words = set()
    assert len(lines) == PROBLEMS * N
    for line in lines:
        assert len(line["extensions"]) == 2
        for (ended, before), extension in zip(states(line), line["extensions"]):
            assert bool(extension["word"]) == ended, "a trace that was cut goes on as it is"
            words.add(extension["word"])
            new = extension["text"].split()
            assert len(new) == extension["sampled"] <= 4
            assert extension["ended"] == (new[-1] == "</think>") and "</think>" not in new[:-1]
            assert extension["ended"] or len(new) == 4
            assert extension["seen"] == before - ended + len(extension["word"].split())
            assert extension["tokens"] == before - ended + len(extension["word"].split()) + len(new)
            assert extension["inserted"] == (1 if extension["ended"] else 2) and len(extension["answers"]) == A
            for answer in extension["answers"]:
                (verdict,) = plan().task.judge([(answer["text"], problems()[line["index"]])])
                assert answer["correct"] == (verdict.correct and "</think>" not in answer["text"])
    assert words == {"", "a", "b c"}, "some had ended and some were cut"


def test_the_arrays_are_those_of_the_lines(kept):
    result, lines, _ = kept
    extended = result.extended
    assert extended.correct.shape == (PROBLEMS, N, 3, A)
    for line in lines:
        at = line["index"], line["trace"]
        last = {"answers": line["answers"][-1], "inserted": line["inserted"][-1], "tokens": line["tokens"]}
        for e, state in enumerate([last, *line["extensions"]]):
            assert extended.forks[(*at, e)] == state["tokens"] and extended.inserted[(*at, e)] == state["inserted"]
            for name, key in (("correct", "correct"), ("answer_length", "tokens"), ("formatted", "formatted")):
                assert getattr(extended, name)[(*at, e)].tolist() == [answer[key] for answer in state["answers"]]
        assert extended.length[at] == line["extensions"][-1]["tokens"]
    assert result.new_tokens == result.tokens + sum(
        x["sampled"] + sum(answer["tokens"] for answer in x["answers"]) for line in lines for x in line["extensions"]
    )


def test_what_was_sampled_at_the_budgets_is_the_same(kept):
    """Extensions change nothing before them, and parts that are read back give the same numbers."""
    result, _, folder = kept
    plain = evaluation.evaluate(plan(), params(), problems(), OPTIONS)
    assert plain.extended is None
    assert_same(plain, result)
    again = evaluate(folder)
    assert_same(again, result)
    assert_same(again.extended, result.extended)
    assert again.new_tokens == 0


@pytest.mark.slow  # compiles for other shapes
def test_extensions_do_not_depend_on_rows(kept, tmp_path):
    assert_same(evaluate(tmp_path, rows=2).extended, kept[0].extended)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def likeliest(weights, rows):
    hidden = decoder.forward_rows(plan().model, weights, rows)
    return decoder.logits(plan().model, weights, hidden).argmax(axis=-1)


def test_greedy_extensions_follow_a_full_forward(tmp_path):
    """Every sampled token is the likeliest after the plain text so far: prompt, thinking without its ends, words."""
    evaluate(tmp_path, traces=1, answers=1, temperature=0.0)
    lines, encode, sequences = read_lines(tmp_path), plan().tokenizer.encode, []
    elicit = {True: ["ANS"], False: ["</think>", "ANS"]}
    for line in lines:
        thinking, ended = line["text"].split(), line["ended"]
        for extension in line["extensions"]:
            before = (thinking[:-1] if ended else thinking) + extension["word"].split()
            thinking, ended = before + extension["text"].split(), extension["ended"]
            prompt = problems()[line["index"]].prompt.split()
            sequences.append((prompt + before, extension["text"].split()))
            sequences.append((prompt + thinking + elicit[ended], extension["answers"][0]["text"].split()))
    kinds = {bool(extension["word"]) for line in lines for extension in line["extensions"]}
    assert kinds == {True, False}
    tokens, length = np.zeros((len(sequences), 40), np.int32), []
    for row, (before, sampled) in zip(tokens, sequences):
        ids = encode(" ".join(before + sampled))
        row[: len(ids)] = ids
        length.append(len(ids))
    found = np.asarray(likeliest(params(), token_tree.sequences(tokens, length, np.zeros(tokens.shape, bool))))
    for row, best, (before, sampled) in zip(tokens, found, sequences):
        for t in range(len(before), len(before) + len(sampled)):
            assert best[t - 1] == row[t]


def test_a_trace_that_ended_with_eos_is_over():
    """It keeps its tokens and answers; the others go on."""
    line = {"tokens": 5, "ended": False, "eos": True, "inserted": [1, 2], "answers": [["early"], ["late"]]}
    other = line | {"ended": True, "eos": False}
    more = {"tokens": 3, "ended": True, "eos": False, "text": "x y z", "inserted": [1], "answers": [["new"]]}
    zeros = np.zeros((2, 3), np.int32)
    traces = Traces(zeros, zeros, np.array([3, 3]), np.array([True, True]), np.array([False, False]))
    before = np.array([5, 6])
    extension = continuing.Extension(before, before, ["", "w"], np.array([True, False]), traces, zeros, None)
    over, on = continuing.lines_with([dict(line), dict(other)], [(extension, [more, more])] * 2)
    for found in over["extensions"]:
        assert (found["tokens"], found["answers"], found["sampled"], found["eos"]) == (5, ["late"], 0, True)
    assert [(x["tokens"], x["answers"], x["word"]) for x in on["extensions"]] == [(9, ["new"], "w")] * 2


def test_numbers_equal_loops(kept):
    result, lines, _ = kept
    record = summary.extrapolation({"x": result.extended}, seed=3)
    counts = np.asarray(summary.counts_of("x", PROBLEMS, 3))
    each = {name: np.zeros((PROBLEMS, 3)) for name in ("accuracy", "spent", "thinking", "formatted")}
    for line in lines:
        end = {"answers": line["answers"][-1], "inserted": line["inserted"][-1], "tokens": line["tokens"]}
        for e, state in enumerate([end, *line["extensions"]]):
            mean = lambda key, state=state: np.mean([answer[key] for answer in state["answers"]])  # noqa: E731
            spent = line["prompt_tokens"] + state["tokens"] + state["inserted"] + mean("tokens")
            values = (mean("correct"), spent, state["tokens"], mean("formatted"))
            for name, value in zip(each, values):
                each[name][line["index"], e] += value / N
    each["gain"] = each["accuracy"] - each["accuracy"][:, :1]
    for name, values in each.items():
        np.testing.assert_allclose(record[name], values.mean(axis=0), rtol=1e-5, atol=1e-6)
        want = np.percentile(counts @ values / PROBLEMS, [2.5, 97.5], axis=0).T
        np.testing.assert_allclose(record[f"{name}_ci95"], want, rtol=1e-4, atol=1e-5)
    assert record["gain"][0] == 0 and json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extensions": -1}, "evaluation.extensions=-1"),
        ({"extension_tokens": 0}, "evaluation.extension_tokens=0"),
        ({"extension_words": ()}, r"extension_words=\(\).*vocabulary"),
        ({"extension_words": ("Wait",)}, r"extension_words='Wait'.*not in the vocabulary"),
        ({"extension_words": ("a", "</think>")}, "extension_words='</think>'.*none that ends thinking"),
        ({"extension_words": (" ",)}, "extension_words=' '.*at least one"),
        ({"extensions": 30}, "extensions=30 of evaluation.extension_tokens=4 after 9 tokens take .*max_position=128"),
    ],
)
def test_what_cannot_work_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        extrapolation.check(plan(), dataclasses.replace(OPTIONS, **EXTEND | changes))


def test_rows_follow_the_longer_prompts():
    options = dataclasses.replace(OPTIONS, **EXTEND, rows=0)
    wide = dataclasses.replace(plan(), model=dataclasses.replace(plan().model, num_layers=10**5))
    few, many = (evaluation.default_rows(wide, x, 1000) for x in (options, dataclasses.replace(options, extensions=0)))
    assert 1 < few < many
    assert BUDGETS[-1] < extrapolation.prompt_pad(plan(), options) == plan().prompt_pad + 9 + 2 * 2 + 4
