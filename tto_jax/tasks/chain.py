"""chain: a running value modulo 10 through a chain of operations. Terse steps are cheap and noisy, verbose ones not.

prompt    <s> x op op ... <think>
skip      d v                     two operations at once
terse     c v                     label, value
verbose   hmm* c u op = v         and sometimes again: wait c u op = v
ending    </think> ANS v
"""

import dataclasses
from typing import ClassVar

import numpy as np

from tto_jax.tasks.problem import Demonstration, Problem, check_mixture, check_rate, choose
from tto_jax.tasks.words import (
    ANSWER,
    APPLY,
    DIGITS,
    EOS,
    LABELS,
    OPERATIONS,
    PAD,
    START,
    THINK,
    THINK_END,
    WordTask,
    noisy,
)

FILLER, RECHECK, EQUALS = "hmm", "wait", "="
STEPS = ("skip", "terse", "verbose")
STYLES = (*STEPS, "mixed")


@dataclasses.dataclass(frozen=True)
class Chain(WordTask):
    """The last value of `min_ops`..`max_ops` operations; with `answer_digits=2` the last two values and an EOS."""

    name: ClassVar[str] = "chain"
    seed: ClassVar[int] = 0xC4A1

    min_ops: int = 4
    max_ops: int = 12
    max_trace_tokens: int = 72  # longer demonstrations are cut here, without an answer
    answer_digits: int = 1
    style_probabilities: tuple[float, ...] = (0.15, 0.20, 0.40, 0.25)  # of STYLES, one per trace
    mixed_concentration: tuple[float, ...] = (1.0, 1.0, 2.0)  # a mixed trace's weights of STEPS ~ Dirichlet
    error_rates: tuple[float, ...] = (0.15, 0.07, 0.03)  # of STEPS: a value is a random digit
    filler_rate: float = 0.2  # of one more `hmm`
    recheck_rate: float = 0.12  # of doing a verbose step again; the second value counts
    give_up_rate: float = 0.08  # stops after some of the steps

    def __post_init__(self):
        if not 2 <= self.min_ops <= self.max_ops <= len(LABELS):
            raise ValueError(
                f"min_ops={self.min_ops}, max_ops={self.max_ops} must satisfy 2 <= min_ops <= max_ops <= {len(LABELS)}"
            )
        if self.max_trace_tokens < 1:
            raise ValueError(f"max_trace_tokens={self.max_trace_tokens} must be at least 1")
        if self.answer_digits not in (1, 2):
            raise ValueError(f"answer_digits={self.answer_digits} is unknown; the choices are 1, 2")
        check_mixture("style_probabilities", self.style_probabilities, STYLES)
        if len(self.mixed_concentration) != len(STEPS) or min(self.mixed_concentration) <= 0:
            raise ValueError(
                f"mixed_concentration={self.mixed_concentration} must be positive, one for each of {STEPS}"
            )
        if len(self.error_rates) != len(STEPS):
            raise ValueError(f"error_rates={self.error_rates} must be one for each of {STEPS}")
        for step, rate in zip(STEPS, self.error_rates):
            check_rate(f"error_rates of {step}", rate)
        check_rate("filler_rate", self.filler_rate, below_one=True)
        check_rate("recheck_rate", self.recheck_rate)
        check_rate("give_up_rate", self.give_up_rate)

    @property
    def eos(self) -> str | None:
        """Ends an answer of two digits; an answer of one digit needs none."""
        return EOS if self.answer_digits == 2 else None

    @property
    def num_answer_digits(self) -> int:
        """Digits of an answer."""
        return self.answer_digits

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """36 tokens at the default size, and an EOS where there is one."""
        special = (PAD, START, THINK, THINK_END, ANSWER, FILLER, RECHECK, EQUALS)
        return special + DIGITS + OPERATIONS + LABELS[: self.max_ops] + ((self.eos,) if self.eos else ())

    @property
    def max_prompt_tokens(self) -> int:
        """A start, a value, the operations and `<think>`."""
        return self.max_ops + 3

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        """(prompt, answer) of a random problem."""
        u = rng.random
        previous = value = start = int(10 * u())
        ops = []
        for _ in range(self.min_ops + int((self.max_ops - self.min_ops + 1) * u())):
            op = OPERATIONS[int(len(OPERATIONS) * u())]
            ops.append(op)
            previous, value = value, APPLY[op][value]
        return " ".join((START, DIGITS[start], *ops, THINK)), " ".join(self._answer(previous, value))

    def demonstration(self, problem: Problem, rng: np.random.Generator) -> Demonstration:
        """Steps in one or several styles, now and then wrong (errors propagate); answers with the value it has."""
        _, start, *ops, _ = problem.prompt.split()
        steps = self._steps(int(start), ops, rng)
        if len(steps) > 1 and rng.random() < self.give_up_rate:
            steps = steps[: 1 + int((len(steps) - 1) * rng.random())]
        text = [word for words, _, _ in steps for word in words]
        if len(text) > self.max_trace_tokens:
            text = text[: self.max_trace_tokens]
            return Demonstration(text=" ".join(text), masked=(False,) * len(text))
        _, previous, value = steps[-1]
        answer = [*self._answer(previous, value), *([self.eos] if self.eos else [])]
        masked = (False,) * (len(text) + 1) + (True,) + (False,) * len(answer)
        return Demonstration(text=" ".join((*text, THINK_END, ANSWER, *answer)), masked=masked)

    def _steps(self, value: int, ops: list[str], rng: np.random.Generator) -> list[tuple[list[str], int, int]]:
        """The steps that consume all operations: (words, value before the last operation, value)."""
        style = choose(STYLES, self.style_probabilities, rng)
        weights = tuple(rng.dirichlet(self.mixed_concentration).tolist()) if style == "mixed" else ()
        skip_error, terse_error, verbose_error = self.error_rates
        steps, done = [], 0
        while done < len(ops):
            step = choose(STEPS, weights, rng) if style == "mixed" else style
            previous, op = value, ops[done]
            if step == "skip" and done + 1 < len(ops):
                previous = APPLY[op][value]
                done += 1
                value = noisy(APPLY[ops[done]][previous], skip_error, rng)
                words = [LABELS[done], DIGITS[value]]
            elif step == "verbose":
                words, value = self._verbose(LABELS[done], previous, op, verbose_error, rng)
            else:  # terse, or a skip with a single operation left
                value = noisy(APPLY[op][previous], terse_error, rng)
                words = [LABELS[done], DIGITS[value]]
            done += 1
            steps.append((words, previous, value))
        return steps

    def _verbose(
        self, label: str, previous: int, op: str, error: float, rng: np.random.Generator
    ) -> tuple[list[str], int]:
        """(words, value) of a verbose step with its fillers and its re-check."""
        words = []
        while rng.random() < self.filler_rate:
            words.append(FILLER)
        value = noisy(APPLY[op][previous], error, rng)
        words += (label, DIGITS[previous], op, EQUALS, DIGITS[value])
        if rng.random() < self.recheck_rate:
            value = noisy(APPLY[op][previous], error, rng)
            words += (RECHECK, label, DIGITS[previous], op, EQUALS, DIGITS[value])
        return words, value

    def _answer(self, previous: int, value: int) -> tuple[str, ...]:
        """The answer's digits."""
        return (DIGITS[previous], DIGITS[value])[-self.answer_digits :]
