"""Solutions that take steps back, as text (MRT, arXiv 2503.07572): how they are written, cut and read.

Node 1: ...                    a step; its number is its place in the solution so far
Node 2: ...
Backtrack to Line 1            all after node 1 is given up; or: Backtrack to beginning
Node 2: ...

Paragraphs are separated by an empty line. What stands after a node, or after a backtrack, up to the next such paragraph
belongs to the last node that is left.
"""

import dataclasses
import re
from collections.abc import Sequence

SEPARATOR = "\n\n"
_PARAGRAPH = r"(?:\A|(?<=\n\n))"
_BACKTRACK = r"Backtrack to (?:Line (?P<line>\d+)|beginning)(?=\n\n|\Z)"
_MARKER = re.compile(rf"{_PARAGRAPH}(?:{_BACKTRACK}|Node (?P<node>\d+): )")
_BACK = re.compile(_PARAGRAPH + _BACKTRACK)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Some steps that follow what is kept of the attempts before."""

    keep: int  # steps of the solution so far that are kept; 0: none of them
    steps: tuple[str, ...]


def write(attempts: Sequence[Attempt]) -> str:
    """The text of attempts, each but the first introduced by its backtrack; steps are stripped, and numbered.

    Raises ValueError for a first attempt that keeps something, for one that keeps more steps than there are, and for
    steps that are empty or hold a paragraph that would be read as a marker.
    """
    paragraphs, depth = [], 0
    for number, attempt in enumerate(attempts):
        if not 0 <= attempt.keep <= depth:
            raise ValueError(f"attempt {number} keeps {attempt.keep} steps: there are {depth} before it")
        if number:
            paragraphs.append(f"Backtrack to Line {attempt.keep}" if attempt.keep else "Backtrack to beginning")
        for depth, step in enumerate(attempt.steps, attempt.keep + 1):
            if not writable(step):
                raise ValueError(f"step {step!r} cannot be written: it is empty, or would be read as something else")
            paragraphs.append(f"Node {depth}: {step.strip()}")
        depth = attempt.keep + len(attempt.steps)
    return SEPARATOR.join(paragraphs)


def writable(step: str) -> bool:
    """Whether a step is read back as it is written: it says something, and no paragraph of it is a marker."""
    return bool(step.strip()) and not _MARKER.search(SEPARATOR + step.strip())


def linearise(text: str) -> str:
    """The text without what was given up: what a reader would follow. What precedes the first node stays.

    Raises ValueError for a node out of order, or a backtrack to a line that is not there.
    """
    found = list(_MARKER.finditer(text))
    begins = [*(marker.start() for marker in found), len(text)]
    kept = [text[: begins[0]]]  # what precedes the first node, then the nodes
    for marker, end in zip(found, begins[1:]):
        depth = len(kept) - 1
        where = f"{marker[0]!r} at character {marker.start()}"
        if marker["node"] is None:
            if int(marker["line"] or 0) > depth:
                raise ValueError(f"{where}: the lines are 1 to {depth}")
            del kept[1 + int(marker["line"] or 0) :]
            kept[-1] += text[marker.end() : end].removeprefix(SEPARATOR)
        elif int(marker["node"]) != depth + 1:
            raise ValueError(f"{where}: the next line is {depth + 1}")
        else:
            kept.append(text[marker.start() : end])
    return "".join(kept)


def linearise_unfinished(text: str) -> str:
    """`linearise` of a text that may go on: a backtrack at its very end stays, as its line may be one of more digits.

    A text with a node out of order, or a backtrack to a line that is not there, stays as it is.
    """
    end = next((found.start() for found in _BACK.finditer(text) if found.end() == len(text)), len(text))
    try:
        return linearise(text[:end]) + text[end:]
    except ValueError:
        return text


@dataclasses.dataclass(frozen=True)
class Backtracks:
    """The rule of episodes: every backtrack opens one, up to `most` episodes; see `tasks.episodes.Rule`."""

    most: int = 10

    def __post_init__(self):
        if self.most < 2:
            raise ValueError(f"most={self.most}: at least 2 episodes, else nothing is cut")

    @property
    def size(self) -> int:
        """S, the most episodes of a text."""
        return self.most

    def __call__(self, text: str) -> list[int]:
        """Offsets, in characters, at which the episodes begin, without the first."""
        return [found.start() for found in _BACK.finditer(text) if found.start()][: self.most - 1]
