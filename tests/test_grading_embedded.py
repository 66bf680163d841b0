import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax import tasks
from tto_jax.core.types import Answers, Traces
from tto_jax.grading import grade
from tto_jax.tokenizer import Tokenizer

PEAK, CHAIN2 = tasks.get("peak"), tasks.get("chain", answer_digits=2)
SEVEN = tasks.Problem(id=1, prompt="", answers=("7",))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_task(PEAK)


def make(tokenizer, rows, pad=None, trace_pad=8, answer_pad=6):
    """Arrays from rows [N][S][A] of (trace, eos, fork, inserted, sampled, ended with EOS), texts."""
    pad = tokenizer.pad_id if pad is None else pad
    n, s, a = len(rows), len(rows[0]), len(rows[0][0])
    trace_tokens = np.full((n, trace_pad), pad, np.int32)
    answer_tokens = np.full((n, s, a, answer_pad), pad, np.int32)
    trace_length, forks, forced = np.zeros(n, np.int32), np.zeros((n, s), np.int32), np.zeros((n, s), np.int32)
    length, eos, ended = np.zeros((n, s, a), np.int32), np.zeros(n, bool), np.zeros((n, s, a), bool)
    for i, j, k in np.ndindex(n, s, a):
        trace, eos[i], forks[i, j], inserted, sampled, ended[i, j, k] = rows[i][j][k]
        trace, inserted, sampled = (tokenizer.encode(text) for text in (trace, inserted, sampled))
        trace_tokens[i, : len(trace)], trace_length[i], forced[i, j] = trace, len(trace), len(inserted)
        branch = inserted + sampled
        answer_tokens[i, j, k, : len(branch)], length[i, j, k] = branch, len(branch)
    thought = np.zeros(n, bool)
    traces = Traces(trace_tokens, np.zeros(trace_tokens.shape, np.float32), trace_length, thought, eos)
    return traces, forks, Answers(answer_tokens, np.zeros(answer_tokens.shape, np.float32), length, forced, ended)


CUT, ENDED = "</think> ANS", "ANS"


@pytest.mark.parametrize(
    ("trace", "eos", "fork", "inserted", "sampled", "correct", "formatted"),
    [
        ("a 7 7", False, 3, CUT, "7", 1, True),
        ("a 7 7", False, 3, CUT, "6", 0, True),
        ("a 7 7", False, 3, CUT, "a", 0, False),  # not a digit
        ("a 7 7", False, 3, CUT, "7 7", 0, False),  # two digits
        ("a 7 7", False, 3, CUT, "", 0, False),  # nothing
        ("a 7 7 </think>", False, 4, ENDED, "7", 1, True),
        ("a 7 7 </think>", False, 3, CUT, "7", 1, True),  # a cut before it: only the inserted one counts
        ("a 7 7 </think>", False, 4, CUT, "7", 0, False),  # two
        ("a 7 7", False, 3, ENDED, "7", 0, False),  # none
        ("a 7 7", False, 3, ENDED, "</think>", 0, False),  # one, but no answer
        ("a 7 7 </think>", False, 4, ENDED, "</think>", 0, False),  # two, one of them sampled
        ("</think> 7 </think>", False, 3, ENDED, "7", 0, False),  # two, both in the trace
        ("a 7 7 <s>", True, 4, CUT, "7", 0, False),  # the fork includes the EOS that ended the trace
        ("a 7 7 <s>", True, 3, CUT, "7", 1, True),  # an earlier cut of that trace
        ("", False, 0, CUT, "7", 1, True),  # before any thinking
    ],
)
def test_reward_rule(tokenizer, trace, eos, fork, inserted, sampled, correct, formatted):
    for pad in (tokenizer.pad_id, tokenizer.think_end_id):  # padding is never looked at, whatever its value
        arrays = make(tokenizer, [[[(trace, eos, fork, inserted, sampled, False)]]], pad=pad)
        scores = grade(PEAK, tokenizer, [SEVEN], *arrays).scores
        assert scores.correct.shape == scores.formatted.shape == (1, 1, 1, 1)
        assert (scores.correct.dtype, scores.formatted.dtype) == (np.float32, np.bool_)
        assert scores.correct.item() == correct and scores.formatted.item() == formatted


@pytest.mark.parametrize(
    ("sampled", "ended", "correct", "formatted"),
    [
        ("4 7 </s>", True, 1, True),  # the EOS is no part of the answer
        ("4 7", False, 1, True),  # hit the cap: graded as it stands
        ("4 7 </s>", False, 0, False),  # the same token, not as the end: part of the answer
        ("7 4 </s>", True, 0, True),
        ("4 </s>", True, 0, False),
        ("</s>", True, 0, False),
    ],
)
def test_eos_of_an_answer(sampled, ended, correct, formatted):
    words = Tokenizer.from_task(CHAIN2)
    arrays = make(words, [[[("a 7", False, 2, CUT, sampled, ended)]]])
    scores = grade(CHAIN2, words, [tasks.Problem(id=1, prompt="", answers=("4 7",))], *arrays).scores
    assert scores.correct.item() == correct and scores.formatted.item() == formatted


