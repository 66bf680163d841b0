"""The verifier's scores of all forced answers, on the host."""

from collections.abc import Sequence

import numpy as np

from tto_jax.core.types import Answers, Scores, Traces
from tto_jax.tasks.problem import Problem, Task
from tto_jax.tokenizer import Tokenizer


def grade(
    task: Task,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    traces: Traces,
    forks: np.ndarray,
    answers: Answers,
) -> Scores:
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
        Scores of numpy arrays [B, G, S, A].
    """
    forks = np.asarray(forks)
    tokens = np.asarray(answers.tokens)
    n, s, a, e = tokens.shape
    if not problems or n % len(problems) or forks.shape != (n, s) or len(traces.tokens) != n:
        raise ValueError(
            f"rows must be a multiple of the problems, and shapes must agree: {len(problems)} problems, "
            f"traces {traces.tokens.shape}, forks {forks.shape}, answers {tokens.shape}"
        )
    group = n // len(problems)
    well_formed = _well_formed(tokenizer.think_end_id, traces, forks, answers)

    # Answers repeat: each distinct text is decoded once, and judged once per problem.
    sampled, length = _sampled(answers)
    kind, texts = _distinct_texts(tokenizer, sampled.reshape(-1, e), length.reshape(-1))
    problem = np.repeat(np.arange(len(problems)), group * s * a)
    pairs, pair_of = np.unique(problem * len(texts) + kind, return_inverse=True)
    right = np.array([task.is_correct(texts[p % len(texts)], problems[p // len(texts)]) for p in pairs.tolist()], bool)
    formatted = np.array([task.is_formatted(text) for text in texts], bool)

    shape = (len(problems), group, s, a)
    well_formed = well_formed.reshape(shape)
    return Scores(
        correct=(right[pair_of].reshape(shape) & well_formed).astype(np.float32),
        formatted=formatted[kind].reshape(shape) & well_formed,
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
