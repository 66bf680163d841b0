"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): problems whose scores are all alike are replaced."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tto_jax import preemption, sharding
from tto_jax.data import Batch

Rows = Any  # traces, forks, answers on the host: a tree of arrays whose rows are B * G


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A batch of this process after the replacement, and what it took on all processes together."""

    batch: Batch
    rows: Rows
    rounds: int  # rollouts beside the first
    lacking: int  # problems without signal that stay in the batch
    dropped: Rows  # traces, forks, answers that are not in the batch, of this process

    def metrics(self) -> dict[str, int]:
        """Of all processes: rollouts beside the first, problems without signal, tokens that are not trained."""
        traces, _, answers = self.dropped
        tokens = np.sum(traces.length) + np.sum(answers.length - answers.forced[..., None])
        return {
            "resample/rounds": self.rounds,
            "resample/lacking": self.lacking,
            "resample/dropped_tokens": _on_all_processes(tokens),
        }


def has_signal(correct: np.ndarray) -> np.ndarray:
    """bool[B] of scores [B,G,S,A]: whether any two differ; else every advantage of the problem is 0."""
    flat = np.asarray(correct).reshape(len(correct), -1)
    return flat.max(axis=1) > flat.min(axis=1)


def replace(
    batch: Batch, rows: Rows, correct: np.ndarray, again: Callable[[], tuple[Batch, Rows, np.ndarray]], most: int
) -> Replaced:
    """The first B problems with signal of up to 1 + `most` rollouts; where these are too few, others fill the batch.

    Every process replaces its own problems; all take part in a rollout while any of them lacks one.

    Args:
      batch, rows, correct: B problems, their B * G rows, their scores [B,G,S,A], of this process.
      again: the same of the next B problems.
      most: rollouts beside the first.
    """
    size, rounds = len(correct), 0
    batches, found, good = [batch], [rows], has_signal(correct)
    while rounds < most and preemption.on_any_process(bool(good.sum() < size)):
        batch, rows, correct = again()
        batches, found, good = [*batches, batch], [*found, rows], np.append(good, has_signal(correct))
        rounds += 1
    order = np.argsort(~good, kind="stable")
    kept, others = np.sort(order[:size]), np.sort(order[size:])
    together = jax.tree.map(lambda *x: np.concatenate(x), *found)
    group = len(jax.tree.leaves(rows)[0]) // size
    of_rows = lambda index: (index[:, None] * group + np.arange(group)).reshape(-1)  # noqa: E731
    take = lambda tree, index: jax.tree.map(lambda x: x[index], tree)  # noqa: E731
    problems = [problem for batch in batches for problem in batch.problems]
    prompts, valid = jax.tree.map(lambda *x: np.concatenate(x), *[(b.prompts, b.valid) for b in batches])
    return Replaced(
        batch=Batch(problems=tuple(problems[i] for i in kept), prompts=take(prompts, kept), valid=take(valid, kept)),
        rows=take(together, of_rows(kept)),
        rounds=rounds,
        lacking=_on_all_processes(size - good[kept].sum()),
        dropped=take(together, of_rows(others)),
    )


def _on_all_processes(number) -> int:
    return int(sharding.gather(np.array([number], np.int64)).sum())
