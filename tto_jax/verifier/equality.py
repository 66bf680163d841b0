r"""Whether an answer equals a reference, as far as that is settled without symbolic mathematics.

Steps, cheapest first: the same text, the same normal form, exact numbers, structure (lists and sets in any order,
tuples and intervals in order with their brackets, unions, matrices, `x = 5` against `5`). What remains are pairs of
expressions or equations: `compare` hands them to a function, `decide` says None.

Choices. A list `1,2` equals the set `\{1,2\}`, not the tuple (1,2). Fractions need not be reduced. A unit may be left
out, but may not be another one; nothing is converted. An index that gives a base may be left out (`2516` for `2516_8`)
but not be another one. Words ignore case.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

from tto_jax.verifier.forms import Form, has_thousands, hostile, is_name, normal_form, read, squeeze
from tto_jax.verifier.numbers import Number, equal_numbers, parse_number
from tto_jax.verifier.units import split_unit

__all__ = ["compare", "decide", "normalise", "parse_number"]

_INTEGER = re.compile(r"\s*(-?)0*([0-9]+)\s*\Z")
_BASE = re.compile(r"(-?[0-9][0-9A-Z]*|-?[0-9A-Z]*[0-9])_\{?([0-9]+)\}?\Z")
_WRAPPED = re.compile(r"\(?\s*\\text\s*\{[^{}0-9\\]*\}\s*\)?\Z")
_LETTERS = re.compile(r"[A-Z]{3,}\Z")
_COMMAND = re.compile(r"\\[A-Za-z]+|[ei]")

Verdict = bool | None


def normalise(answer: str) -> str:
    """The normal form of an answer without spaces: equal normal forms are equal answers."""
    return squeeze(normal_form(answer)).rstrip(" .,;:")


def decide(answer: str, reference: str) -> Verdict:
    """True or False if the cheap steps settle whether two answers are equal, None if symbolic mathematics must."""
    if answer == reference:
        return bool(answer.strip())
    a, r = _INTEGER.match(answer), _INTEGER.match(reference)
    if a and r:
        return a.groups() == r.groups() or a.group(2) == r.group(2) == "0"
    return compare(answer, reference, _undecided)


def compare(answer: str, reference: str, symbolic: Callable[[Form, Form], Verdict]) -> Verdict:
    """Like `decide`, but pairs of leaves and of relations that are not settled go to `symbolic(answer, reference)`."""
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return bool(answer)
    if hostile(answer) or not answer or not reference:
        return False
    a, r = normal_form(answer), normal_form(reference)
    if not a or not r:
        return False
    verdict = _equal(read(a), read(r), symbolic)
    if verdict is not True and has_thousands(a) != has_thousands(r):
        # 100,101 is a number, unless the other text is a list.
        verdict = _any((verdict, _equal(read(a, False), read(r, False), symbolic)))
    return verdict


def _undecided(answer: Form, reference: Form) -> None:
    return None


def _any(verdicts) -> Verdict:
    verdicts = tuple(verdicts)
    return True if True in verdicts else None if None in verdicts else False


def _all(verdicts) -> Verdict:
    unknown = False
    for verdict in verdicts:
        if verdict is False:
            return False
        unknown |= verdict is None
    return None if unknown else True


def _equal(a: Form, r: Form, symbolic) -> Verdict:
    if a.text == r.text or squeeze(a.text) == squeeze(r.text):
        return True
    if "approximate" in (a.kind, r.kind):
        return _approximate(a, r, symbolic)
    if "relation" in (a.kind, r.kind):
        return _relations(a, r, symbolic)
    if a.kind == r.kind == "leaf":
        return _leaves(a, r, symbolic)
    kinds = {a.kind, r.kind}
    if kinds == {"list"} or ("set" in kinds and kinds <= {"list", "set", "leaf"}):
        return _unordered(_members(a), _members(r), symbolic)
    if a.kind != r.kind or a.mark != r.mark or len(a.parts) != len(r.parts):
        return False
    if a.kind == "union":
        return _unordered(a.parts, r.parts, symbolic)
    return _all(_equal(x, y, symbolic) for x, y in zip(a.parts, r.parts))


def _members(form: Form) -> tuple[Form, ...]:
    return form.parts if form.kind in ("list", "set") else (form,)


def _unordered(a: tuple[Form, ...], r: tuple[Form, ...], symbolic) -> Verdict:
    """Whether there is a pairing; equality being transitive, any first partner will do."""
    if len(a) != len(r):
        return False
    left, unknown = list(a), False
    for wanted in r:
        verdicts = []
        for i, candidate in enumerate(left):
            verdicts.append(_equal(candidate, wanted, symbolic))
            if verdicts[-1]:
                del left[i]
                break
        else:
            if None not in verdicts:
                return False
            unknown = True
    return None if unknown else True


def _approximate(a: Form, r: Form, symbolic) -> Verdict:
    """`exact ~ decimal` is its decimal where the other one is a decimal, else what is exact."""
    if r.kind == "approximate":
        return _any(_equal(a, part, symbolic) for part in r.parts)
    number = parse_number(split_unit(r.text)[0])
    return _equal(a.parts[1 if number is not None and number.decimal else 0], r, symbolic)


def _relations(a: Form, r: Form, symbolic) -> Verdict:
    if a.kind == r.kind:
        return _two_relations(a, r, symbolic)
    relation, other = (a, r) if a.kind == "relation" else (r, a)
    if relation.mark != "=":
        return False
    name, value = relation.parts
    acronyms = name.text.isupper() and value.text.isupper() and min(len(name.text), len(value.text)) > 1
    if other.kind == "list" or acronyms or not (is_name(name.text) or parse_number(name.text) is not None):
        return False  # `x = 1` is not a list, and an equation is not its right-hand side
    return _equal(value, r, symbolic) if relation is a else _equal(a, value, symbolic)


def _two_relations(a: Form, r: Form, symbolic) -> Verdict:
    if a.mark != r.mark:
        return False
    same = squeeze(a.parts[0].text) == squeeze(r.parts[0].text)
    if same:
        verdict = _equal(a.parts[1], r.parts[1], symbolic)
        if verdict is not False or is_name(a.parts[0].text):
            return verdict
    elif a.mark == "=" and all(squeeze(x.text) == squeeze(y.text) for x, y in zip(a.parts, reversed(r.parts))):
        return True
    if a.parts[1].kind != "leaf" or r.parts[1].kind != "leaf":
        return False
    return symbolic(a, r)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What the cheap steps know of an expression: its value text without unit, the unit, the number that it is."""

    value: str
    key: str
    unit: str
    number: Number | None
    word: str  # of a text in words: lower case letters only
    constant: bool  # holds no letter that can be a variable

    @property
    def percent(self) -> bool:
        """Whether it is a number with a percent sign."""
        return self.number is not None and self.number.percent


