"""Where a text is cut into episodes: rules on plain text (MRT, arXiv 2503.07572, and its released notebooks)."""

import dataclasses
from collections.abc import Callable, Sequence

MARKERS = (
    "Wait",
    "But wait",
    "Alternatively",
    "Is there another way to think about this?",
    "But let me double-check",
    "But hold on",
)

Rule = Callable[[str], Sequence[int]]  # text -> ascending offsets, in characters, at which a new episode begins


@dataclasses.dataclass(frozen=True)
class Delimiters:
    """A paragraph that starts with a marker opens an episode; then every `group` consecutive episodes are one.

    Case-sensitive, at the start of a paragraph only. A marker at most `gap` paragraphs after the last cut does not cut
    (the start of the text counts as a cut). After `max_cuts` cuts the remainder is one episode. The papers' runs use
    (max_cuts, group) = (49, 5), (45, 3) and (99, 10). Raises ValueError for numbers that make no sense.
    """

    markers: tuple[str, ...] = MARKERS
    separator: str = "\n\n"
    gap: int = 2
    max_cuts: int = 49
    group: int = 5

    def __post_init__(self):
        if not self.markers or not self.separator:
            raise ValueError(
                f"markers={self.markers}, separator={self.separator!r}: both must be given; the marker '' is that of "
                "every paragraph"
            )
        if self.gap < 0 or self.max_cuts < 1 or self.group < 1:
            raise ValueError(
                f"gap={self.gap}, max_cuts={self.max_cuts}, group={self.group}: gap is at least 0, the others 1"
            )

    @property
    def size(self) -> int:
        """S, the most episodes of a text."""
        return -(-(self.max_cuts + 1) // self.group)

    def __call__(self, text: str) -> list[int]:
        """Offsets, in characters, at which the merged episodes begin, without the first."""
        cuts, offset, last = [], 0, 0
        for index, paragraph in enumerate(text.split(self.separator)):
            if len(cuts) == self.max_cuts:
                break
            if index - last > self.gap and paragraph.startswith(self.markers):
                cuts.append(offset)
                last = index
            offset += len(paragraph) + len(self.separator)
        return cuts[self.group - 1 :: self.group]


def paragraphs(most: int, separator: str = "\n\n") -> Delimiters:
    """Every paragraph is an episode, up to `most`; what follows belongs to the last one."""
    if most < 2:
        raise ValueError(f"most={most}: at least 2 paragraphs, else nothing is cut")
    return Delimiters(markers=("",), separator=separator, gap=0, max_cuts=most - 1, group=1)
