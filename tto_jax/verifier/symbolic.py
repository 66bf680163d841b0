r"""Whether two expressions or equations are equal, by sympy on trees made by the LaTeX reader of math-verify.

To be run where it can be killed: parsing and arithmetic are bounded here as far as text and tree show it, but a library
may still hang on what nobody thought of. Nothing reaches `eval`, `exec` or sympy's parser of Python expressions: texts
are read by the grammar of latex2sympy2_extended, with evaluation off, and only commands of a list are read at all
(no integrals, sums or limits: a task that was written down again is no answer).

Equality is tested with numbers, not by simplification: both trees are evaluated at the same points to 50 digits, and
again to 100 to tell a zero from a small number. Equal at all of them means equal, up to chance. That is fast, decides
where simplification gives up, and has no absolute tolerance (1/2004! is not 1/2006!). Symbols are taken to be positive
reals, as in physics, so that \sqrt{x^{2}} is x; with |x| in it, negative ones are tried too.
"""

import math
import re
import zlib

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from sympy.core.function import AppliedUndef

from tto_jax.verifier import equality
from tto_jax.verifier.forms import Form, hostile
from tto_jax.verifier.numbers import TOLERANCE, parse_number

_DIGITS = (50, 100)
_MAX_DEPTH = 12  # of brackets; the reader's time doubles every few levels
_MAX_FACTORIAL = 20_000
_MAX_LOG2 = 200_000  # of any power, factorial or binomial that is computed
_KNOWN = re.compile(
    r"\\(?:frac|sqrt|cdot|pi|infty|sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|arcsin|arccos|arctan|log|ln|exp|lfloor|rfloor"
    r"|lceil|rceil|binom|hbar|ell|dot|ddot|hat|bar|vec|tilde|overline|circ|odot|alpha|beta|gamma|delta|epsilon|varepsilon"
    r"|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta"
    r"|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega)\Z"
)
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
_CHARS = re.compile(r"[-+0-9A-Za-z.,\\/^_!(){}\[\]|=' ]*\Z")
_LONG = re.compile(r"[0-9]{400}")
_SCIENTIFIC = re.compile(r"(?<![0-9A-Za-z.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([+-]?[0-9]{1,4})(?![0-9])")
_DEGREES = re.compile(r"(?<![0-9.])([0-9]+(?:\.[0-9]+)?)\s*\^\s*\{\s*\\circ\s*\}")
_MIXED = re.compile(r"(?<![0-9A-Za-z.^_}])([0-9]+)\s*(\\frac\s*\{[0-9]+\}\s*\{[0-9]+\})")
_FACTOR = re.compile(r"(?<=[0-9])\s*\(")
_DECIMAL = re.compile(r"[0-9]\.|\.[0-9]|[0-9][eE][+-]?[0-9]")
_FUNCTIONS = {
    *(sympy.sin, sympy.cos, sympy.tan, sympy.cot, sympy.sec, sympy.csc, sympy.asin, sympy.acos, sympy.atan, sympy.exp),
    *(sympy.sinh, sympy.cosh, sympy.tanh, sympy.log, sympy.Abs, sympy.Add, sympy.Mul),
}


class _CannotEvaluate(Exception):
    pass


class _Reader(_Latex2Sympy):
    """The library's reader, but for numbers: it hands their digits to sympy.Number, which is sympify, which is eval."""

    def parse_number(self, text: str) -> sympy.Rational:
        """Decimals are exact."""
        number = parse_number(text.replace(",", ""))
        if number is None or number.too_big:
            raise ValueError(f"{text[:20]!r} is no number that can be computed with")
        return sympy.Rational(number.numerator, number.denominator)


def equal(answer: str, reference: str) -> bool:
    """Whether two answers are equal. Raises nothing; may be slow or need much memory, so run it where it can be killed.

    Args:
        answer: what a model wrote.
        reference: what is right.
    """
    try:
        return equality.compare(answer, reference, _equal) is True
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return False


def _equal(answer: Form, reference: Form) -> bool:
    """Equality of two leaves, or of two relations with one sign."""
    if answer.kind == "relation":
        return _same_relation(answer, reference)
    texts = [equality.leaf(form.text).value for form in (answer, reference)]
    a, r = map(_tree, texts)
    return a is not None and r is not None and _same_values(a, r, any(map(_DECIMAL.search, texts)))


