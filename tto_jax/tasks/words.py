"""What the embedded tasks share: a vocabulary of words, arithmetic modulo 10, exact-match answers."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from tto_jax.tasks.problem import Problem, Verdict, check_split, prompt_id, split_of_id

PAD, START, THINK, THINK_END, ANSWER, EOS = "<pad>", "<s>", "<think>", "</think>", "ANS", "</s>"
DIGITS = tuple("0123456789")
LABELS = tuple("abcdefghijklmnopqrstuvwxyz")

# APPLY[op][u] = op(u) mod 10. Every operation is a permutation of the digits, hence INVERT.
APPLY = {f"+{k}": tuple((u + k) % 10 for u in range(10)) for k in (1, 2, 3, 5)} | {
    f"*{k}": tuple(u * k % 10 for u in range(10)) for k in (3, 7)
}
OPERATIONS = tuple(APPLY)
INVERT = {op: tuple(table.index(v) for v in range(10)) for op, table in APPLY.items()}


@dataclasses.dataclass(frozen=True)
class WordTask(abc.ABC):
    """Base of the embedded tasks: prompts and answers are words, one token each."""

    name: ClassVar[str]
    seed: ClassVar[int]  # of `problem`: tells the tasks' random streams apart
    pad: ClassVar[str] = PAD
    think_end: ClassVar[str] = THINK_END
    elicit_ended: ClassVar[str] = ANSWER
    elicit_cut: ClassVar[str] = f"{THINK_END} {ANSWER}"

    @property
    def eos(self) -> str | None:
        """None: an answer ends when it has all its digits."""
        return None

    @property
    def num_answer_digits(self) -> int:
        """Digits of an answer."""
        return 1

    @property
    def max_answer_tokens(self) -> int:
        """Digits of an answer, and its EOS if there is one."""
        return self.num_answer_digits + (self.eos is not None)

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        """(prompt, answer) of a random problem of either split."""

    def sample(self, rng: np.random.Generator, split: str) -> Problem:
        """A problem of a split: drawn again until its prompt falls into the split."""
        check_split(split)
        while True:
            prompt, answer = self.draw(rng)
            problem_id = prompt_id(prompt)
            if split_of_id(problem_id) == split:
                return Problem(id=problem_id, prompt=prompt, answers=(answer,))

    def problem(self, index: int, split: str) -> Problem:
        """Problem `index` of a split; always the same one."""
        return self.sample(np.random.default_rng([self.seed, index]), split)

    def reference(self, problem: Problem) -> str:
        """The answer's words, and the EOS where answers end with one."""
        return " ".join([*problem.answers[0].split(), *([self.eos] if self.eos else [])])

    def judge(self, items: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """Exact match, word by word."""
        return [
            Verdict(self.is_correct(text, problem), self.is_formatted(text), " ".join(text.split()))
            for text, problem in items
        ]

    def is_correct(self, answer_text: str, problem: Problem) -> bool:
        """Whether the answer's words are those of one of the problem's answers."""
        return answer_text.split() in [answer.split() for answer in problem.answers]

    def is_formatted(self, answer_text: str) -> bool:
        """Whether the answer is the right number of digits and nothing else."""
        words = answer_text.split()
        return len(words) == self.num_answer_digits and all(word in DIGITS for word in words)


def noisy(value: int, rate: float, rng: np.random.Generator) -> int:
    """`value`, or with probability `rate` a random digit (which may happen to be right)."""
    return int(10 * rng.random()) if rng.random() < rate else value
