"""Target `credit`: scores to one advantage a token, beside Python loops and one write of the output."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.bench import limits
from tto_jax.bench.limits import Work
from tto_jax.bench.options import Options, chosen
from tto_jax.bench.timing import Result, Side, measure
from tto_jax.core import credit
from tto_jax.core.budgets import BudgetSchedule, block_to_tokens, forks_at_budgets

TAKES = ("only",)
OURS, WRITE, LOOP, TIGHT = "tto_jax", "one write of f32[N,C]", "NumPy loop", "tight loop"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of `credit`: budgets divide C evenly."""

    problems: int  # B
    group_size: int  # G
    forks: int  # S
    answers: int  # A
    tokens: int  # C
    full: bool  # every trace has C tokens; else lengths are uniform in 1..C
    repeat: int
    loop_calls: int


SHAPES = {
    "paper": Shape(64, 8, 4, 4, 8000, full=True, repeat=50, loop_calls=3),
    "paper_mixed": Shape(64, 8, 4, 4, 8000, full=False, repeat=50, loop_calls=3),
    "ci": Shape(2, 3, 4, 2, 40, full=False, repeat=5, loop_calls=2),
}


def run(shape: Shape, options: Options) -> Result:
    """BRPO credit of a batch to token level: scores f32[B,G,S,A] -> advantages f32[N,C] and f32[B,G,S,A].

    Beside it two loops over problems, traces, blocks and tokens. One looks the block's advantage up for every token, as
    the released code does (there in torch tensors, here in NumPy arrays); one is made tight, with the advantage in a
    local float. And one fill of f32[N,C]: what writing the output costs at least.
    """
    rng = np.random.default_rng(0)
    group = (shape.problems, shape.group_size)
    correct = (rng.random((*group, shape.forks, shape.answers)) < 0.5).astype(np.float32)
    length = np.full(group, shape.tokens) if shape.full else rng.integers(1, shape.tokens + 1, group)
    tokens = tuple(shape.tokens * (s + 1) // shape.forks for s in range(shape.forks))
    schedule = BudgetSchedule.from_prior(tokens, "uniform")
    forks = np.asarray(forks_at_budgets(length, schedule))

    jitted = jax.jit(lambda *arguments: credit_to_tokens(*arguments, shape.tokens))
    fill = jax.jit(lambda value: jnp.full((shape.problems * shape.group_size, shape.tokens), value, jnp.float32))
    arguments, value = jax.device_put((correct, forks, schedule)), jax.device_put(np.float32(1))
    weights = np.asarray(schedule.weights).tolist()
    loops = {
        LOOP: lambda: loop_credit(correct, forks, weights, shape.tokens, spread_in_array),
        TIGHT: lambda: loop_credit(correct, forks, weights, shape.tokens, spread_in_lists),
    }

    number = shape.problems * shape.group_size * shape.tokens
    written = Work(bytes=limits.FLOAT32 * (number + correct.size))
    device = [
        Side(OURS, lambda: jitted(*arguments), written, number),
        Side(WRITE, lambda: fill(value), Work(bytes=limits.FLOAT32 * number), number),
    ]
    plain = [Side(name, loop, written, number) for name, loop in loops.items()]
    wanted = chosen([*device, *plain], options)
    rows = measure([side for side in device if side in wanted], shape.repeat)
    rows += measure([side for side in plain if side in wanted], shape.loop_calls, left_out=0)
    ours = jax.device_get(jitted(*arguments))
    difference = max(float(np.abs(a - b).max()) for loop in loops.values() for a, b in zip(ours, loop()))
    median = {row.name: row.timing.median for row in rows}
    ratios = {f"times faster than {name}": median[name] / median[OURS] for name in loops if {name, OURS} <= set(median)}
    if {OURS, WRITE} <= set(median):
        ratios["times one write"] = median[OURS] / median[WRITE]
    return Result(rows, ratios, difference, tolerance=1e-6)


def credit_to_tokens(correct, forks, schedule: BudgetSchedule, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """f32[N,C], 0 beyond the last fork, and f32[B,G,S,A]."""
    earned = credit.assign(correct, forks, schedule, "brpo", "brpo")
    rows = [x.reshape(-1, x.shape[-1]) for x in (earned.trace_advantage, forks)]
    return jax.vmap(lambda values, cuts: block_to_tokens(values, cuts, num_tokens))(*rows), earned.answer_advantage


def loop_credit(
    correct: np.ndarray, forks: np.ndarray, weights: Sequence[float], num_tokens: int, spread: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """The same from the equations (arXiv 2505.13438, BRPO), one number at a time.

    correct f32[B,G,S,A], forks i32[B,G,S], weights of the S budgets -> f32[B*G,C] and f32[B,G,S,A].
    """
    scores, cuts = correct.tolist(), forks.tolist()
    num_forks, num_answers = correct.shape[2:]
    tail = [sum(weights[s:]) for s in range(num_forks)]
    thinking, answering = [], []
    for problem, problem_cuts in zip(scores, cuts):
        means = [[sum(answers) / num_answers for answers in trace] for trace in problem]
        returns = [[sum(weights[j] * r[j] for j in range(s, num_forks)) for s in range(num_forks)] for r in means]
        group = [sum(row[s] for row in returns) / len(returns) if len(returns) > 1 else 0.0 for s in range(num_forks)]
        for g, r in enumerate(means):
            thinking.append([])
            for s in range(num_forks):
                discounts = [0.5 ** (s - j) for j in range(s)]
                prefix = tail[s] * sum(d * x for d, x in zip(discounts, r)) / sum(discounts) if s else 0.0
                thinking[-1].append(returns[g][s] - (s * prefix + (num_forks - s) * group[s]) / num_forks)
        for g, trace in enumerate(problem):
            for s, answers in enumerate(trace):
                same = [means[g][j] for j in range(num_forks) if problem_cuts[g][j] == problem_cuts[g][s]]
                others = same if num_answers > 1 else [r[s] for r in means]
                answering.append([score - sum(others) / len(others) for score in answers])
    thinking = np.array(thinking, np.float32)
    return spread(thinking, forks.reshape(thinking.shape), num_tokens), np.reshape(answering, correct.shape)


def spread_in_array(values: np.ndarray, forks: np.ndarray, num_tokens: int) -> np.ndarray:
    """Block values f32[N,S] on their tokens f32[N,C]; both arrays are indexed at every token."""
    tokens = np.zeros((len(values), num_tokens), np.float32)
    for n in range(len(values)):
        begin = 0
        for s in range(values.shape[1]):
            for t in range(begin, forks[n, s]):
                tokens[n, t] = values[n, s]
            begin = forks[n, s]
    return tokens


def spread_in_lists(values: np.ndarray, forks: np.ndarray, num_tokens: int) -> np.ndarray:
    """The same with lists of floats, one a trace; the block's value is looked up once."""
    tokens = []
    for row, cuts in zip(values.tolist(), forks.tolist()):
        line, begin = [0.0] * num_tokens, 0
        for value, end in zip(row, cuts):
            for t in range(begin, end):
                line[t] = value
            begin = end
        tokens.append(line)
    return np.array(tokens, np.float32)