def _tree(text: str) -> sympy.Expr | None:
    """The tree of an expression in normal form, not evaluated; None if it is not read."""
    if hostile(text, _MAX_DEPTH) or text.count("|") > 6 or "!!" in text or not _CHARS.match(text) or _LONG.search(text):
        return None
    if not all(map(_KNOWN.match, _COMMAND.findall(text))):
        return None
    text = _SCIENTIFIC.sub(r"(\1 \\cdot 10^{\2})", text)
    text = _DEGREES.sub(r"(\\frac{\1 \\cdot \\pi}{180})", text)
    text = _FACTOR.sub(r" \\cdot (", text)  # the reader takes 3(\frac{1}{2}) for a mixed fraction
    text = _MIXED.sub(r"(\1+\2)", text).replace(r"\gamma", r"\xi_{gamma}")  # the reader's \gamma is Euler's constant
    if r"\sqrt[" not in text:
        text = text.replace("[", "(").replace("]", ")")
    try:
        with sympy.evaluate(False):
            tree = _Reader(config=ConversionConfig(lowercase_symbols=False)).parse(text)
    except MemoryError:
        raise
    except Exception:  # the reader raises bare Exceptions for whatever it can't read
        return None
    return tree if isinstance(tree, sympy.Expr) else None


def _points(trees: list[sympy.Expr]) -> list[dict]:
    """Values for all symbols, rationals between 0.3 and 4; negative ones too if there is an absolute value."""
    symbols = sorted({symbol for tree in trees for symbol in tree.atoms(sympy.Symbol)}, key=str)
    symbols = [symbol for symbol in symbols if symbol.name != "i"]
    if not symbols:
        return [{}]
    signs = (1, 1, 1, -1) if any(tree.has(sympy.Abs) for tree in trees) else (1, 1, 1)
    return [
        {symbol: sign * sympy.Rational(1201 + 3079 * k + 104729 * (i + 1) % 3001, 4001 + 97 * i + 31 * k)
         for i, symbol in enumerate(symbols)}
        for k, sign in enumerate(signs)
    ]  # fmt: skip


def _same_values(a: sympy.Expr, r: sympy.Expr, decimal: bool) -> bool:
    """`decimal`: one of them is written with a decimal point, and the tolerance of numbers holds."""
    compared = 0
    for point in _points([a, r]):
        try:
            (a1, a2), (r1, r2) = _precise(a, point), _precise(r, point)
        except _CannotEvaluate:
            continue
        compared += 1
        if not _close(_cleaned(a1, a2), _cleaned(r1, r2), decimal):
            return False
    return compared > 0


def _same_relation(answer: Form, reference: Form) -> bool:
    """Whether left - right of one is a constant times that of the other; a positive constant for inequalities."""
    sides = [[_tree(side.text) for side in form.parts] for form in (answer, reference)]
    if None in sides[0] + sides[1]:
        return False
    (al, ar), (rl, rr) = sides
    ratios = []
    for point in _points([al, ar, rl, rr]):
        try:
            differences = [
                _cleaned(*(x - y for x, y in zip(_precise(left, point), _precise(right, point))))
                for left, right in ((al, ar), (rl, rr))
            ]
        except _CannotEvaluate:
            continue
        if not point or 0 in differences:
            return False
        ratios.append((differences[0] / differences[1]).evalf(_DIGITS[1]))
    signed = all(ratio.is_positive for ratio in ratios) if answer.mark in ("<", r"\le") else True
    return len(ratios) > 1 and signed and all(_close(ratio, ratios[0], False) for ratio in ratios[1:])


def _precise(tree: sympy.Expr, point: dict) -> tuple[sympy.Expr, sympy.Expr]:
    return tuple(_value(tree, point, digits) for digits in _DIGITS)


def _cleaned(rough: sympy.Expr, fine: sympy.Expr) -> sympy.Expr:
    """The finer of two values of one tree; 0 if it was nothing but rounding, which shrinks with the precision."""
    if fine.is_Rational:
        return fine
    return sympy.Integer(0) if _log2(fine) < _log2(rough) - 60 else fine


