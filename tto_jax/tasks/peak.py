"""peak: the largest of some values. Cues say where it probably is, so the order of thinking matters.

prompt    <s> (HI|lo u op) x 8 <think>        value = op(u) mod 10
check     c v m                               label, value, running maximum
ending    </think> ANS m
"""

import dataclasses
from typing import ClassVar

import numpy as np

from tto_jax.tasks.problem import Demonstration, Problem, check_mixture, check_rate, choose
from tto_jax.tasks.words import (
    ANSWER,
    APPLY,
    DIGITS,
    INVERT,
    LABELS,
    OPERATIONS,
    PAD,
    START,
    THINK,
    THINK_END,
    WordTask,
    noisy,
)

HIGH, LOW = "HI", "lo"
ORDERS = ("hints_first", "random", "left_to_right", "hints_last")
# Added to a sort key in [0, 1) where there is a hint.
_HINT_SHIFT = {"hints_first": -1, "random": 0, "hints_last": 1}
_ENDINGS = ("cut", "give_up", "complete")


@dataclasses.dataclass(frozen=True)
class Peak(WordTask):
    """The largest of `num_values` values in 4..9; `num_hints` of them are marked, one of which probably is it."""

    name: ClassVar[str] = "peak"
    seed: ClassVar[int] = 0x7EA4

    num_values: int = 8
    num_hints: int = 2
    hint_accuracy: float = 0.7  # probability that a hint marks the largest value
    order_probabilities: tuple[float, ...] = (0.2, 0.3, 0.3, 0.2)  # of ORDERS, in demonstrations
    error_rate: float = 0.03  # a demonstrated value is a random digit
    give_up_rate: float = 0.06  # stops after some of the checks
    cut_rate: float = 0.30  # likewise, but stopping itself is not trained: teaches answering after a cut only

    def __post_init__(self):
        if not 2 <= self.num_values <= len(LABELS):
            raise ValueError(f"num_values={self.num_values} must be in 2..{len(LABELS)}")
        if not 1 <= self.num_hints < self.num_values:
            raise ValueError(f"num_hints={self.num_hints} must be in 1..{self.num_values - 1} (num_values - 1)")
        for name in ("hint_accuracy", "error_rate", "give_up_rate", "cut_rate"):
            check_rate(name, getattr(self, name))
        check_rate("give_up_rate + cut_rate", self.give_up_rate + self.cut_rate)
        check_mixture("order_probabilities", self.order_probabilities, ORDERS)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """31 tokens at the default size."""
        special = (PAD, START, THINK, THINK_END, ANSWER, HIGH, LOW)
        return special + DIGITS + OPERATIONS + LABELS[: self.num_values]

    @property
    def max_prompt_tokens(self) -> int:
        """26 tokens at the default size; every prompt has as many."""
        return 3 * self.num_values + 2

    @property
    def max_trace_tokens(self) -> int:
        """All checks; `</think>` is one more."""
        return 3 * self.num_values

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        """(prompt, answer) of a random problem."""
        n, u = self.num_values, rng.random
        largest = 4 + int(6 * u())
        values = [int(largest * u()) for _ in range(n)]
        shuffled = _shuffled(n, rng)
        hints = shuffled[: self.num_hints]
        values[shuffled[0] if u() < self.hint_accuracy else shuffled[self.num_hints]] = largest
        words = [START]
        for i, value in enumerate(values):
            op = OPERATIONS[int(len(OPERATIONS) * u())]
            words += (HIGH if i in hints else LOW, DIGITS[INVERT[op][value]], op)
        words.append(THINK)
        return " ".join(words), DIGITS[largest]

    def demonstration(self, problem: Problem, rng: np.random.Generator) -> Demonstration:
        """Checks in one of the orders, now and then wrong; all of them, or fewer (given up or cut)."""
        words = problem.prompt.split()
        hints = [word == HIGH for word in words[1:-1:3]]
        values = [APPLY[op][int(u)] for u, op in zip(words[2:-1:3], words[3:-1:3])]
        complete_rate = 1.0 - self.cut_rate - self.give_up_rate
        ending = choose(_ENDINGS, (self.cut_rate, self.give_up_rate, complete_rate), rng)
        count = self.num_values if ending == "complete" else 1 + int((self.num_values - 1) * rng.random())
        text, largest = [], 0
        for i in self._order(hints, rng)[:count]:
            value = noisy(values[i], self.error_rate, rng)
            largest = max(largest, value)
            text += (LABELS[i], DIGITS[value], DIGITS[largest])
        masked = (False,) * len(text) + (ending == "cut", True, False)
        text += (THINK_END, ANSWER, DIGITS[largest])
        return Demonstration(text=" ".join(text), masked=masked)

    def _order(self, hints: list[bool], rng: np.random.Generator) -> list[int]:
        """The positions in the order in which a demonstration checks them."""
        order = choose(ORDERS, self.order_probabilities, rng)
        if order == "left_to_right":
            return list(range(len(hints)))
        shift = _HINT_SHIFT[order]
        key = [u + shift * hint for u, hint in zip(rng.random(len(hints)).tolist(), hints)]
        return sorted(range(len(hints)), key=key.__getitem__)


def _shuffled(n: int, rng: np.random.Generator) -> list[int]:
    """0..n-1 in random order."""
    return sorted(range(n), key=rng.random(n).tolist().__getitem__)
