"""The one door from scores at forks to credit: `assign`."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from tto_jax.core import advantages, budgets, continuation, progress, regression
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.regression import NormalEquations
from tto_jax.core.types import Array, Credit

CONTINUATION = ("mrt_termination", "mrt_joint", "mrt_explicit")
KINDS = ("grpo", "rloo", "brpo", "prefix", "group", "none", "mrt", "progress_gae", *CONTINUATION)
NEEDS_START = ("progress_gae", *CONTINUATION)
ANSWERS = ("brpo", "grpo", "none")
WEIGHTS = ("tail", "ones")
GROUP_ONLY = ("grpo", "rloo", "mrt", "mrt_explicit")  # every thinking advantage is zero for a group of one
STD = ("grpo", "rloo", "mrt")  # of which the deviation is an option


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How thinking blocks earn credit.

    With R[g,s] = sum_{j>=s} P_j r[g,j], V1 the prefix baseline and V2 the group mean of R:
    `brpo` R - (s V1 + (S-s) V2)/S; `prefix` R - V1; `group` R - V2; `none` R; `grpo` r[S-1] minus its group mean, the
    same for all blocks; `rloo` the same with the others' mean; `mrt` grpo + alpha (progress - its mean over the traces
    that reached the block); `progress_gae` sum_{k>=s} gamma^(k-s) c[k] progress[k].
    MRT's RL, the same for all blocks, against J[-1], what ending at once earns: `mrt_termination` r[S-1] - J[-1];
    `mrt_joint` (r - mean)/std over the group's r[S-1] and the scores before any thinking; `mrt_explicit` r[S-1] +
    alpha (J[0] - J[-1]) minus its group mean, over the deviation.
    """

    kind: str = "brpo"
    decay: float = 0.5  # lambda of the prefix baseline
    alpha: float = 1.0  # weight of progress in `mrt`, `mrt_explicit`
    gamma: float = 1.0  # discount over blocks in `progress_gae`
    progress_weights: str = "tail"  # c in `progress_gae`; with ones: MRT's progress (gamma 0), shaping (gamma 1)
    leave_one_out: bool = False  # every group mean leaves its own trace out
    std: bool = False  # divide the outcome advantage by the group's sample deviation

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"estimator kind {self.kind!r} is unknown: choose one of {KINDS}")
        if not 0 < self.decay <= 1:
            raise ValueError(
                f"decay={self.decay}: the prefix baseline needs 0 < decay <= 1; choose 0.5 as the paper does"
            )
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha}: the weight of progress is a finite number; choose 1.0 as MRT does")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: the discount over blocks lies in [0, 1]; choose 0 (MRT) or 1 (BRPO)")
        if self.progress_weights not in WEIGHTS:
            raise ValueError(f"progress_weights={self.progress_weights!r} is unknown: choose one of {WEIGHTS}")
        if self.std and self.kind not in STD:
            raise ValueError(f"std=True with {self.kind!r}: only an outcome is divided by its deviation; choose {STD}")


def assign(
    correct: Array,
    forks: Array,
    schedule: BudgetSchedule,
    estimator: str | Estimator = "brpo",
    answers: str = "brpo",
    *,
    start: Array | None = None,
    values: Array | None = None,
    scored: Array | None = None,
    coef: Array | None = None,
    start_value: Array | None = None,
) -> Credit:
    """Credit of every thinking block and every answer.

    Args:
      correct: f32[B,G,S,A], score of each answer.
      forks: i32[B,G,S], where each trace was cut, in tokens, non-decreasing along S.
      schedule: prior over the S cuts.
      estimator: a name of `KINDS` (defaults of `Estimator`), or an `Estimator`.
      answers: `brpo`: score minus the mean of its fork's answers; `grpo`: that, kept for the last answer of the last
        column only; `none`: zeros.
      start: f32[B,A0], scores before any thinking. Their mean is J[-1]; needed by `NEEDS_START`, cancels in `mrt`.
      values: f32[B,G,S], replace the mean score in the thinking credit.
      scored: bool[B,G,S]; an unscored column carries the last scored value (J[-1], or 0, if there is none before).
      coef: f32[S,3], a, b, c of the regression baseline a V1 + b V2 + c, with `brpo`.
      start_value: f32[B], J[-1] in place of the mean of `start`, as `values` is in place of the mean scores.

    Returns:
      Credit; advantages of blocks without tokens (block_mask False) are computed and meant to be masked.

    Raises:
      ValueError: bad shapes, unknown names, G = 1 where every thinking advantage would be zero, arguments that the
        estimator does not take.
    """
    estimator = Estimator(estimator) if isinstance(estimator, str) else estimator
    correct, forks = jnp.asarray(correct), jnp.asarray(forks)
    _check(correct, forks, schedule, estimator, answers, start, values, scored, coef, start_value)
    correct = correct.astype(jnp.float32)
    scored = jnp.ones(forks.shape, bool) if scored is None else jnp.asarray(scored)
    values = correct.mean(axis=-1) if values is None else jnp.asarray(values, jnp.float32)
    initial = jnp.zeros(forks.shape[0]) if start is None else jnp.asarray(start, jnp.float32).mean(axis=-1)
    initial = initial if start_value is None else jnp.asarray(start_value, jnp.float32)

    first = None if start is None else jnp.asarray(start, jnp.float32)

    def one_problem(correct, forks, scored, values, initial, first):
        trace = _trace_advantage(values, forks, scored, initial, first, schedule, estimator, coef)
        ended = None if first is None else _start_advantage(values, scored, initial, first, estimator, answers)
        return trace, _answer_advantage(correct, forks, scored, answers), ended

    trace_advantage, answer_advantage, start_advantage = jax.vmap(one_problem)(
        correct, forks, scored, values, initial, first
    )
    return Credit(
        trace_advantage=trace_advantage,
        answer_advantage=answer_advantage,
        block_mask=budgets.block_mask(forks),
        start_advantage=start_advantage,
    )


