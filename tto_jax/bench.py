"""Measure: python -m tto_jax.bench credit|grading [--shape=paper] [--json=FILE]

Times a part of the library beside a plain implementation of the same equations and beside the least that the hardware
could do, in one process with one allocator setting. First calls are left out; every number is a median with its spread.
Results of the two sides are compared first: a benchmark of a wrong answer is refused.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tto_jax import bench_grading, host
from tto_jax.core import credit
from tto_jax.core.budgets import BudgetSchedule, block_to_tokens, forks_at_budgets
from tto_jax.verifier.pool import Pool

LEFT_OUT = 2  # first calls: they compile and touch new memory


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of n calls."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Median, smallest and largest."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a result."""

    name: str
    timing: Timing
    bytes: int  # written by a call

    @property
    def gb_per_s(self) -> float:
        """Bytes written over the median time."""
        return self.bytes / self.timing.median / 1e9


@dataclasses.dataclass(frozen=True)
class Result:
    """What one target measured at one shape."""

    rows: tuple[Row, ...]
    ratios: dict[str, float]  # of median times
    difference: float  # largest, between the two sides
    tolerance: float  # what it had to stay below


def measure(functions: dict[str, Callable], calls: int, left_out: int = LEFT_OUT) -> dict[str, Timing]:
    """Seconds of each function, called in turns, so that a slow moment of the machine hits all of them."""
    seconds = {name: [] for name in functions}
    for index in range(left_out + calls):
        for name, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function())
            if index >= left_out:
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing.of(values) for name, values in seconds.items()}


# ---------------------------------------------------------------- credit


@dataclasses.dataclass(frozen=True)
class CreditShape:
    """Sizes of `credit`: budgets divide C evenly."""

    problems: int  # B
    group_size: int  # G
    forks: int  # S
    answers: int  # A
    tokens: int  # C
    full: bool  # every trace has C tokens; else lengths are uniform in 1..C
    calls: int
    loop_calls: int


CREDIT_SHAPES = {
    "paper": CreditShape(64, 8, 4, 4, 8000, full=True, calls=50, loop_calls=3),
    "paper_mixed": CreditShape(64, 8, 4, 4, 8000, full=False, calls=50, loop_calls=3),
    "tiny": CreditShape(2, 3, 4, 2, 40, full=False, calls=5, loop_calls=2),
}


def credit_target(shape: CreditShape) -> Result:
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
        "loop, NumPy": lambda: loop_credit(correct, forks, weights, shape.tokens, spread_in_array),
        "loop, tight": lambda: loop_credit(correct, forks, weights, shape.tokens, spread_in_lists),
    }

    ours = jax.device_get(jitted(*arguments))
    difference = max(float(np.abs(a - b).max()) for loop in loops.values() for a, b in zip(ours, loop()))
    device = {"tto_jax": lambda: jitted(*arguments), "one write of f32[N,C]": lambda: fill(value)}
    timings = measure(device, shape.calls) | measure(loops, shape.loop_calls, left_out=0)
    written = sum(x.nbytes for x in ours)
    sizes = dict.fromkeys(timings, written) | {"one write of f32[N,C]": ours[0].nbytes}
    median = {name: timing.median for name, timing in timings.items()}
    ratios = {f"times faster than {name}": median[name] / median["tto_jax"] for name in loops}
    ratios["times one write"] = median["tto_jax"] / median["one write of f32[N,C]"]
    rows = tuple(Row(name, timing, sizes[name]) for name, timing in timings.items())
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


# ---------------------------------------------------------------- grading


@dataclasses.dataclass(frozen=True)
class GradingShape:
    """Sizes of `grading`."""

    problems: int  # B
    answers: int  # of each problem, G S A
    steps: int  # different ones, after the first
    alone: int  # answers that are judged without a pool, too


GRADING_SHAPES = {"paper": GradingShape(64, 128, 4, 1024), "tiny": GradingShape(4, 16, 2, 64)}


