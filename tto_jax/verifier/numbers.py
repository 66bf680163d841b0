r"""Exact values of numbers as models write them, by a small parser that knows numbers and nothing else.

Read: integers, decimals, `4.5e33`, `8.7 \cdot 10^{8}`, fractions (`\frac{1}{2}`, `1/2`), mixed fractions, thousands
separators, sums, products, integer powers, factorials, binomials, a final percent sign. Everything stays a pair of
integers of a bounded number of bits, so that no text can make it compute for long.
"""

import dataclasses
import functools
import math
import re

MAX_BITS = 1 << 16  # of a numerator or denominator: 2006! has 19,000
_MAX_WORK = 1 << 21  # bits of all intermediate results together
_MAX_FACTORIAL = 5_000
_MAX_EXPONENT = 9_999  # of scientific notation
TOLERANCE = 10**6  # 1 / (relative and absolute tolerance), if one of two numbers is written as a decimal

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<op>\\(?:frac|binom|cdot)|[-+/^!(){}%]))"
)
_PLAIN = re.compile(r"([-+]?)\s*([0-9]+)(?:\.([0-9]+))?\Z")
_FRACTION = re.compile(r"(-?)\s*(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+)/([0-9]+))\Z")
_NUMERIC = re.compile(r"(?:[-+0-9.,eE/^!(){}%\s]|\\frac|\\binom|\\cdot)*\Z")
_THOUSANDS = re.compile(r"(?<![0-9.])([0-9]{1,3})((?:[, ][0-9]{3})+)(?![0-9])")
_MIXED = re.compile(r"(?<![0-9])([0-9]+) +(?=[0-9]+ */ *[0-9]+\s*\Z)")


@dataclasses.dataclass(frozen=True)
class Number:
    """An exact value numerator / denominator, and how it was written. Denominator 0: too big to be computed."""

    numerator: int
    denominator: int = 1
    decimal: bool = False  # written with a decimal point or in scientific notation
    percent: bool = False  # written with a percent sign, which is not part of the value

    @property
    def too_big(self) -> bool:
        """Whether the text is a number beyond the bounds."""
        return self.denominator == 0


TOO_BIG = Number(1, 0)


class _TooBig(Exception):
    pass


class _NotANumber(Exception):
    pass


def parse_number(text: str) -> Number | None:
    """The number that a text in normal form is; None if it is none; a number with `too_big` if it is beyond the bounds.

    Powers and factorials are computed only while they fit `MAX_BITS` bits; `n!!` and longer are never computed.
    """
    plain = _PLAIN.match(text)
    if plain:
        sign, whole, part = plain.group(1), plain.group(2), plain.group(3) or ""
        if len(whole) + len(part) <= 4_000:
            value = int(whole + part)
            return Number(-value if sign == "-" else value, 10 ** len(part), decimal=bool(part))
    fraction = _FRACTION.match(text)
    if fraction and len(text) <= 4_000:
        sign, a, b, c, d = fraction.groups()
        if int(b or d):
            return Number(-int(a or c) if sign else int(a or c), int(b or d))
    if not _NUMERIC.match(text):
        return None
    text = _THOUSANDS.sub(lambda m: m.group(1) + m.group(2).replace(",", "").replace(" ", ""), text)
    text = _MIXED.sub(r"\1+", text) if not text.lstrip().startswith("-") else _negative_mixed(text)
    try:
        return _Parser(text).parse()
    except _TooBig:
        return TOO_BIG
    except (_NotANumber, RecursionError):
        return None


def equal_numbers(answer: Number, reference: Number) -> bool:
    """Whether two numbers are equal.

    Exactly, if both are written without a decimal point. Otherwise up to 1e-6, absolute and relative to the reference:
    0.333333 is 1/3 and 0.3333 is not, and 1e-10 is not 2e-10. (The released grader of arXiv 2505.13438 knows no
    tolerance; math-verify rounds to six decimals, so that all tiny numbers are equal.) If one has a percent sign and
    the other none, 20% is 20 and also 0.2.
    """
    if answer.too_big or reference.too_big:
        return False
    if _close(answer, reference):
        return True
    if answer.percent and not reference.percent:
        return _close(dataclasses.replace(answer, denominator=answer.denominator * 100), reference)
    if reference.percent and not answer.percent:
        return _close(answer, dataclasses.replace(reference, denominator=reference.denominator * 100))
    return False


def _close(a: Number, b: Number) -> bool:
    gap = abs(a.numerator * b.denominator - b.numerator * a.denominator)
    if gap == 0 or not (a.decimal or b.decimal):
        return gap == 0
    return gap * TOLERANCE <= a.denominator * min(abs(b.numerator), b.denominator)


def _negative_mixed(text: str) -> str:
    """`-3 1/2` is -(3 + 1/2)."""
    body = text.lstrip()[1:]
    mixed = _MIXED.sub(r"\1+", body)
    return f"-({mixed})" if mixed != body else text


@functools.lru_cache(maxsize=256)
def _factorial(n: int) -> int:
    return math.factorial(n)


