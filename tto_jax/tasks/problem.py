"""What a task is: problems with one verifiable answer, demonstrations for the warm start, and a verifier."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

SPLITS = ("train", "eval")
_EVAL_ONE_IN = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem as text."""

    id: int  # u32, a hash of the prompt: the same on every host and in every run
    prompt: str
    answers: tuple[str, ...]  # any of them is right


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """What follows the prompt in one warm-start example."""

    text: str  # tokens joined by spaces: thinking, elicitation, answer
    masked: tuple[bool, ...]  # one per token; True: not trained


class Verdict(NamedTuple):
    """What a task says of one answer's text."""

    correct: bool
    formatted: bool  # has the right form, right or not
    answer: str  # what was taken for the answer, in normal form; empty: nothing. Equal ones vote together
    how: str = "text"  # what decided: "text", "symbolic", "timeout", "crash"


class Task(Protocol):
    """Problems, the size of what is sampled, and the rule that judges answers. Embedded tasks are `WordTask`s."""

    @property
    def name(self) -> str:
        """The name that a configuration knows it by."""

    @property
    def max_prompt_tokens(self) -> int:
        """P: longer prompts are left out."""

    @property
    def max_answer_tokens(self) -> int:
        """Sampled tokens of the longest answer, EOS included."""

    def reference(self, problem: Problem) -> str:
        """The text of a right answer, as it would follow the insertion."""

    def judge(self, items: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """A verdict for each (text that was sampled after the insertion, its EOS left out; problem)."""


class EmbeddedTask(Task, Protocol):
    """A task that makes its own problems, of its own words."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token in the order of ids; the pad token first."""

    @property
    def pad(self) -> str:
        """The padding token."""

    @property
    def think_end(self) -> str:
        """The token that ends thinking."""

    @property
    def eos(self) -> str | None:
        """The token that ends an answer; None where an answer ends at `max_answer_tokens`."""

    @property
    def elicit_ended(self) -> str:
        """Inserted before an answer if the trace has ended thinking."""

    @property
    def elicit_cut(self) -> str:
        """Inserted before an answer if the trace is cut."""

    @property
    def max_trace_tokens(self) -> int:
        """Tokens of the longest demonstrated thinking, `think_end` not counted."""

    def problem(self, index: int, split: str) -> Problem:
        """Problem `index` of a split; always the same one."""

    def sample(self, rng: np.random.Generator, split: str) -> Problem:
        """A problem of a split, drawn from `rng`."""

    def demonstration(self, problem: Problem, rng: np.random.Generator) -> Demonstration:
        """An example of thinking and answering, not always a right one."""


def prompt_id(prompt: str) -> int:
    """u32 hash of a prompt's text (Python's own `hash` differs between processes)."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest(), "little")


def split_of_id(problem_id: int) -> str:
    """The split that a problem's id belongs to: one in eight is held out."""
    return "eval" if problem_id % _EVAL_ONE_IN == 0 else "train"


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to: decided by its text, so that no problem is in both."""
    return split_of_id(prompt_id(prompt))


def check_split(split: str) -> None:
    """Raises if there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; the choices are {', '.join(SPLITS)}")


def check_rate(name: str, value: float, *, below_one: bool = False) -> None:
    """Raises unless `value` is a probability (below 1 where a loop repeats with it)."""
    if not (0.0 <= value < 1.0 or (value == 1.0 and not below_one)):
        raise ValueError(f"{name}={value} must be a probability in [0, 1{')' if below_one else ']'}")


def check_mixture(name: str, weights: tuple[float, ...], choices: tuple[str, ...]) -> None:
    """Raises unless `weights` are probabilities, one for each of `choices`."""
    if len(weights) != len(choices) or min(weights) < 0 or abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"{name}={weights} must be {len(choices)} probabilities that sum to 1, for {choices}")


def choose(choices: tuple[str, ...], weights: tuple[float, ...], rng: np.random.Generator) -> str:
    """One of `choices` with the given probabilities."""
    u = rng.random()
    for choice, weight in zip(choices, weights):
        u -= weight
        if u < 0:
            return choice
    # Rounding may leave u at a hair above zero; a choice of weight 0 must not be the fallback.
    return next(choice for choice, weight in zip(reversed(choices), reversed(weights)) if weight > 0)
