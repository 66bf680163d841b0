"""What an evaluation says: every number of results.json, with its 95% interval over problems.

Every metric is a ratio of two sums over problems (a mean has ones below). The bootstrap resamples problems, within
each set, with one draw for all metrics; the mean over sets is unweighted, as in the papers' tables.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core import anytime, progress
from tto_jax.core.types import Array
from tto_jax.evaluation import Evaluation

RESAMPLES = 2000
_AT_ONCE = 64  # problems: bounds the memory of what is quadratic in budgets or answers


@dataclasses.dataclass(frozen=True)
class Metric:
    """Sums of every problem, whose ratio over all problems is the number."""

    above: np.ndarray  # f64[B] or f64[B, S]
    below: np.ndarray  # the same shape

    @classmethod
    def mean(cls, per_problem) -> "Metric":
        """The mean over problems."""
        values = np.asarray(per_problem, np.float64)
        return cls(values, np.ones_like(values))

    def take(self, index: np.ndarray) -> "Metric":
        """Of some of the problems."""
        return Metric(self.above[index], self.below[index])

    def value(self) -> np.ndarray:
        """f64[] or f64[S]; NaN where the sum below is 0: there is nothing to take a mean of."""
        with np.errstate(invalid="ignore"):
            return self.above.sum(axis=0) / self.below.sum(axis=0)


Metrics = dict[str, Metric]


def metrics(result: Evaluation, limits: tuple[int, ...]) -> Metrics:
    """Everything that is measured of one set, by name. Lists have one number a budget, or an episode.

    Args:
      result: of the set, n traces a problem.
      limits: token counts C0 of the normalised regret.

    Returns:
      accuracy (avg@n), pass@k and maj@k for k = 1, 2, 4.. <= n, overthinking, formatted and unfinished, all at every
      budget; anytime and final, the mean and the last of accuracy; mean_length in tokens, also over the traces with
      more than half of the final answers right (mean_length_correct) and over the others (mean_length_wrong); what
      `_points` says. pass@k and maj@k take one answer from each of k traces; a mean over the A
      answers of a trace follows.
    """
    accuracy = result.correct.mean(axis=(1, 3), dtype=np.float64)
    n = result.correct.shape[1]
    found = {"accuracy": Metric.mean(accuracy), f"avg@{n}": Metric.mean(accuracy)}
    found |= {"anytime": Metric.mean(accuracy.mean(axis=1)), "final": Metric.mean(accuracy[:, -1])}
    sizes = [2**i for i in range(n.bit_length())]
    found |= {f"pass@{k}": Metric.mean(_pass_at(result.correct, k)) for k in sizes}
    found |= {f"maj@{k}": Metric.mean(_maj_at(result.vote, k)) for k in sizes}
    unfinished = ~(result.ended[..., None] & (result.forks == result.length[..., None]))
    found |= {
        "overthinking": Metric.mean(_overthinking(result.correct, result.forks)),
        "formatted": Metric.mean(result.formatted.mean(axis=(1, 3))),
        "unfinished": Metric.mean(unfinished.mean(axis=1)),
    }
    return found | _lengths(result) | _points(result, limits)


def _lengths(result: Evaluation) -> Metrics:
    length = result.length.astype(np.float64)
    right = result.correct[:, :, -1].mean(axis=-1) > 0.5
    over = lambda which: Metric((length * which).sum(axis=1), which.sum(axis=1, dtype=np.float64))  # noqa: E731
    return {
        "mean_length": Metric.mean(length.mean(axis=1)),
        "mean_length_correct": over(right),
        "mean_length_wrong": over(~right),
    }


def _pass_at(correct: np.ndarray, k: int) -> np.ndarray:
    """f32[B, S], a mean over answer numbers: their n traces are independent, the answers of one trace are not."""
    n = np.full((), correct.shape[1])
    return np.asarray(anytime.pass_at_k(n, correct.sum(axis=1), k)).mean(axis=-1)


def _maj_at(vote: np.ndarray, k: int) -> np.ndarray:
    """f32[B, S], a mean over answer numbers as in `_pass_at`."""
    return np.asarray(_majorities(vote.transpose(0, 2, 3, 1), k)).mean(axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def _majorities(votes, k):
    """votes i32[B, S, A, n] -> f32[B, S, A]."""
    columns = votes.reshape(-1, votes.shape[-1])
    one = lambda row: anytime.maj_at_k(row[None], jnp.zeros(1, jnp.int32), k)[0]  # noqa: E731
    return jax.lax.map(one, columns, batch_size=_AT_ONCE).reshape(votes.shape[:-1])


@jax.jit
def _overthinking(correct, forks):
    """f32[B, S]."""
    one = lambda x: anytime.overthinking_rate(x[0][None], x[1][None])  # noqa: E731
    return jax.lax.map(one, (correct, forks), batch_size=_AT_ONCE)


def _points(result: Evaluation, limits: tuple[int, ...]) -> Metrics:
    """What the points of a trace's curve say (arXiv 2503.07572): of each trace, then the mean over traces.

    A point is (tokens, J): prompt + trace + inserted + sampled tokens of one answer, and the score, means over all
    answers that share the fork. Where a trace has ended, its last point stands for all later columns.

      spent: the tokens. progress: J[s] - J[s-1]; none at the first column, before which there is no score.
      cumulative_regret, cumulative_regret_best: sum_{j<=s} (J* - J[j]), J* = 1 or the trace's best J. The best of noisy
        scores is too high on average: that regret is an upper bound, and tighter with more answers.
      regret@C0: normalised. Where shorter answers make a longer prefix cheaper, it counts as much as the one before.
      fork_maj@k for k = 2, 4.. <= A: the majority of k answers of one fork, a mean over the A // k groups that there
        are; fork_maj_tokens@k: what it takes, prompt + trace + inserted tokens once and k answers.
    """
    before = result.prompt_length[:, None, None] + result.forks
    after = result.answer_length + result.inserted[..., None]
    pooled = lambda x: np.asarray(_pool(np.asarray(x, np.float32), result.forks))  # noqa: E731
    score, cost, sampled = map(pooled, (result.correct, after, result.answer_length))
    tokens = before + cost
    over_traces = lambda x: np.asarray(x, np.float64).mean(axis=1)  # noqa: E731
    change, of_one, of_best = map(over_traces, _along_traces(score))
    known = np.broadcast_to(np.arange(score.shape[-1]) > 0, change.shape).astype(np.float64)
    found = {"spent": Metric.mean(over_traces(tokens)), "progress": Metric(change, known)}
    found |= {"cumulative_regret": Metric.mean(of_one), "cumulative_regret_best": Metric.mean(of_best)}
    regret = np.asarray(regrets(result.correct, result.forks, before, after, np.array(limits, np.float32)))
    found |= {f"regret@{c}": Metric.mean(regret[:, i]) for i, c in enumerate(limits)}
    for k in (2**i for i in range(1, result.correct.shape[-1].bit_length())):
        votes = np.asarray(_majorities(result.vote.transpose(0, 2, 1, 3), k))
        found[f"fork_maj@{k}"] = Metric.mean(votes.mean(axis=-1))
        found[f"fork_maj_tokens@{k}"] = Metric.mean(over_traces(tokens + (k - 1) * sampled))
    return found


@jax.jit
def _pool(values, forks):
    """Means over all answers that share a fork, f32[B, n, S] of f32[B, n, S, A]."""
    one = lambda x: anytime.pooled_accuracy(x[0][None], x[1][None])[0]  # noqa: E731
    return jax.lax.map(one, (values, forks), batch_size=_AT_ONCE)


@jax.jit
def _along_traces(score):
    """Progress, 0 at the first column, and cumulative regret against 1 and the best: f32[B, n, S] each."""
    each = lambda function: jax.vmap(jax.vmap(function))(score)  # noqa: E731
    return (
        each(lambda values: progress.block_progress(values, values[0])),
        each(lambda values: progress.cumulative_regret(values, 1.0)),
        each(lambda values: progress.cumulative_regret(values, jnp.max(values))),
    )


@jax.jit
def regrets(correct: Array, forks: Array, before: Array, after: Array, limits: Array) -> jax.Array:
    """Normalised regret of each trace, the mean over traces: f32[B, C].

    correct f32[B, n, S, A]; forks i32[B, n, S]; before i32[B, n, S], tokens of the prompt and the trace up to a fork;
    after i32[B, n, S, A], tokens inserted and sampled behind it; limits f32[C] in tokens.
    """
    of_trace = jax.vmap(jax.vmap(progress.normalized_regret, (None, None, 0)), (0, 0, None))

    def one(problem):
        correct, forks, before, after = problem
        accuracy, length = (anytime.pooled_accuracy(x[None], forks[None])[0] for x in (correct, after))
        return of_trace(accuracy, jax.lax.cummax(before + length, axis=1), limits).mean(axis=0)

    return jax.lax.map(one, (correct, forks, before, after), batch_size=_AT_ONCE)


def counts_of(name: str, problems: int, seed: int) -> jax.Array:
    """The resamples of a set's problems, f32[R, B]: decided by the seed and the set's name."""
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode())))
    return anytime.resample_counts(key, problems, RESAMPLES)


def resample(found: Metrics, counts: jax.Array) -> np.ndarray:
    """Every metric's number in every resample, f32[R, K]: a column a metric, or a budget of one; NaN where none is."""
    flat = lambda name: np.concatenate(  # noqa: E731
        [getattr(metric, name).reshape(counts.shape[1], -1) for metric in found.values()], axis=1
    )
    above, below = (np.asarray(anytime.resampled_means(flat(name), counts)) for name in ("above", "below"))
    with np.errstate(invalid="ignore"):
        return above / below