def with_start(credit: Credit) -> Credit:
    """A column for every fork: answers before any thinking, where there are any, follow a first block of no tokens.

    start_advantage f32[B,G*A] -> Credit of S + 1 columns, as `token_tree.pack` takes it with forks that begin with 0.
    """
    if credit.start_advantage is None:
        return credit
    b, g, _, a = credit.answer_advantage.shape
    first = credit.start_advantage.reshape(b, g, 1, a)
    block = lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 0)))  # noqa: E731
    return Credit(
        trace_advantage=block(credit.trace_advantage),
        answer_advantage=jnp.concatenate([first, credit.answer_advantage], axis=2),
        block_mask=block(credit.block_mask),
    )


def _trace_advantage(values, forks, scored, initial, first, schedule, estimator, coef):
    """One problem: values f32[G,S], forks i32[G,S], scored bool[G,S], initial f32[], first f32[A0] -> f32[G,S]."""
    # J belongs to the fork: one scored column gives it to all columns of the fork.
    known = jnp.any(advantages.same_fork(forks) & scored[:, None, :], axis=-1)
    pooled = _carry(advantages.pool(values, forks, scored), known, initial)
    values = _carry(values, scored, initial)
    kind, leave_one_out = estimator.kind, estimator.leave_one_out
    if kind in CONTINUATION:
        advantage = {
            "mrt_termination": lambda: continuation.termination(values[:, -1], initial),
            "mrt_joint": lambda: continuation.joint(values[:, -1], first)[0],
            "mrt_explicit": lambda: continuation.explicit(
                values[:, -1], pooled[:, 0], initial, estimator.alpha, leave_one_out
            ),
        }[kind]()
        return jnp.broadcast_to(advantage[:, None], values.shape)
    if kind in GROUP_ONLY:
        outcome = advantages.grpo(values[:, -1], leave_one_out or kind == "rloo", estimator.std)[:, None]
        if kind != "mrt":
            return jnp.broadcast_to(outcome, values.shape)
        gain = jax.vmap(progress.block_progress, (0, None))(pooled, initial)
        reached = budgets.block_mask(forks)
        return outcome + estimator.alpha * (gain - advantages.group_mean(gain, leave_one_out, mask=reached))
    if kind == "progress_gae":
        gain = jax.vmap(progress.block_progress, (0, None))(pooled, initial)
        weight = schedule.tail if estimator.progress_weights == "tail" else jnp.ones_like(schedule.tail)
        return jax.vmap(progress.discounted_progress, (0, None, None))(gain, weight, estimator.gamma)
    returns = advantages.budget_return(values, schedule.weights)
    return returns - _baseline(values, returns, schedule, estimator, coef)


def _baseline(values, returns, schedule, estimator, coef):
    prefix = advantages.prefix_baseline(values, schedule.tail, estimator.decay)
    group = advantages.group_baseline(returns, estimator.leave_one_out)
    if coef is not None:
        return advantages.regression_baseline(prefix, group, jnp.asarray(coef, jnp.float32))
    return {
        "brpo": lambda: advantages.brpo_baseline(prefix, group),
        "prefix": lambda: prefix,
        "group": lambda: group,
        "none": lambda: jnp.zeros_like(returns),
    }[estimator.kind]()


def _answer_advantage(correct, forks, scored, answers):
    """One problem: correct f32[G,S,A] -> f32[G,S,A]."""
    if answers == "none":
        return jnp.zeros_like(correct)
    advantage = advantages.answer_advantage(correct, forks, scored)
    if answers == "grpo":
        return jnp.zeros_like(advantage).at[:, -1, -1].set(advantage[:, -1, -1])
    return advantage


def _start_advantage(values, scored, initial, first, estimator, answers):
    """One problem: answers before any thinking share the fork 0: score minus their mean, f32[A0].

    Trained with the `brpo` answers only; in `mrt_joint` they are samples like the others, whatever the answers.
    """
    if estimator.kind == "mrt_joint":
        return continuation.joint(_carry(values, scored, initial)[:, -1], first)[1]
    return first - first.mean() if answers == "brpo" else jnp.zeros_like(first)