def random_rows(tokenizer, rng, n, s, a):
    words = ["a", "7", "3", "</think>"]
    rows = []
    for _ in range(n):
        trace = list(rng.choice(words, rng.integers(1, 7), p=[0.3, 0.3, 0.3, 0.1]))
        eos, columns = rng.random() < 0.3, []
        for _ in range(s):
            fork = int(rng.integers(0, len(trace) + 1))
            inserted = CUT if rng.random() < 0.7 else ENDED
            columns.append(
                [
                    (" ".join(trace), eos, fork, inserted, " ".join(rng.choice(words, rng.integers(0, 3))), False)
                    for _ in range(a)
                ]
            )
        rows.append(columns)
    return rows


def test_equals_a_loop_over_texts(tokenizer):
    rng = np.random.default_rng(0)
    problems = [dataclasses.replace(SEVEN, answers=(answer,)) for answer in ("7", "3", "7")]
    group, s, a = 8, 3, 5
    rows = random_rows(tokenizer, rng, len(problems) * group, s, a)
    arrays = make(tokenizer, rows, pad=tokenizer.think_end_id)
    scores = grade(PEAK, tokenizer, problems, *arrays).scores
    for b, g, j, k in np.ndindex(len(problems), group, s, a):
        trace, eos, fork, inserted, sampled, _ = rows[b * group + g][j][k]
        words = trace.split()[:fork] + inserted.split() + sampled.split()
        fine = words.count("</think>") == 1 and not (eos and fork == len(trace.split()))
        assert scores.correct[b, g, j, k] == (fine and sampled == problems[b].answers[0])
        assert scores.formatted[b, g, j, k] == (fine and sampled in ("3", "7"))
    assert 0.02 < scores.correct.mean() < scores.formatted.mean() < 0.9


def test_device_arrays_give_the_same(tokenizer):
    traces, forks, answers = make(tokenizer, random_rows(tokenizer, np.random.default_rng(1), 4, 2, 3))
    on_device = [
        type(part)(**{f.name: jnp.asarray(getattr(part, f.name)) for f in dataclasses.fields(part)})
        for part in (traces, answers)
    ]
    expected = grade(PEAK, tokenizer, [SEVEN, SEVEN], traces, forks, answers).scores
    scores = grade(PEAK, tokenizer, [SEVEN, SEVEN], on_device[0], jnp.asarray(forks), on_device[1]).scores
    np.testing.assert_array_equal(scores.correct, expected.correct)
    np.testing.assert_array_equal(scores.formatted, expected.formatted)


class CountingTask:
    """Counts how often it is asked."""

    def __init__(self, task):
        self.task, self.asked = task, 0

    def judge(self, items):
        self.asked += len(items)
        return self.task.judge(items)


def test_4096_answers_are_quick_and_each_text_is_judged_once(tokenizer):
    rng = np.random.default_rng(0)
    n, s, a, c = 256, 4, 4, 24
    problems = [PEAK.problem(i, "train") for i in range(32)]
    digits = np.array(tokenizer.encode(" ".join("0123456789")), np.int32)
    tokens = np.full((n, s, a, 3), tokenizer.pad_id, np.int32)
    tokens[..., :2], tokens[..., 2] = tokenizer.elicit_cut, rng.choice(digits, (n, s, a))
    trace_tokens, none = rng.choice(digits, (n, c)), np.zeros(n, bool)
    traces = Traces(trace_tokens, np.zeros((n, c), np.float32), np.full(n, c, np.int32), none, none)
    forks = np.tile(np.array([6, 12, 18, 24], np.int32), (n, 1))
    forced, ended = np.full((n, s), 2, np.int32), np.zeros((n, s, a), bool)
    answers = Answers(tokens, np.zeros(tokens.shape, np.float32), np.full((n, s, a), 3, np.int32), forced, ended)
    task, seconds = CountingTask(PEAK), []
    for _ in range(5):
        start = time.perf_counter()
        scores = grade(task, tokenizer, problems, traces, forks, answers).scores
        seconds.append(time.perf_counter() - start)
    assert task.asked <= 5 * 320 and scores.formatted.all()
    assert 0.05 < scores.correct.mean() < 0.15
    assert min(seconds) < 0.010


def test_shapes_must_agree(tokenizer):
    traces, forks, answers = make(tokenizer, random_rows(tokenizer, np.random.default_rng(1), 4, 2, 3))
    with pytest.raises(ValueError, match=r"3 problems.*\(4, 8\)"):
        grade(PEAK, tokenizer, [SEVEN] * 3, traces, forks, answers)
    with pytest.raises(ValueError, match=r"forks \(4, 1\)"):
        grade(PEAK, tokenizer, [SEVEN] * 2, traces, forks[:, :1], answers)
