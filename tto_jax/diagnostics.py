"""What a training step says of itself: numbers for metrics.jsonl and traces in readable text. On the host, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core import anytime
from tto_jax.core.types import Answers, Array, Credit, Scores, TokenTree, Traces
from tto_jax.settings import Settings


def rollout_metrics(
    scores: Scores, length: np.ndarray, ended: np.ndarray, forks: np.ndarray, budgets: np.ndarray
) -> dict:
    """Scores, format, unfinished, overthinking at every budget; length by correctness; groups without signal."""
    forks = forks.reshape(scores.correct.shape[:3])
    overthinking = jax.device_get(_overthinking_rate(scores.correct, forks))
    length = length.reshape(forks.shape[:2])
    finished = (ended.reshape(forks.shape[:2]))[..., None] & (length[..., None] <= budgets)
    row = {}
    for s, budget in enumerate(budgets):
        row[f"score/{budget}"] = scores.correct[:, :, s].mean()
        row[f"formatted/{budget}"] = scores.formatted[:, :, s].mean()
        row[f"unfinished/{budget}"] = 1.0 - finished[:, :, s].mean()
        row[f"overthinking/{budget}"] = overthinking[s]
    right = scores.correct[:, :, -1].mean(axis=-1) > 0.5
    flat = scores.correct.reshape(scores.correct.shape[0], -1)
    return row | {
        "score/anytime": scores.correct.mean(),
        "length/mean": length.mean(),
        "length/correct": _mean(length[right]),
        "length/wrong": _mean(length[~right]),
        "groups/without_signal": (flat.min(axis=1) == flat.max(axis=1)).mean(),
    }


def credit_metrics(credit: Credit, baselines: dict[str, np.ndarray]) -> dict:
    """Mean and spread of every block's advantage; what each baseline leaves of the return's variance, and correlation.

    `residual/V/s` is Var[R - V] / Var[R] over the traces that reached block s.
    """
    row = {}
    for s in range(credit.block_mask.shape[-1]):
        reached = credit.block_mask[..., s]
        values = credit.trace_advantage[..., s][reached]
        row[f"advantage/mean/{s}"], row[f"advantage/std/{s}"] = (
            _mean(values),
            float(values.std()) if values.size else None,
        )
        returns = baselines["return"][..., s][reached]
        variance = returns.var() if returns.size else 0.0
        for name in ("v1", "v2", "v"):
            value = baselines[name][..., s][reached]
            usable = variance > 0 and value.var() > 0
            row[f"residual/{name}/{s}"] = float((returns - value).var() / variance) if variance > 0 else None
            row[f"correlation/{name}/{s}"] = float(np.corrcoef(returns, value)[0, 1]) if usable else None
    return row


@jax.jit
def token_metrics(rows: TokenTree, trainer: Array, entropy: Array) -> dict:
    """Gap between the sampler's and the trainer's log-probs, entropy of thinking and of answers (nats a token).

    On the device: [N,L] arrays do not leave it. NaN where there is no token.
    """
    mask = rows.loss_mask
    gap = jnp.abs(rows.sampler_logprob - trainer)
    mean = lambda x, where: jnp.mean(x, where=where)  # noqa: E731
    return {
        "logprob_gap/mean": mean(gap, mask),
        "logprob_gap/max": jnp.max(gap, where=mask, initial=0.0),
        "entropy/thinking": mean(entropy, mask & (rows.branch == 0)),
        "entropy/answers": mean(entropy, mask & (rows.branch > 0)),
        "tokens": mask.sum(),
    }


def known(metrics: dict) -> dict:
    """Numbers, None for those that are NaN."""
    return {name: float(value) if np.isfinite(value) else None for name, value in metrics.items()}


def update_metrics(updates: list[dict]) -> dict:
    """The minibatches of a step as one row: means, but extremes and counters as such."""
    combine = {"loss/ratio_min": min, "loss/ratio_max": max, "update/skipped": max}
    combine |= dict.fromkeys(("loss/share_thinking", "loss/share_answers"), _mean_of_known)
    return {name: combine.get(name, np.mean)([update[name] for update in updates]) for name in updates[0]}


def samples(
    settings: Settings, problems, traces: Traces, forks, answers: Answers, scores: Scores, credit: Credit, count
):
    """The first trace of some problems: the text of every block with its advantage, and the answers at its end."""
    size, group = forks.shape[-1], settings.rollout.group_size
    decode = settings.tokenizer.decode
    forks = forks.reshape(scores.correct.shape[:3])
    found = []
    for b in range(min(count, len(problems))):
        row, blocks = b * group, []
        for s in range(size):
            begin, end = (0 if s == 0 else int(forks[b, 0, s - 1])), int(forks[b, 0, s])
            forced = int(answers.forced[row, s])
            blocks.append(
                {
                    "tokens": f"{begin}-{end}",
                    "advantage": float(credit.trace_advantage[b, 0, s]) if credit.block_mask[b, 0, s] else None,
                    "text": decode(traces.tokens[row, begin:end].tolist()),
                    "answers": [
                        decode(answers.tokens[row, s, a, forced : answers.length[row, s, a]].tolist())
                        for a in range(answers.tokens.shape[2])
                    ],
                    "scores": scores.correct[b, 0, s].tolist(),
                }
            )
        problem = problems[b]
        found.append({"prompt": problem.prompt, "reference": list(problem.answers), "blocks": blocks})
    return found


_overthinking_rate = jax.jit(anytime.overthinking_rate)


def _mean_of_known(values):
    """Mean over the minibatches that have the number; None if none has."""
    known = [value for value in values if np.isfinite(value)]
    return np.mean(known) if known else None


def _mean(values):
    return float(values.mean()) if values.size else None