def _carry(values, scored, initial):
    """Replace unscored columns by the last scored one before them, or by `initial`. f32[G,S]."""
    column = jnp.where(scored, jnp.arange(values.shape[-1]), -1)
    last = jax.lax.cummax(column, axis=1)
    return jnp.where(last >= 0, jnp.take_along_axis(values, jnp.maximum(last, 0), axis=-1), initial)


def _check(correct, forks, schedule, estimator, answers, start, values, scored, coef, start_value):
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator={estimator!r}: give an Estimator, or a name of {KINDS}")
    if answers not in ANSWERS:
        raise ValueError(f"answers={answers!r} is unknown: choose one of {ANSWERS}")
    if not isinstance(schedule, BudgetSchedule):
        raise ValueError(f"schedule={schedule!r}: give a BudgetSchedule (choose from_prior or from_weights)")
    if correct.ndim != 4 or 0 in correct.shape:
        raise ValueError(f"correct has shape {correct.shape}: it must be [B,G,S,A], none of them 0")
    b, g, s, _ = correct.shape
    if forks.shape != (b, g, s) or not jnp.issubdtype(forks.dtype, jnp.integer):
        raise ValueError(
            f"forks is {forks.dtype}{forks.shape}: it must be integers [B,G,S] = {(b, g, s)} as correct has"
        )
    if schedule.weights.shape != (s,):
        raise ValueError(f"schedule has {schedule.weights.shape} weights: correct has S={s} columns, one weight each")
    shaped = {"values": (values, (b, g, s)), "scored": (scored, (b, g, s)), "coef": (coef, (s, 3))}
    shaped |= {"start_value": (start_value, (b,))}
    for name, (array, shape) in shaped.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}: it must be {shape}, as correct has {correct.shape}")
    if scored is not None and jnp.asarray(scored).dtype != bool:
        raise ValueError(f"scored is {jnp.asarray(scored).dtype}: it must be bool[B,G,S]")
    if start is not None and (jnp.ndim(start) != 2 or jnp.shape(start)[0] != b or 0 in jnp.shape(start)):
        raise ValueError(f"start has shape {jnp.shape(start)}: it must be [B,A0] with B={b} and A0 >= 1")
    if g == 1 and estimator.kind in GROUP_ONLY:
        choices = tuple(kind for kind in KINDS if kind not in GROUP_ONLY)
        raise ValueError(
            f"G=1 with {estimator.kind!r}: every advantage would be zero; use G >= 2 or choose one of {choices}"
        )
    if estimator.kind in NEEDS_START and start is None:
        raise ValueError(f"start=None with {estimator.kind!r}: J[-1] does not cancel; give f32[B,A0] or choose 'mrt'")
    if coef is not None and estimator.kind != "brpo":
        raise ValueError(f"coef with {estimator.kind!r}: the regression baseline replaces that of BRPO; choose 'brpo'")


def normal_equations(
    correct: Array, forks: Array, schedule: BudgetSchedule, estimator: Estimator, values: Array | None = None
) -> NormalEquations:
    """What a batch tells of the regression baseline's coefficients; arguments as of `assign`, which takes them."""
    values = jnp.asarray(correct, jnp.float32).mean(axis=-1) if values is None else jnp.asarray(values, jnp.float32)

    def one_problem(values):
        returns = advantages.budget_return(values, schedule.weights)
        prefix = advantages.prefix_baseline(values, schedule.tail, estimator.decay)
        return prefix, advantages.group_baseline(returns, leave_one_out=True), returns

    return regression.normal_equations(*jax.vmap(one_problem)(values), budgets.block_mask(forks))


def baselines(
    correct: Array, forks: Array, schedule: BudgetSchedule, decay: float = 0.5, coef: Array | None = None
) -> dict[str, jax.Array]:
    """Return R and the baselines V1, V2 and BRPO's V, for diagnostics; f32[B,G,S] each; with coef the regression, too.

    Scores are pooled over columns that share a fork: else sampling noise would count as variance of the return.
    """
    correct, forks = jnp.asarray(correct, jnp.float32), jnp.asarray(forks)

    def one_problem(correct, forks):
        pooled = advantages.pool(correct.mean(axis=-1), forks, jnp.ones(forks.shape, bool))
        returns = advantages.budget_return(pooled, schedule.weights)
        prefix = advantages.prefix_baseline(pooled, schedule.tail, decay)
        group = advantages.group_baseline(returns)
        found = {"return": returns, "v1": prefix, "v2": group, "v": advantages.brpo_baseline(prefix, group)}
        if coef is None:
            return found
        others = advantages.group_baseline(returns, leave_one_out=True)
        return found | {"fit": advantages.regression_baseline(prefix, others, coef)}

    return jax.vmap(one_problem)(correct, forks)
