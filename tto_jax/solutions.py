"""Sampled solutions of a problem as a tree, and examples of backtracking made of them (MRT, arXiv 2503.07572)."""

import dataclasses
import itertools
import os
import random
from collections.abc import Sequence
from fractions import Fraction

from tto_jax.tasks import backtracking
from tto_jax.tasks.backtracking import Attempt
from tto_jax.tokenizer import Tokenizer

SCHEMES = ("stitched", "rejection", "tree")


@dataclasses.dataclass(frozen=True)
class Path:
    """One trace, cut at its forks into steps."""

    trace: int
    steps: tuple[str, ...]
    prefixes: tuple[tuple[int, ...], ...]  # tokens before each step
    right: tuple[str, ...]  # what follows the whole trace in right answers
    forced: dict[tuple[int, ...], tuple[tuple[str, ...], int]]  # after a prefix: the same, and how many answers


@dataclasses.dataclass(frozen=True)
class Solution:
    """Attempts, and what follows the last one: the end of thinking and a right answer."""

    attempts: tuple[Attempt, ...]
    end: str
    traces: tuple[int, ...]  # that they are from

    def texts(self) -> tuple[str, str]:
        """All attempts but the last one; and the last one with its backtrack, and the end."""
        text = backtracking.write(self.attempts)
        before = backtracking.write(self.attempts[:-1])
        before += backtracking.SEPARATOR if before else ""
        return before, text[len(before) :] + backtracking.SEPARATOR + self.end


def path_of(line: dict, tokenizer: Tokenizer) -> Path | None:
    """A completion with its ids as a path; None if a step of it, or an end, could be read as something else.

    A step is what lies between two forks, a split character left to the next one. The token that ends thinking is not
    part of a step but of what follows it; a last step that says nothing beside is none.
    """
    ids, forks = line["ids"], sorted({0, *line["forks"]})
    whole = tokenizer.decode(ids[: len(ids) - (line["ended"] or line["eos"])])
    places = [len(os.path.commonprefix([tokenizer.decode(ids[:fork]), whole])) for fork in forks]
    steps = [whole[a:b].strip() for a, b in itertools.pairwise(places)]
    if len(steps) > 1 and not steps[-1]:
        del steps[-1]
    answers = {fork: [] for fork in forks}
    for fork, found in zip(line["forks"], line["answers"]):
        answers[fork] += found
    ends = {}
    for fork, found in answers.items():
        right = [answer["ids"] for answer in found if answer["correct"]]
        ends[fork] = tuple(_end(tokens, line["ended"] and fork == len(ids), tokenizer) for tokens in right)
    if not all(map(backtracking.writable, [*steps, *itertools.chain(*ends.values())])):
        return None
    return Path(
        trace=line["trace"],
        steps=tuple(steps),
        prefixes=tuple(tuple(ids[:fork]) for fork in forks[: len(steps)]),
        right=ends[forks[-1]],
        forced={tuple(ids[:fork]): (ends[fork], len(found)) for fork, found in answers.items()},
    )


def _end(ids: Sequence[int], thought: bool, tokenizer: Tokenizer) -> str:
    """What follows a prefix: the token that ends thinking if it was sampled, the insertion, the answer, no EOS."""
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids
    return tokenizer.decode([tokenizer.think_end_id] * thought + list(ids)).strip()


def build(paths: Sequence[Path], scheme: str, rng: random.Random) -> list[Solution]:
    """The examples that a problem gives: one for each wrong trace that has a correction; rejection: each right trace.

    `stitched`: a wrong trace, then from the beginning a right one, at random.
    `rejection`: right traces as they are.
    `tree`: a wrong trace, back to its prefix with the highest success rate (the longest of several), from there the
    rest of a right trace that shares the prefix, at random; if there is none, an answer that was right there at once.

    Args:
      paths: of one problem. scheme: of SCHEMES. rng: chooses the corrections.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown: choose one of {SCHEMES}")
    right = [path for path in paths if path.right]
    wrong = [path for path in paths if not path.right]
    if scheme == "rejection":
        return [Solution((Attempt(0, path.steps),), path.right[0], (path.trace,)) for path in right]
    if scheme == "stitched":
        return [_corrected(path, 0, rng.choice(right)) for path in wrong if right]
    return [found for path in wrong if (found := _backtracked(path, paths, right, rng))]


def success_rate(paths: Sequence[Path], prefix: tuple[int, ...]) -> Fraction:
    """Share of right answers among all that were forced after these tokens, in any of the traces."""
    found = [path.forced[prefix] for path in paths if prefix in path.forced]
    return Fraction(sum(len(right) for right, _ in found), sum(number for _, number in found))


def _backtracked(path: Path, paths, right, rng) -> Solution | None:
    rates = [success_rate(paths, prefix) for prefix in path.prefixes]
    best = max(rates)
    if not best:
        return None
    keep = max(depth for depth, rate in enumerate(rates) if rate == best)
    prefix = path.prefixes[keep]
    sharing = [one for one in right if prefix in one.prefixes and one.prefixes.index(prefix) == keep]
    if sharing:
        return _corrected(path, keep, rng.choice(sharing))
    ends = [(one.trace, end) for one in paths if prefix in one.forced for end in one.forced[prefix][0]]
    trace, end = rng.choice(ends)
    return Solution((Attempt(0, path.steps), Attempt(keep, ())), end, (path.trace, trace))


def _corrected(wrong: Path, keep: int, right: Path) -> Solution:
    """The wrong trace, back to `keep` steps that both share, then the rest of the right one."""
    attempts = Attempt(0, wrong.steps), Attempt(keep, right.steps[keep:])
    return Solution(attempts, right.right[0], (wrong.trace, right.trace))