@functools.lru_cache(maxsize=16_384)
def leaf(text: str) -> Leaf:
    """Reads an expression in normal form."""
    number = parse_number(text)
    if number is not None:
        return Leaf(text, squeeze(text), "", number, "", True)
    value, unit = split_unit(text)
    number = parse_number(value) if value != text else None
    word = ""
    if _WRAPPED.match(text) or _LETTERS.match(text):
        word = "".join(c for c in squeeze(text).lower() if c.isalpha())
    constant = number is not None or not any(c.isalpha() for c in _COMMAND.sub("", value))
    return Leaf(value, squeeze(value), unit, number, word, constant)


def _leaves(a: Form, r: Form, symbolic) -> Verdict:
    x, y = leaf(a.text), leaf(r.text)
    if y.word or x.word:
        return _letters(a.text) == _letters(r.text)
    if x.unit and y.unit and x.unit != y.unit:
        return False
    if (x.unit and y.percent) or (x.percent and y.unit):
        return False
    if x.key == y.key:
        return bool(x.key)
    if x.number is not None and y.number is not None:
        return equal_numbers(x.number, y.number)
    bases = _BASE.match(x.key), _BASE.match(y.key)
    if any(bases):
        digits = [base.group(1) if base else other.key for base, other in zip(bases, (x, y))]
        return digits[0] == digits[1] and not all(bases)
    for one, other in ((x, y), (y, x)):
        if one.number is not None and (one.number.too_big or not other.constant):
            return False
    return symbolic(a, r)


def _letters(text: str) -> str:
    return "".join(c for c in squeeze(text).lower() if c.isalnum())
