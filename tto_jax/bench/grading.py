"""Target `grading`: the answers of a training step, in a pool of workers and one by one.

The workload has the size of one training step, 64 problems x 8 traces x 4 budgets x 4 answers, and the repetition of
real groups: most answers of a problem are one of a few spellings of the right value or one of a few popular mistakes.
"""

import dataclasses
import functools
import random
import re
import time
from collections.abc import Sequence

import numpy as np

from tto_jax.bench.limits import Work
from tto_jax.bench.options import Options
from tto_jax.bench.timing import Result, Row, Timing
from tto_jax.verifier import equality
from tto_jax.verifier.pool import Pool

TAKES = ()
PROBLEMS, ANSWERS = 64, 8 * 4 * 4
MISTAKES = 6  # distinct ones of a problem, the popular ones first
GARBAGE = 0.08  # share of answers that no other answer equals

Item = tuple[str, tuple[str, ...]]  # (answer, its references), what Pool.judge takes


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of `grading`."""

    problems: int  # B
    answers: int  # of each problem, G S A
    steps: int  # different ones, after the first
    alone: int  # answers that are judged without a pool, too


SHAPES = {"paper": Shape(PROBLEMS, ANSWERS, 4, 1024), "ci": Shape(4, 16, 2, 64)}


def run(shape: Shape, _options: Options) -> Result:
    """Answers of a step, in a pool of workers, beside the same comparisons one by one in this process."""
    references = made_references(0, 50 * shape.problems)
    work = functools.partial(workload, references, problems=shape.problems, answers=shape.answers)
    steps, seconds = [work(seed=seed) for seed in range(shape.steps + 1)], []
    with Pool() as pool:
        for items in steps:
            begin = time.perf_counter()
            verdicts = pool.judge(items)
            seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    alone = judge_alone(items[: shape.alone])
    one_by_one = (time.perf_counter() - begin) * len(items) / len(alone)
    step = Timing.of(seconds[1:])
    rows = (
        Row("first step, workers start", Timing.of(seconds[:1]), Work()),
        Row("step", step, Work()),
        Row(f"one by one ({len(alone)} answers, scaled)", Timing.of([one_by_one]), Work()),
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


def workload(
    references: Sequence[str], seed: int, problems: int = PROBLEMS, answers: int = ANSWERS, hostile: int = 0
) -> list[Item]:
    """Answers of one training step, problem after problem.

    30 to 60% of a problem's answers are right, in up to 5 spellings; GARBAGE are unique; the others share MISTAKES
    values, the i-th with weight 1 / i.

    Args:
        references: right answers of real problems; each problem draws one.
        seed: decides everything.
        problems: B.
        answers: of each problem, G S A.
        hostile: so many answers, anywhere, are replaced by expressions that are too large to compute.

    Returns:
        B G S A items.
    """
    rng = random.Random(seed)
    items: list[Item] = []
    for reference in rng.sample(references, problems):
        right = spellings(reference)
        wrong = [mistake(reference, rng.choice(references), rng) for _ in range(MISTAKES)]
        share = rng.uniform(0.3, 0.6)
        for _ in range(answers):
            draw = rng.random()
            if draw < share:
                answer = rng.choice(right)
            elif draw < share + GARBAGE:
                answer = garbage(rng.choice([*right, *wrong]), rng)
            else:
                answer = rng.choices(wrong, [1 / (i + 1) for i in range(MISTAKES)])[0]
            items.append((answer, (reference,)))
    for index in rng.sample(range(len(items)), hostile):
        items[index] = (hostile_answer(rng), items[index][1])
    return items


def spellings(reference: str) -> list[str]:
    """Ways in which a model writes the value: as it is, in display style, spaced, a plain fraction, an equation."""
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", reference)
    found = [reference, reference.replace(r"\frac", r"\dfrac")]
    if r"\!" not in reference and "{,}" not in reference:  # where a comma separates thousands
        found.append(re.sub(r"([-+=,])", r" \1 ", reference))
    if fraction:
        found.append(f"{fraction[1]}{fraction[2]}/{fraction[3]}")
    if not re.search(r"[=<>$]|\\(text|le|ge|in|cup)", reference):
        found.append(f"x = {reference}")
    return list(dict.fromkeys(found))


def mistake(reference: str, other: str, rng: random.Random) -> str:
    """A wrong value of the same form where the reference holds a number, otherwise another problem's answer."""
    numbers = list(re.finditer(r"\d+", reference))
    if not numbers or rng.random() < 0.25:
        return other
    number = rng.choice(numbers)
    changed = int(number[0]) + rng.choice([-2, -1, 1, 2, 10])
    return f"{reference[: number.start()]}{abs(changed)}{reference[number.end() :]}"


def garbage(value: str, rng: random.Random) -> str:
    """What occurs once: prose, an expression that was cut off, a longer expression with random numbers."""
    a, b, c = (rng.randrange(2, 10_000) for _ in range(3))
    return rng.choice(
        [
            f"approximately {a}.{b}",
            rf"\frac{{{a}}}{{{b}}} + \sqrt{{{c}",
            rf"\frac{{{a}}}{{{b}}} + \sqrt{{{c}}}",
            rf"{value} \text{{ where }} n = {a}",
            rf"{a}x^2 - {b}x + {c}",
            f"I need to count the cases again: {a} minus {b} makes {c}",
            rf"\{{{a}, {b}, {c}\}}",
            rf"{a} \cdot 2^{{{b % 50}}}",
        ]
    )


def hostile_answer(rng: random.Random) -> str:
    """An expression that nobody can compute, no two alike."""
    a, b = rng.randrange(2, 1000), rng.randrange(10**6, 10**9)
    return rng.choice(
        [
            f"{a}^{{{b}^{{{b}}}}}",
            f"({b}!)!",
            rf"\int_0^{{{a}}} e^{{x^{{{b}}}}} \sin(x^x) dx",
            rf"\sqrt[{a}]{{{b}^{{{b}}}}}",
        ]
    )


def made_references(seed: int, number: int) -> list[str]:
    """Right answers in the forms of MATH: integers and fractions mostly; radicals, pairs, intervals, polynomials."""
    rng = random.Random(seed)
    forms = (
        (8, "{a}"),
        (4, r"\frac{{{a}}}{{{b}}}"),
        (2, r"{a}\sqrt{{{b}}}"),
        (1, r"({a}, {b})"),
        (1, r"[{a}, \infty)"),
        (1, r"{a}x^2 - {b}x + {c}"),
        (1, r"\frac{{{a}\pi}}{{{b}}}"),
        (1, r"{a}^\circ"),
    )
    chosen = rng.choices([form for _, form in forms], [weight for weight, _ in forms], k=number)
    return [form.format(a=rng.randrange(1, 200), b=rng.randrange(2, 30), c=rng.randrange(1, 50)) for form in chosen]


def judge_alone(items: Sequence[Item]) -> list[bool]:
    """The same comparison in this process, every answer by itself: what the pool is measured beside."""
    return [any(_equal(answer, reference) for reference in references) for answer, references in items]


def _equal(answer, reference):
    from tto_jax.verifier import symbolic  # slow to import, and the pool's workers have it

    decided = equality.decide(answer, reference)
    return symbolic.equal(answer, reference) if decided is None else decided