class _Parser:
    """Recursive descent; values are (numerator, denominator > 0), not reduced. Callers bound the nesting."""

    def __init__(self, text: str):
        self.tokens = []
        self.decimal = False
        self.work = 0
        end = len(text.rstrip())
        position = 0
        while position < end:
            found = _TOKEN.match(text, position)
            if not found:
                raise _NotANumber
            self.tokens.append(found.group("number") or found.group("op"))
            position = found.end()
        self.tokens.append("")
        self.at = 0

    def parse(self) -> Number:
        value = self.sum()
        percent = self.take("%")
        if self.tokens[self.at]:
            raise _NotANumber
        return Number(*value, decimal=self.decimal, percent=percent)

    def take(self, token: str) -> bool:
        if self.tokens[self.at] != token:
            return False
        self.at += 1
        return True

    def need(self, token: str) -> None:
        if not self.take(token):
            raise _NotANumber

    def bounded(self, numerator: int, denominator: int) -> tuple[int, int]:
        if denominator < 0:
            numerator, denominator = -numerator, -denominator
        bits = max(numerator.bit_length(), denominator.bit_length())
        self.work += bits
        if bits > MAX_BITS or self.work > _MAX_WORK:
            raise _TooBig
        return numerator, denominator

    def sum(self) -> tuple[int, int]:
        a, b = self.product()
        while self.tokens[self.at] in ("+", "-"):
            sign = 1 if self.take("+") else -self.take("-")
            c, d = self.product()
            a, b = self.bounded(a * d + sign * c * b, b * d)
        return a, b

    def product(self) -> tuple[int, int]:
        a, b = self.signed()
        while True:
            if self.take("/"):
                d, c = self.signed()
                if d == 0:
                    raise _NotANumber
            elif self.take("\\cdot"):
                c, d = self.signed()
            elif self.tokens[self.at] in ("(", "{", "\\frac", "\\binom"):
                c, d = self.power()
            else:
                return a, b
            a, b = self.bounded(a * c, b * d)

    def signed(self) -> tuple[int, int]:
        sign = 1
        while self.tokens[self.at] in ("+", "-"):
            sign *= 1 if self.take("+") else -self.take("-")
        a, b = self.power()
        return sign * a, b

    def power(self) -> tuple[int, int]:
        return self.raised(*self.factorials())

    def raised(self, a: int, b: int) -> tuple[int, int]:
        if not self.take("^"):
            return a, b
        if self.take("{"):
            e, f = self.sum()
            self.need("}")
            e, f = self.raised(e, f)
        else:
            e, f = self.signed()
        if e % f or (a == 0 and e <= 0):
            raise _NotANumber  # a root, or a power of zero that is none
        e //= f
        if e < 0:
            a, b, e = b, a, -e
        if max(abs(a).bit_length() - 1, b.bit_length() - 1) * e > MAX_BITS:
            raise _TooBig
        return self.bounded(a**e, b**e) if (abs(a), b) != (1, 1) else (a ** (e % 2), 1)

    def factorials(self) -> tuple[int, int]:
        value = self.atom()
        if not self.take("!"):
            return value
        if self.tokens[self.at] == "!":
            raise _TooBig
        return self.bounded(_factorial(self.small(value)), 1)

    def small(self, value: tuple[int, int]) -> int:
        n, rest = divmod(*value)
        if rest or n < 0:
            raise _NotANumber
        if n > _MAX_FACTORIAL:
            raise _TooBig
        return n

    def atom(self) -> tuple[int, int]:
        token = self.tokens[self.at]
        self.at += 1
        for opening, closing in (("(", ")"), ("{", "}")):
            if token == opening:
                value = self.sum()
                self.need(closing)
                return value
        if token in ("\\frac", "\\binom"):
            (a, b), (c, d) = self.group(), self.group()
            if token == "\\binom":
                return self.bounded(math.comb(self.small((a, b)), self.small((c, d))), 1)
            if c == 0:
                raise _NotANumber
            return self.bounded(a * d, b * c)
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise _NotANumber
        value = self.literal(token)
        if token.isdigit() and self.tokens[self.at] == "\\frac":
            return self.mixed(value)
        return value

    def group(self) -> tuple[int, int]:
        self.need("{")
        value = self.sum()
        self.need("}")
        return value

    def mixed(self, whole: tuple[int, int]) -> tuple[int, int]:
        r"""`3\frac{1}{2}` is 3 + 1/2; a fraction that is not proper is a factor."""
        p, q = self.atom()
        if 0 < p < q:
            return self.bounded(whole[0] * q + p, q)
        return self.bounded(whole[0] * p, q)

    def literal(self, token: str) -> tuple[int, int]:
        digits, _, exponent = token.lower().partition("e")
        whole, point, part = digits.partition(".")
        self.decimal |= bool(point or exponent)
        if len(digits) > 4_000 or len(exponent) > 6 or abs(int(exponent or 0)) > _MAX_EXPONENT:
            raise _TooBig
        shift = int(exponent or 0) - len(part)
        value = int((whole + part) or 0)
        return self.bounded(value * 10 ** max(shift, 0), 10 ** max(-shift, 0))
