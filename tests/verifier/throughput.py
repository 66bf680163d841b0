"""How fast answers are graded: `python tests/verifier/throughput.py FOLDER`, which holds deepscaler/train/math.json.

The workload has the size of one training step, 64 problems x 8 traces x 4 budgets x 4 answers, and the repetition of
real groups: most answers of a problem are one of a few spellings of the right value or one of a few popular mistakes.
"""

import argparse
import collections
import json
import random
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from tto_jax.verifier.pool import Pool

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


def measure(calls: dict[str, Sequence[Item]], workers: int | None = None) -> dict[str, dict[str, float]]:
    """Judges each named batch in turn in one pool: wall and CPU seconds, kinds of verdicts."""
    figures = {}
    with Pool(workers) as pool:
        for name, items in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            verdicts = pool.judge(items)
            figures[name] = {
                "wall s": round(time.perf_counter() - wall, 2),
                "CPU s here": round(time.process_time() - cpu, 2),
                "answers": len(items),
                "distinct": len(set(items)),
                "right": sum(verdict.correct for verdict in verdicts),
                **collections.Counter(verdict.how for verdict in verdicts),
            }
    return figures


def references_of(folder: Path) -> list[str]:
    """The answers of MATH's training problems."""
    records = json.loads((folder / "deepscaler" / "train" / "math.json").read_text())
    return [record["answer"] for record in records if record["answer"]]


def main() -> None:
    """Prints the figures of a first call (workers start), the same again, other steps, one with hostile answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    references = references_of(arguments.folder)
    first = workload(references, seed=0)
    calls = {
        "first": first,
        "the same again": first,
        "another step": workload(references, seed=1),
        "and another": workload(references, seed=2),
        "with 16 hostile": workload(references, seed=3, hostile=16),
    }
    for name, figures in measure(calls, arguments.workers).items():
        print(f"{name:>16}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{'all workers':>16}: CPU s {used.ru_utime + used.ru_stime:.1f}")


if __name__ == "__main__":
    main()