def intervals(found: Metrics, draws: np.ndarray) -> dict[str, list]:
    """[low, high] of every metric, or one a budget, from f32[R, K]; None for what exists in no resample."""
    bounds = np.stack(anytime.percentile_interval(draws))  # [2, K]
    return {key: plain(np.moveaxis(part, 0, -1)) for key, part in split(found, bounds).items()}


def split(found: Metrics, draws: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of f32[R, K], as `resample` lays them out, by metric: f32[R] or f32[R, S] each."""
    ends = np.cumsum([metric.above[0].size for metric in found.values()])
    parts = np.split(draws, ends[:-1], axis=1)
    shape = lambda metric: (len(draws), *metric.above.shape[1:])  # noqa: E731
    return {key: part.reshape(shape(metric)) for part, (key, metric) in zip(parts, found.items())}


def plain(values) -> list | float | None:
    """Numbers for JSON; NaN is None."""
    values = np.asarray(values, np.float64)
    if values.ndim:
        return [plain(x) for x in values]
    return None if np.isnan(values) else float(values)


def summarize(
    sets: dict[str, Evaluation], budgets: tuple[int, ...], seed: int, limits: tuple[int, ...] | None = None
) -> dict:
    """All metrics of every set under `sets`, and at the top their mean over sets; `NAME_ci95` beside each.

    A ratio without anything below (the mean length of right traces where none is right) is None; its interval is of
    the resamples in which it exists. The mean over sets is None where one of them is.

    Args:
      sets: evaluations by name, made with the same options.
      budgets: S token budgets; read only where there are no limits.
      seed: of the bootstrap.
      limits: C0 of the normalised regret, in tokens; default: the last budget.
    """
    measured = {name: metrics(result, limits or budgets[-1:]) for name, result in sets.items()}
    draws = {name: resample(found, counts_of(name, len(sets[name].id), seed)) for name, found in measured.items()}
    each = {
        name: mean_over_sets([found], [draws[name]])
        | {"problems": len(sets[name].id), "tokens": sets[name].tokens, "grading": sets[name].grading}
        for name, found in measured.items()
    }
    top = mean_over_sets(list(measured.values()), list(draws.values()))
    return top | {"problems": sum(len(result.id) for result in sets.values()), "sets": each}


def extrapolation(sets: dict[str, Evaluation], seed: int) -> dict:
    """Accuracy when thinking goes on: lists over the trace's end and each extension or round, with intervals.

    accuracy; gain, what it is above the trace's end; thinking, its tokens with the words inserted; spent, these with
    prompt, insertion and one answer; formatted. The mean over sets at the top, each under `sets`.
    """
    measured = {name: _extended(result) for name, result in sets.items()}
    draws = {name: resample(found, counts_of(name, len(sets[name].id), seed)) for name, found in measured.items()}
    each = {name: mean_over_sets([found], [draws[name]]) for name, found in measured.items()}
    return mean_over_sets(list(measured.values()), list(draws.values())) | {"sets": each}


def _extended(result: Evaluation) -> Metrics:
    accuracy = result.correct.mean(axis=(1, 3), dtype=np.float64)
    after = result.inserted + result.answer_length.mean(axis=-1, dtype=np.float64)
    spent = (result.prompt_length[:, None, None] + result.forks + after).mean(axis=1)
    found = {"accuracy": accuracy, "gain": accuracy - accuracy[:, :1], "spent": spent}
    found |= {"thinking": result.forks.mean(axis=1), "formatted": result.formatted.mean(axis=(1, 3))}
    return {name: Metric.mean(values) for name, values in found.items()}


def mean_over_sets(found: list[Metrics], draws: list[np.ndarray]) -> dict:
    """`NAME` and `NAME_ci95` of every metric: the mean of what it is in each set."""
    bounds = intervals(found[0], np.mean(draws, axis=0))
    summary = {}
    for key in found[0]:
        summary[key] = plain(np.mean([metrics[key].value() for metrics in found], axis=0))
        summary[f"{key}_ci95"] = bounds[key]
    return summary