def grading_target(shape: GradingShape) -> Result:
    """Answers of a step, in a pool of workers, beside the same comparisons one by one in this process."""
    references = bench_grading.made_references(0, 50 * shape.problems)
    work = functools.partial(bench_grading.workload, references, problems=shape.problems, answers=shape.answers)
    steps, seconds = [work(seed=seed) for seed in range(shape.steps + 1)], []
    with Pool() as pool:
        for items in steps:
            begin = time.perf_counter()
            verdicts = pool.judge(items)
            seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    alone = bench_grading.judge_alone(items[: shape.alone])
    one_by_one = (time.perf_counter() - begin) * len(items) / len(alone)
    size = sum(len(answer) for answer, _ in items)
    step = Timing.of(seconds[1:])
    rows = (
        Row("first step, workers start", Timing.of(seconds[:1]), size),
        Row("step", step, size),
        Row(f"one by one ({len(alone)} answers, scaled)", Timing.of([one_by_one]), size),
    )
    return Result(
        rows=rows,
        ratios={
            "times faster than one by one": one_by_one / step.median,
            "answers a second": len(items) / step.median,
            "in the first step": len(items) / seconds[0],
        },
        difference=float(np.mean([a != b.correct for a, b in zip(alone, verdicts)])),
        tolerance=0.0,
    )


# ---------------------------------------------------------------- the page

TARGETS = {  # name: (function of a shape, shapes by name; the first is the default)
    "credit": (credit_target, CREDIT_SHAPES),
    "grading": (grading_target, GRADING_SHAPES),
}


def run(target: str, shape: str) -> Result:
    """Measures one target. Raises ValueError for unknown names, RuntimeError if the two sides disagree."""
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown: choose one of {tuple(TARGETS)}")
    function, shapes = TARGETS[target]
    if shape not in shapes:
        raise ValueError(f"--shape={shape!r} is unknown: choose one of {tuple(shapes)}")
    result = function(shapes[shape])
    if not result.difference <= result.tolerance:
        raise RuntimeError(
            f"{target}, shape {shape}: the two sides differ by {result.difference}, allowed is {result.tolerance}; "
            "nothing was reported"
        )
    return result


def table(target: str, shape: str, result: Result) -> str:
    """Aligned text."""
    lines = [["", "median ms", "min", "max", "n", "MB written", "GB/s"]]
    for row in result.rows:
        milliseconds = [f"{1e3 * x:.3f}" for x in (row.timing.median, row.timing.low, row.timing.high)]
        lines.append([row.name, *milliseconds, str(row.timing.n), f"{row.bytes / 1e6:.2f}", f"{row.gb_per_s:.2f}"])
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(width[0])] + [cell.rjust(w) for cell, w in zip(line[1:], width[1:])]) for line in lines
    ]
    sizes = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(TARGETS[target][1][shape]).items())
    ratios = ", ".join(f"{value:,.2f} {name}" for name, value in result.ratios.items())
    last = f"{ratios}; largest difference {result.difference:.1e}"
    return "\n".join([f"{target}, shape {shape}: {sizes}", *text, last])


def records(target: str, shape: str, result: Result) -> list[dict]:
    """One JSON-able record a row, each with everything needed to read it alone."""
    device = jax.devices()[0]
    common = {
        "target": target,
        "shape": shape,
        "sizes": dataclasses.asdict(TARGETS[target][1][shape]),
        "ratios": result.ratios,
        "difference": result.difference,
        "device": device.device_kind,
        "platform": device.platform,
        "cpus": os.cpu_count(),
        "commit": host.commit(),
        "versions": host.versions(),
    }
    return [
        {
            "name": row.name,
            "median_s": row.timing.median,
            "min_s": row.timing.low,
            "max_s": row.timing.high,
            "n": row.timing.n,
            "bytes": row.bytes,
            "gb_per_s": row.gb_per_s,
            **common,
        }
        for row in result.rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The page."""
    parser = argparse.ArgumentParser(prog="python -m tto_jax.bench", description=__doc__.split("\n\n")[1])
    parser.add_argument("target", choices=tuple(TARGETS), help="what to measure")
    parser.add_argument("--shape", help="sizes, by name; default: the target's first")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a row")
    flags = parser.parse_args(argv)
    host.keep_freed_memory()
    shape = flags.shape or next(iter(TARGETS[flags.target][1]))
    try:
        result = run(flags.target, shape)
    except ValueError as error:
        parser.error(str(error))
    print(table(flags.target, shape, result))
    if flags.json:
        path = epath.Path(flags.json)
        before = path.read_text() if path.exists() else ""
        path.write_text(before + "".join(json.dumps(record) + "\n" for record in records(flags.target, shape, result)))
        print(f"{len(result.rows)} lines added to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
