"""What a training step says of itself: numbers for metrics.jsonl and traces in readable text. On the host, in numpy."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import summary
from tto_jax.core import anytime
from tto_jax.core import credit as credits
from tto_jax.core.types import Answers, Array, Credit, Scores, TokenTree, Traces
from tto_jax.settings import Settings


def rollout_metrics(
    scores: Scores, length: np.ndarray, ended: np.ndarray, forks: np.ndarray, names: Sequence[str], start: bool = False
) -> dict:
    """Scores, format, unfinished, overthinking at every cut; length by correctness; groups without signal.

    names: of the S cuts. start: there is one more before them, answers before any thinking: their score alone is given.
    """
    forks = forks.reshape(scores.correct.shape[:3])
    row = {"score/start": scores.correct[:, :, 0].mean()} if start else {}
    forks, scores = forks[..., start:], jax.tree.map(lambda x: x[:, :, start:], scores)
    overthinking = jax.device_get(_overthinking_rate(scores.correct, forks))
    length = length.reshape(forks.shape[:2])
    finished = (ended.reshape(forks.shape[:2]))[..., None] & (length[..., None] == forks)
    for s, name in enumerate(names):
        row[f"score/{name}"] = scores.correct[:, :, s].mean()
        row[f"formatted/{name}"] = scores.formatted[:, :, s].mean()
        row[f"unfinished/{name}"] = 1.0 - finished[:, :, s].mean()
        row[f"overthinking/{name}"] = overthinking[s]
    right = scores.correct[:, :, -1].mean(axis=-1) > 0.5
    flat = scores.correct.reshape(scores.correct.shape[0], -1)
    return row | {
        "score/anytime": scores.correct.mean(),
        "length/mean": length.mean(),
        "length/correct": _mean(length[right]),
        "length/wrong": _mean(length[~right]),
        "groups/without_signal": (flat.min(axis=1) == flat.max(axis=1)).mean(),
    }


def progress_metrics(
    correct: np.ndarray,
    forks: np.ndarray,
    prompt_length: np.ndarray,
    answer_length: np.ndarray,
    settings: Settings,
) -> dict:
    """Progress and regret of the traces (arXiv 2503.07572), J pooled over the answers that share a fork.

    `progress/NAME`: mean of J[s] - J[s-1] over the traces that reached block s; of the first block only with `start`,
    as J[-1] is the problem's mean score before any thinking. Means over traces of sum_s (J* - J[s]), in cuts, those
    behind a trace's end included: `regret/cumulative` with J* = 1, `regret/group` with the best J of the problem's
    traces. `regret/normalized/LIMIT` of `summary.regrets`, at the budgets in tokens; with episodes at the longest
    trace's.

    Args:
      correct: f32[B,G,S,A]; forks: i32[N,S]; prompt_length: i32[B]; answer_length: i32[N,S,A], with what was
        inserted. With `start` S is one more here: the first column is before any thinking.
    """
    forks, answer_length = forks.reshape(correct.shape[:3]), answer_length.reshape(correct.shape)
    pooled, first = jax.device_get(_pooled_accuracy(correct, forks)), int(settings.credit.start)
    initial = pooled[:, :, 0].mean(axis=1, keepdims=True) if first else None
    pooled, correct, forks, answer_length = (x[:, :, first:] for x in (pooled, correct, forks, answer_length))
    row = {}
    for s, name in enumerate(settings.names):
        before = pooled[..., s - 1] if s else initial
        reached = forks[..., s] > (forks[..., s - 1] if s else 0)
        row[f"progress/{name}"] = None if before is None else _mean((pooled[..., s] - before)[reached])
    best = pooled.max(axis=(1, 2), keepdims=True)
    row["regret/cumulative"], row["regret/group"] = (float((x - pooled).sum(-1).mean()) for x in (1.0, best))
    before = prompt_length[:, None, None] + forks
    tokens = settings.schedule.tokens
    limits = [settings.rollout.trace_pad] if tokens is None else np.asarray(tokens).tolist()
    found = summary.regrets(correct, forks, before, answer_length, np.asarray(limits, np.float32))
    found = np.asarray(jax.device_get(found)).mean(axis=0)
    return row | {f"regret/normalized/{limit}": float(x) for limit, x in zip(limits, found)}


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
        for name in [name for name in baselines if name != "return"]:
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
    settings: Settings,
    problems,
    traces: Traces,
    forks,
    answers: Answers,
    scores: Scores,
    credit: Credit,
    count,
    prefixes: Sequence[Sequence[int]] | None = None,
):
    """The first trace of some problems: the text of every block, its advantage and progress, the answers at its end.

    `regret` is the trace's sum of 1 - J over the cuts; `prefix` what stands before the trace, where there are any.
    """
    size, group = forks.shape[-1], settings.rollout.group_size
    credit = credits.with_start(credit)
    pooled = jax.device_get(_pooled_accuracy(scores.correct, forks.reshape(scores.correct.shape[:3])))[:, 0]
    decode = settings.tokenizer.decode
    forks = forks.reshape(scores.correct.shape[:3])
    found = []
    for b in range(min(count, len(problems))):
        row, blocks = b * group, []
        for s in range(size):
            begin, end = (0 if s == 0 else int(forks[b, 0, s - 1])), int(forks[b, 0, s])
            forced = int(answers.forced[row, s])
            gain = float(pooled[b, s] - pooled[b, s - 1]) if s else None
            blocks.append(
                {
                    "tokens": f"{begin}-{end}",
                    "advantage": float(credit.trace_advantage[b, 0, s]) if credit.block_mask[b, 0, s] else None,
                    "progress": gain,
                    "text": decode(traces.tokens[row, begin:end].tolist()),
                    "answers": [
                        decode(answers.tokens[row, s, a, forced : answers.length[row, s, a]].tolist())
                        for a in range(answers.tokens.shape[2])
                    ],
                    "scores": scores.correct[b, 0, s].tolist(),
                }
            )
        problem = problems[b]
        regret = float((1.0 - pooled[b, int(settings.credit.start) :]).sum())
        before = {} if prefixes is None else {"prefix": decode(prefixes[b])}
        found.append(
            {"prompt": problem.prompt, **before, "reference": list(problem.answers), "regret": regret, "blocks": blocks}
        )
    return found


_overthinking_rate = jax.jit(anytime.overthinking_rate)
_pooled_accuracy = jax.jit(anytime.pooled_accuracy)


def _mean_of_known(values):
    """Mean over the minibatches that have the number; None if none has."""
    known = [value for value in values if np.isfinite(value)]
    return np.mean(known) if known else None


def _mean(values):
    return float(values.mean()) if values.size else None
