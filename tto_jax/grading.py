"""The verifier's scores of all forced answers, on the host."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from tto_jax.core.types import Answers, Scores, Traces
from tto_jax.tasks.problem import Problem, Task, Verdict
from tto_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Graded:
    """Scores of all answers, with what they were read from."""

    scores: Scores  # numpy arrays [B, G, S, A]
    texts: list[str]  # distinct texts of answers
    text_of: np.ndarray  # i64[B, G, S, A]
    verdicts: list[Verdict]  # of distinct (problem, text)
    verdict_of: np.ndarray  # i64[B, G, S, A]

    def counts(self) -> dict[str, int]:
        """How many answers of the batch each way of judging has decided: `grading/symbolic`, `/timeout`, `/crash`."""
        number = collections.Counter()
        for verdict, times in zip(self.verdicts, np.bincount(self.verdict_of.ravel(), minlength=len(self.verdicts))):
            number[verdict.how] += int(times)
        return {f"grading/{how}": number[how] for how in ("symbolic", "timeout", "crash")}


def grade(
    task: Task,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    traces: Traces,
    forks: np.ndarray,
    answers: Answers,
) -> Graded:
    """Scores every answer: right, and well-formed.

    An answer is well-formed if exactly one `</think>` occurs in trace[:fork] + inserted + sampled tokens, and the
    fork does not include an EOS that ended the trace. `formatted` asks of the answer's text also what the task asks;
    `correct` is 1 for right answers in a well-formed place. The text is that of the sampled tokens without their EOS.

    Args:
        task: the verifier.
        tokenizer: decodes the answers.
        problems: B of them.
        traces: N = B * G rows; row n is of problem n // G.
        forks: i32[N, S], tokens of the trace before each answer.
        answers: [N, S, A, E].

    Returns:
        Scores of numpy arrays [B, G, S, A], and the texts and verdicts behind them.
    """
    forks = np.asarray(forks)
    tokens = np.asarray(answers.tokens)
    n, s, a, e = tokens.shape
    if not problems or n % len(problems) or forks.shape != (n, s) or len(traces.tokens) != n:
        raise ValueError(
            f"rows must be a multiple of the problems, and shapes must agree: {len(problems)} problems, "
            f"traces {traces.tokens.shape}, forks {forks.shape}, answers {tokens.shape}"
        )
    shape = (len(problems), n // len(problems), s, a)
    well_formed = _well_formed(tokenizer.think_end_id, traces, forks, answers).reshape(shape)

    # Answers repeat: each distinct text is decoded once, and judged once per problem.
    sampled, length = _sampled(answers)
    text_of, texts = _distinct_texts(tokenizer, sampled.reshape(-1, e), length.reshape(-1))
    problem = np.repeat(np.arange(len(problems)), n // len(problems) * s * a)
    pairs, verdict_of = np.unique(problem * len(texts) + text_of, return_inverse=True)
    verdicts = task.judge([(texts[p % len(texts)], problems[p // len(texts)]) for p in pairs.tolist()])
    verdict_of = verdict_of.reshape(shape)
    correct = np.array([verdict.correct for verdict in verdicts], bool)[verdict_of]
    formatted = np.array([verdict.formatted for verdict in verdicts], bool)[verdict_of]
    return Graded(
        scores=Scores(correct=(correct & well_formed).astype(np.float32), formatted=formatted & well_formed),
        texts=texts,
        text_of=text_of.reshape(shape),
        verdicts=verdicts,
        verdict_of=verdict_of,
    )


def _well_formed(think_end_id: int, traces: Traces, forks: np.ndarray, answers: Answers) -> np.ndarray:
    """bool[N, S, A]: one `</think>` in all, and no EOS before the fork. Only tokens within the lengths count."""
    ends = np.asarray(traces.tokens) == think_end_id
    ends_before = np.pad(np.cumsum(ends, axis=1), ((0, 0), (1, 0)))
    in_trace = np.take_along_axis(ends_before, forks, axis=1)
    tokens = np.asarray(answers.tokens)
    inside = np.arange(tokens.shape[-1]) < np.asarray(answers.length)[..., None]
    in_answer = np.sum((tokens == think_end_id) & inside, axis=-1)
    after_eos = np.asarray(traces.eos)[:, None] & (forks >= np.asarray(traces.length)[:, None])
    return (in_trace[..., None] + in_answer == 1) & ~after_eos[..., None]


def _sampled(answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, S, A, E], length [N, S, A]) of what follows the inserted tokens, its EOS left out; -1 beyond."""
    tokens = np.asarray(answers.tokens)
    forced = np.asarray(answers.forced)[:, :, None]
    length = np.maximum(np.asarray(answers.length) - np.asarray(answers.ended) - forced, 0)
    column = np.arange(tokens.shape[-1])
    shifted = np.take_along_axis(tokens, np.minimum(forced[..., None] + column, tokens.shape[-1] - 1), axis=-1)
    return np.where(column < length[..., None], shifted, -1), length


def _distinct_texts(tokenizer: Tokenizer, rows: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(index of each row's text i64[M], distinct texts) of rows [M, E] that hold `length` tokens and -1 beyond."""
    # One opaque item per row sorts much faster than `np.unique` along an axis. At least one column: no empty items.
    rows = np.ascontiguousarray(rows[:, : max(int(length.max()), 1)], np.int32)
    items = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).reshape(-1)
    _, first, kind = np.unique(items, return_index=True, return_inverse=True)
    return kind, tokenizer.batch_decode([rows[i, : length[i]].tolist() for i in first])
