"""Episodes of a text against a second writing of the rule, and by hand."""

import random

import pytest

from tto_jax.tasks import episodes
from tto_jax.tasks.episodes import Delimiters

PIECES = [
    *("Wait, no.", "But wait", "Alternatively,", "But hold on: 3", "But let me double-check it", "wait", "So x = 2."),
    *("", "Is there another way to think about this? Yes", " Wait", "A Wait", "é Wait", "\nWait", "Waiting"),
]


def oracle(text, markers, gap, max_cuts, group):
    """Offsets at which episodes begin: episodes as lists of paragraphs first, then groups of them."""
    found, current, since = [], [], None
    for paragraph in text.split("\n\n"):
        since = 0 if since is None else since + 1
        opens = any(paragraph[: len(marker)] == marker for marker in markers)
        if opens and since > gap and len(found) < max_cuts:
            found.append(current)
            current, since = [], 0
        current.append(paragraph)
    found.append(current)
    merged = [[p for part in found[i : i + group] for p in part] for i in range(0, len(found), group)]
    begin, offsets = 0, []
    for part in merged:
        offsets.append(begin)
        begin += sum(len(paragraph) + 2 for paragraph in part)
    return offsets[1:]


@pytest.mark.parametrize("rule", [(49, 5), (45, 3), (99, 10), (3, 1), (4, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("gap", [0, 1, 2])
def test_delimiters_equal_oracle(rule, gap):
    rng, cut = random.Random(repr((rule, gap))), 0
    for _ in range(60):
        text = "\n\n".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 120)))
        found = Delimiters(gap=gap, max_cuts=rule[0], group=rule[1])
        assert found(text) == oracle(text, episodes.MARKERS, gap, *rule)
        assert len(found(text)) < found.size
        cut += len(found(text))
    assert cut > 20


def test_by_hand():
    paragraphs = ["I add.", "Wait, why?", "Hm.", "Wait, again.", "Wait.", "So", "is", "Alternatively", "done"]
    text = "\n\n".join(paragraphs)
    rule = Delimiters(max_cuts=9, group=1)
    begins = [text[offset:].split("\n\n")[0] for offset in rule(text)]
    assert begins == ["Wait, again.", "Alternatively"]  # those at 1 and 4 come too soon
    assert [text[offset:].split("\n\n")[0] for offset in Delimiters(gap=0, max_cuts=2, group=2)(text)] == [
        "Wait, again."
    ]


def test_the_papers_sizes():
    assert [Delimiters(max_cuts=m, group=g).size for m, g in ((49, 5), (45, 3), (99, 10))] == [10, 16, 10]


def test_paragraphs():
    text = "a\n\nb\n\n\n\nc\n\nd"
    assert [text[i:][:1] for i in episodes.paragraphs(10)(text)] == ["b", "\n", "c", "d"]
    assert episodes.paragraphs(3)(text) == [3, 6]
    assert episodes.paragraphs(3).size == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [({"markers": ()}, "every paragraph"), ({"gap": -1}, "at least 0"), ({"max_cuts": 0}, "1"), ({"group": 0}, "1")],
)
def test_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Delimiters(**change)
    with pytest.raises(ValueError, match="at least 2"):
        episodes.paragraphs(1)
