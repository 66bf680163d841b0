"""Accuracy at budgets: one rollout whose forks are the evaluation's budgets, answers decoded from the shared trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import data, grading, rollout
from tto_jax.core import anytime
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.models.decoder import Params
from tto_jax.settings import Settings

BATCH = 256  # problems a rollout
STREAM = 0xE7A1  # keeps the evaluation's keys apart from training's


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of every answer, on the host."""

    correct: np.ndarray  # f32[B, 1, S, A]
    formatted: np.ndarray  # bool[B, 1, S, A]
    forks: np.ndarray  # i32[B, 1, S]
    length: np.ndarray  # i32[B, 1]
    ended: np.ndarray  # bool[B, 1]
    id: np.ndarray  # u32[B]
    tokens: int  # sampled


def evaluate(
    settings: Settings,
    params: Params,
    *,
    problems: int,
    budgets: tuple[int, ...],
    answers: int,
    seed: int,
    on_batch=lambda done: None,
) -> Evaluation:
    """Score the first `problems` problems of the evaluation split: one trace each, `answers` answers at every budget.

    The keys depend on `seed` and the problem only, so that runs are compared on common random numbers.
    """
    schedule = BudgetSchedule.from_prior(budgets)
    config = dataclasses.replace(settings.rollout, group_size=1, trace_pad=int(budgets[-1]), answers=answers)
    source = data.ProblemSource(settings.task, "eval", problems)
    key = jax.random.fold_in(jax.random.key(seed), STREAM)
    parts = []
    for batch in data.evaluation_batches(source, settings.tokenizer, min(BATCH, problems), settings.prompt_pad):
        prompts = jax.device_put(batch.prompts)
        traces, trunk = rollout.sample_traces(settings.model, config, params, prompts, key)
        forks = rollout.cut(traces.length, schedule)
        sampled = rollout.sample_answers(settings.model, config, params, trunk, traces, forks, key)
        traces, forks, sampled = jax.device_get((traces, forks, sampled))
        scores = grading.grade(settings.task, settings.tokenizer, batch.problems, traces, forks, sampled)
        tokens = traces.length + (sampled.length - sampled.forced[..., None]).sum(axis=(1, 2))
        part = (
            scores.correct,
            scores.formatted,
            forks[:, None],
            traces.length[:, None],
            traces.ended[:, None],
            batch.prompts.id,
            tokens,
        )
        parts.append([np.asarray(x)[batch.valid] for x in part])
        on_batch(sum(len(x[0]) for x in parts))
    *arrays, tokens = (np.concatenate(column) for column in zip(*parts))
    return Evaluation(*arrays, tokens=int(tokens.sum()))


def summarize(result: Evaluation, budgets: tuple[int, ...], seed: int) -> dict:
    """Accuracy at budgets, anytime, final, with 95% bootstrap intervals over problems; and diagnostics."""
    per_problem = result.correct.mean(axis=(1, 3))  # [B,S]
    key = jax.random.key(seed)
    low, high = jax.device_get(anytime.bootstrap_interval(jnp.asarray(per_problem), key))
    area = jax.device_get(anytime.bootstrap_interval(jnp.asarray(per_problem.mean(axis=1)), key))
    accuracy = per_problem.mean(axis=0)
    right, length = result.correct[:, :, -1].mean(axis=-1) > 0.5, result.length
    mean = lambda x: float(x.mean()) if x.size else None  # noqa: E731
    return {
        "budgets": [int(b) for b in budgets],
        "accuracy": accuracy.tolist(),
        "accuracy_ci95": [[float(a), float(b)] for a, b in zip(low, high)],
        "anytime": float(accuracy.mean()),
        "anytime_ci95": [float(area[0]), float(area[1])],
        "final": float(accuracy[-1]),
        "mean_length": mean(length),
        "mean_length_correct": mean(length[right]),
        "mean_length_wrong": mean(length[~right]),
        "formatted": result.formatted.mean(axis=(0, 1, 3)).tolist(),
        "unfinished": ((result.length > result.forks.transpose(2, 0, 1)) | ~result.ended).mean(axis=(1, 2)).tolist(),
        "overthinking": np.asarray(anytime.overthinking_rate(result.correct, result.forks)).tolist(),
        "problems": int(result.correct.shape[0]),
        "evaluation_seed": seed,
    }
