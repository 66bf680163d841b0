"""What the grading of a step is measured on: answers as a rollout has them.

The workload has the size of one training step, 64 problems x 8 traces x 4 budgets x 4 answers, and the repetition of
real groups: most answers of a problem are one of a few spellings of the right value or one of a few popular mistakes.
"""

import random
import re
from collections.abc import Sequence

from tto_jax.verifier import equality

Item = tuple[str, tuple[str, ...]]  # (answer, its references), what Pool.judge takes

PROBLEMS, ANSWERS = 64, 8 * 4 * 4
MISTAKES = 6  # distinct ones of a problem, the popular ones first
GARBAGE = 0.08  # share of answers that no other answer equals


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
    from tto_jax.verifier import symbolic

    decided = equality.decide(answer, reference)
    return symbolic.equal(answer, reference) if decided is None else decided
