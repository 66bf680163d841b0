"""Solutions that take steps back: written, then read back, they are the path that a reader would follow."""

import itertools
import random

import pytest

from tto_jax.tasks import backtracking
from tto_jax.tasks.backtracking import Attempt, Backtracks

STEPS = ["x = 2", "so\n\ny = 3", "Node", "Backtrack", "see Node 2: there", "Line 1", "é\n\n\nNode2: no", "a: b"]


def random_attempts(rng):
    """(attempts, the steps that are left)"""
    attempts, path = [], []
    for number in range(rng.randrange(1, 6)):
        keep = rng.randrange(len(path) + 1) if number else 0
        steps = tuple(rng.choice(STEPS) for _ in range(rng.randrange(0 if number else 1, 4)))
        attempts.append(Attempt(keep, steps))
        path = path[:keep] + list(steps)
    return attempts, path


def test_what_is_left_is_the_path():
    rng, shorter = random.Random(0), 0
    for _ in range(300):
        attempts, path = random_attempts(rng)
        text = backtracking.write(attempts)
        left = backtracking.linearise(text)
        assert left.rstrip("\n") == backtracking.write([Attempt(0, tuple(path))])
        assert backtracking.linearise(left) == left
        shorter += left != text
    assert shorter > 100


def test_by_hand():
    text = backtracking.write([Attempt(0, ("a", " b ")), Attempt(1, ("c",)), Attempt(0, ("d", "e"))])
    assert text == (
        "Node 1: a\n\nNode 2: b\n\nBacktrack to Line 1\n\nNode 2: c\n\nBacktrack to beginning\n\nNode 1: d\n\nNode 2: e"
    )
    assert backtracking.linearise(f"Hm.\n\n{text}</think>\n\n4") == "Hm.\n\nNode 1: d\n\nNode 2: e</think>\n\n4"
    back = backtracking.write([Attempt(0, ("a", "b")), Attempt(1, ())])
    assert backtracking.linearise(f"{back}\n\n</think>4") == "Node 1: a\n\n</think>4"
    assert backtracking.linearise("no step at all") == "no step at all"


def test_episodes_begin_at_backtracks():
    rng = random.Random(1)
    for _ in range(100):
        attempts, _ = random_attempts(rng)
        text = backtracking.write(attempts)
        begins = [0, *Backtracks(most=9)(text), len(text)]
        pieces = [text[a:b].rstrip("\n") for a, b in itertools.pairwise(begins)]
        assert len(pieces) == len(attempts)
        alone = [backtracking.write(attempts[: i + 1]) for i in range(len(attempts))]
        assert ["\n\n".join(pieces[: i + 1]) for i in range(len(pieces))] == alone
        assert len(Backtracks(most=2)(text)) == min(len(attempts) - 1, 1)
    assert Backtracks()("I should Backtrack to beginning\n\nBacktrack to Line 3 or so") == []
    assert Backtracks().size == 10


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Node 1: a\n\nNode 2: b\n\nBacktrack to Line 1\n\nNode 2: c", "Node 1: a\n\nNode 2: c"),
        ("Node 1: a\n\nNode 2: b\n\nBacktrack to Line 1", None),  # 1, or 12?
        ("Node 1: a\n\nBacktrack to beginning", None),  # of what?
        ("Node 1: a\n\nBacktrack to beginning\n\n", ""),
        ("Node 1: a\n\nNode 2: b\n\nBacktrack to Li", None),
        (
            "Node 1: a\n\nBacktrack to beginning\n\nNode 1: b\n\nNode 2: c\n\nBacktrack to Line 1",
            "Node 1: b\n\nNode 2: c\n\nBacktrack to Line 1",
        ),
        ("Node 1: a\n\nBacktrack to Line 7\n\nNode 2: b", None),  # there is no line 7
        ("Node 2: a\n\nBacktrack to beginning\n\n", None),
        ("no step at all", None),
    ],
)
def test_texts_that_go_on(text, left):
    """None: as it is."""
    assert backtracking.linearise_unfinished(text) == (text if left is None else left)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Node 1: a\n\nNode 3: b", "'Node 3: ' at character 11: the next line is 2"),
        ("Node 1: a\n\nBacktrack to Line 2", "'Backtrack to Line 2' at character 11: the lines are 1 to 1"),
        ("Node 1: a\n\nBacktrack to Line 1\n\nNode 1: b", "the next line is 2"),
    ],
)
def test_texts_that_cannot_be_followed(text, said):
    with pytest.raises(ValueError, match=said):
        backtracking.linearise(text)


@pytest.mark.parametrize(
    ("attempts", "said"),
    [
        ([Attempt(1, ("a",))], "attempt 0 keeps 1 steps: there are 0 before it"),
        ([Attempt(0, ("a",)), Attempt(2, ())], "attempt 1 keeps 2 steps: there are 1 before it"),
        ([Attempt(0, ("a", " \n"))], "cannot be written"),
        ([Attempt(0, ("a\n\nNode 2: b",))], "cannot be written"),
        ([Attempt(0, ("a\n\nBacktrack to beginning",))], "cannot be written"),
    ],
)
def test_attempts_that_cannot_be_written(attempts, said):
    with pytest.raises(ValueError, match=said):
        backtracking.write(attempts)


def test_a_rule_that_cuts_nothing():
    with pytest.raises(ValueError, match="most=1"):
        Backtracks(most=1)
