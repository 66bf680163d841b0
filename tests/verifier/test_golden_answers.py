r"""The answers, references and right verdicts of golden.jsonl, graded as in training: by `decide`, else by `equal`.

A row has `answer` (or `pieces`, pairs of text and repetitions), `reference` (one or several), `equal` and `note`;
`hostile` for texts that attack the grader; `known_wrong`, a reason, where the verdict is known not to be reached.
"""

import builtins
import json
import sys
import time
from pathlib import Path

import pytest
import sympy
import sympy.parsing.sympy_parser

from tto_jax.verifier import equality, symbolic

LINES = (Path(__file__).parent / "golden.jsonl").read_text().splitlines()
ROWS = [json.loads(line) for line in LINES]


def answer_of(row: dict) -> str:
    return row["answer"] if "answer" in row else "".join(text * times for text, times in row["pieces"])


def references_of(row: dict) -> list[str]:
    return row["reference"] if isinstance(row["reference"], list) else [row["reference"]]


class ReachedAnInterpreter(BaseException):
    """No library that swallows exceptions swallows this one."""


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """eval, exec and sympy's parser of Python expressions (sympify of a string is that) raise; imports still work."""

    def forbidden(original):
        def call(*args, **kwargs):
            if sys._getframe(1).f_code.co_filename.startswith("<frozen importlib"):
                return original(*args, **kwargs)
            raise ReachedAnInterpreter(str(args[:1])[:200])

        return call

    for module, name in (
        (builtins, "eval"),
        (builtins, "exec"),
        (sympy.parsing.sympy_parser, "parse_expr"),
        (sympy.parsing.sympy_parser, "eval_expr"),
        (sympy, "parse_expr"),
        (sys.modules["latex2sympy2_extended.latex2sympy2"], "parse_expr"),
    ):
        monkeypatch.setattr(module, name, forbidden(getattr(module, name)))


@pytest.fixture(scope="module")
def verdicts() -> list[bool]:
    """Of all rows, with every road to an interpreter closed."""

    def verdict(answer: str, reference: str) -> bool:
        decided = equality.decide(answer, reference)
        return symbolic.equal(answer, reference) if decided is None else decided

    with pytest.MonkeyPatch.context() as monkeypatch:
        forbid(monkeypatch)
        return [any(verdict(answer_of(row), reference) for reference in references_of(row)) for row in ROWS]


def test_the_roads_are_closed_indeed():
    with pytest.MonkeyPatch.context() as monkeypatch:
        forbid(monkeypatch)
        for attempt in (
            lambda: eval("1"),
            lambda: exec("1"),
            lambda: sympy.sympify("1"),
            lambda: sympy.parse_expr("1"),
        ):
            with pytest.raises(ReachedAnInterpreter):
                attempt()


def test_table_is_worth_its_name():
    hostile = [row for row in ROWS if row.get("hostile")]
    honest = [row for row in ROWS if not row.get("hostile")]
    assert len(ROWS) >= 350 and len(hostile) >= 60
    assert sum(row["equal"] for row in honest) >= 150 and sum(not row["equal"] for row in honest) >= 100
    assert len(set(LINES)) == len(LINES)
    assert sum("known_wrong" in row for row in ROWS) <= 7


def test_verdicts(verdicts):
    wrong = [row for row, verdict in zip(ROWS, verdicts) if verdict != row["equal"] and "known_wrong" not in row]
    assert wrong == []


def test_known_wrong_is_still_wrong(verdicts):
    right = [row for row, verdict in zip(ROWS, verdicts) if verdict == row["equal"] and "known_wrong" in row]
    assert right == [], "now right: take away known_wrong"


def test_hostile_answers_are_decided_at_once():
    slow = []
    for row in ROWS:
        began = time.process_time()
        for reference in references_of(row):
            equality.decide(answer_of(row), reference)
        if time.process_time() - began > 0.05:
            slow.append((row["note"], time.process_time() - began))
    assert slow == []


@pytest.mark.parametrize("row", [row for row in ROWS if row["note"] in ("symbolic", "matrices")], ids=str)
def test_equality_is_symmetric(row):
    """Of expressions; only names and alternatives are read differently on the two sides."""
    answer, reference = answer_of(row), row["reference"]
    if "=" not in answer + reference:
        assert equality.decide(answer, reference) == equality.decide(reference, answer)