def _close(a: sympy.Expr, r: sympy.Expr, decimal: bool) -> bool:
    gap = (a - r).evalf(_DIGITS[1])
    if gap == 0:
        return True
    if _log2(gap) < max(_log2(a), _log2(r)) - 130:
        return True
    return decimal and _log2(gap * TOLERANCE) <= min(0.0, _log2(r)) + 1e-9


def _log2(x: sympy.Expr) -> float:
    size = sympy.Abs(x).evalf(15)
    return float(sympy.log(size).evalf(15)) / math.log(2) if size != 0 else -math.inf


def _value(node: sympy.Basic, point: dict, digits: int) -> sympy.Expr:
    """The number that a tree is at a point: a Rational where that is exact, else real or complex of `digits` digits."""
    if node.is_Symbol:
        return sympy.I if node.name == "i" else point[node]
    if node.is_Rational:
        return node
    if node.is_NumberSymbol or node is sympy.I:
        return node.evalf(digits)
    if isinstance(node, sympy.Derivative):
        return _unknown_function("derivative", [_value(arg, point, digits) for arg in (node.expr, *node.variables)])
    return _finite(_apply(node, [_value(arg, point, digits) for arg in node.args], digits), digits)


def _finite(value: sympy.Expr, digits: int) -> sympy.Expr:
    if not value.is_Rational:
        value = value.evalf(digits)
    if not value.is_number or value.has(sympy.zoo, sympy.nan, sympy.oo, -sympy.oo):
        raise _CannotEvaluate
    return value


def _apply(node: sympy.Basic, values: list[sympy.Expr], digits: int) -> sympy.Expr:
    if isinstance(node, sympy.Pow):
        return _power(*values, digits)
    if isinstance(node, sympy.exp):
        return _power(sympy.E.evalf(digits), *values, digits)
    if isinstance(node, sympy.log) and len(values) == 2:
        return sympy.log(values[0]).evalf(digits) / sympy.log(values[1]).evalf(digits)
    if isinstance(node, sympy.factorial | sympy.binomial):
        return _combinatorial(node.func, values)
    if isinstance(node, sympy.floor | sympy.ceiling):
        return _rounded(node.func, values[0])
    if isinstance(node, AppliedUndef):
        return _unknown_function(node.func.__name__, values)
    if node.func not in _FUNCTIONS or (node.is_Function and _log2(values[0]) > 400):
        raise _CannotEvaluate
    return node.func(*values)


def _power(base: sympy.Expr, exponent: sympy.Expr, digits: int) -> sympy.Expr:
    """Roots of odd degree of negative numbers are real."""
    if base == 0 and not exponent.is_positive:
        raise _CannotEvaluate
    if base != 0 and exponent != 0 and _log2(exponent) + math.log2(max(1.0, abs(_log2(base)))) > math.log2(_MAX_LOG2):
        raise _CannotEvaluate
    if exponent.is_Rational and exponent.q % 2 == 1 and exponent.q > 1 and base.is_negative:
        return (-1) ** exponent.p * ((-base) ** exponent).evalf(digits)
    # An exact power of rationals may take a root of a number of millions of digits.
    if not exponent.is_Integer:
        return base.evalf(digits) ** exponent.evalf(digits)
    return base**exponent if abs(exponent) <= 64 else base.evalf(digits) ** exponent


def _combinatorial(function: type, values: list[sympy.Expr]) -> sympy.Expr:
    if any(_log2(value) > math.log2(_MAX_FACTORIAL) for value in values):
        raise _CannotEvaluate
    if all(value.is_Integer for value in values):
        return function(*values)
    if function is sympy.factorial:
        return sympy.gamma(values[0] + 1)
    n, k = values
    return sympy.gamma(n + 1) / (sympy.gamma(k + 1) * sympy.gamma(n - k + 1))


def _rounded(function: type, value: sympy.Expr) -> sympy.Expr:
    if not value.is_real or _log2(value) > 400:
        raise _CannotEvaluate
    nearest = sympy.floor(value + sympy.Rational(1, 2))
    return nearest if _log2(value - nearest) < -100 else function(value)


def _unknown_function(name: str, values: list[sympy.Expr]) -> sympy.Expr:
    """A function that is one in the name and arguments and nothing else: equal trees in f(x) are equal for any f."""
    seed = sympy.Rational(zlib.crc32(name.encode()) % 9973 + 1, 9973)
    return sympy.cos(seed + sum(value * (seed + k) for k, value in enumerate(values))) + 2 + seed
