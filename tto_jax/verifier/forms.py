r"""The normal form of an answer's text, and its structure: lists, tuples, intervals, sets, unions, matrices, relations.

A normal form writes LaTeX one way: `\frac{a}{b}`, `\cdot`, braces around every exponent and index, no sizing, no
spacing commands, no dollar signs; plain words and Unicode signs of mathematics become LaTeX (`pi/2`, `sqrt(2)`).
"""

import dataclasses
import functools
import re

MAX_CHARS = 2_000  # longer answers are equal to nothing but themselves
MAX_DEPTH = 24  # of brackets; more deeply nested answers likewise


@dataclasses.dataclass(frozen=True)
class Form:
    """A piece of an answer.

    `kind` is "leaf", "list" (unordered), "set", "union", "matrix" (parts are rows, forms of kind "row"), "group"
    (`mark` its brackets) or "relation" (`mark` one of = < \\le \\ne, parts left and right). `text` is in normal form.
    """

    kind: str
    text: str
    mark: str = ""
    parts: tuple["Form", ...] = ()


_CACHED_CHARS = 200  # only short texts are kept in caches

_UNICODE = {
    ord(sign): latex
    for signs, latex in {
        "\u2212\u2013\u2010\u2011": "-", "\u00d7\u00b7\u22c5\u2217": r"\cdot ", "÷": "/", "∞": r"\infty ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "\u222a": r"\cup ", "∈": r"\in ", "°": r"^\circ ", "√": r"\sqrt ", "π": r"\pi ",
        "θ": r"\theta ", "±": r"\pm ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^{2}",
        "³": "^{3}", "\u2019\u2032": "'", "≈": r"\approx ", "\uff05": "%", "\uff08": "(", "\uff09": ")",
        "\n\t\r\u00a0\u2009\u202f": " ",
    }.items()
    for sign in signs
}  # fmt: skip
_COMMANDS = {
    **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac"), r"\frac"),
    **dict.fromkeys((r"\dbinom", r"\tbinom"), r"\binom"),
    **dict.fromkeys((r"\times", r"\ast", "*", r"\cdotp"), r"\cdot "),
    **dict.fromkeys((r"\leq", r"\leqslant", r"\leqq"), r"\le"),
    **dict.fromkeys((r"\geq", r"\geqslant", r"\geqq"), r"\ge"),
    **dict.fromkeys((r"\left", r"\right", r"\big", r"\Big", r"\bigg", r"\Bigg", r"\bigl", r"\bigr", r"\Bigl"), ""),
    **dict.fromkeys((r"\Bigr", r"\displaystyle", r"\textstyle", r"\limits", r"\!", r"\,", r"\;", r"\:", r"\>"), ""),
    **dict.fromkeys((r"\(", r"\)", r"\[", r"\]", "$"), ""),
    **dict.fromkeys((r"\quad", r"\qquad", r"\ ", "~", "\\\n"), " "),
    **dict.fromkeys((r"\mathrm", r"\mbox", r"\textbf", r"\textrm", r"\textit", r"\textnormal", r"\textsf"), r"\text"),
    **dict.fromkeys((r"\hbox", r"\mathbf", r"\mathit", r"\mathsf", r"\texttt", r"\operatorname"), r"\text"),
    **dict.fromkeys((r"\lvert", r"\rvert", r"\vert", r"\mid"), "|"),
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\langle": "(", r"\rangle": ")",
    r"\neq": r"\ne", r"\div": "/", r"\%": "%", "**": "^", r"\degree": r"^{\circ}", r"\dots": r"\ldots", r"\gt": ">",
    r"\lt": "<", r"\phantom": "", r"\emptyset": r"\varnothing",
}  # fmt: skip
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)|\*\*|[*$~]", re.DOTALL)
_GROUPED = re.compile(r"(?<=[0-9])(?:,\s*\\!(?:\s|\\[,!])*|\{,\}\s*|\\,)(?=[0-9]{3}(?![0-9]))")
_TEXT = r"\\text\s*\{[^{}]*\}"
_WORD = re.compile(
    rf"({_TEXT})|(?<![A-Za-z\\])(arc(?:sin|cos|tan)|sqrt|sin|cos|tan|cot|log|ln|exp|pi|theta|infinity|infty|inf|oo)"
    r"(?![A-Za-z])"
)
_PERCENT = re.compile(r"\s*(?:\\text\s*\{\s*(?:percent|%)\s*\}|(?<![A-Za-z\\])percent(?![A-Za-z]))")
_AND = re.compile(r",?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\{])(?:and|or)(?![A-Za-z]))\s*")
_FRAC_FIRST = re.compile(r"\\frac\s*([0-9A-Za-z]|\\[a-z]+(?![a-z{]))\s*")
_FRAC_SECOND = re.compile(r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z]|\\[a-z]+(?![a-z{]))")
_SQRT = re.compile(r"\\sqrt\s*([0-9]+|[A-Za-z]|\\[a-z]+(?![a-z{]))")
_SCRIPT = re.compile(r"([_^])\s*(-?[0-9]+|[A-Za-z]|\\(?:circ|prime|pi|infty|max|min)(?![a-z]))\s*")
_CALL = re.compile(r"(\\sqrt|\\exp|\^)\s*([({])")
_TEXT_IN_INDEX = re.compile(r"_\s*\{\s*(?:\\text\s*\{\s*([A-Za-z0-9]+)\s*\}|\\(max|min))\s*\}")
_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?\Z")
_PRIMES = re.compile(r"\^\s*\{\s*(?:\\prime\s*)+\}")
_ROW_SPACE = re.compile(r"\\\\\s*\[[^][]*\]")
_UNWANTED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_BRACKET = re.compile(r"\\(?:begin|end)\s*\{[a-z]*\*?\}|\\(?:[A-Za-z]+|.)|[][(){}]|[^\\]", re.DOTALL)
_OPENING = {"(": ")]", "[": ")]", "{": "}", r"\{": (r"\}",)}
_CLOSING = {")", "]", "}", r"\}"}
_INFINITE = dict.fromkeys(("infinity", "inf", "oo"), "infty")
_DIGIT_WORDS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}


def tokens(text: str) -> list[str]:
    r"""LaTeX commands (`\begin{name}` whole), escaped characters and single characters; joined, they are the text."""
    return _BRACKET.findall(text)


def depths(pieces: list[str]) -> list[int] | None:
    """How many brackets each token is inside of; an opening and its closing one count as outside. None: unbalanced."""
    found, stack = [], []
    for piece in pieces:
        if piece in _OPENING or piece.startswith(r"\begin"):
            found.append(len(stack))
            stack.append(_OPENING.get(piece) or (piece.replace(r"\begin", r"\end", 1),))
            continue
        if (piece in _CLOSING or piece.startswith(r"\end")) and (not stack or piece not in stack.pop()):
            return None
        found.append(len(stack))
    return None if stack else found


def normal_form(text: str) -> str:
    """The normal form of a text, with its spaces; hostile texts are only stripped."""
    text = text.strip()
    if hostile(text):
        return text
    return _normal_form(text) if len(text) <= _CACHED_CHARS else _normal_form.__wrapped__(text)


@functools.lru_cache(maxsize=16_384)
def _normal_form(text: str) -> str:
    if _DECIMAL.match(text):
        return text
    text = " ".join(text.translate(_UNICODE).split())
    text = _GROUPED.sub("", text)
    text = _ROW_SPACE.sub(r"\\\\", text) if r"\\" in text else text
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m.group(), m.group()), text)
    if "ercent" in text:
        text = _PERCENT.sub("%", text)
    if "and" in text or "or" in text:
        text = _AND.sub(", ", text)
    text = _WORD.sub(lambda m: m.group(1) or "\\" + _INFINITE.get(m.group(2), m.group(2)), text)
    text = _calls(text) if "(" in text or r"\exp" in text else text
    text = _FRAC_FIRST.sub(r"\\frac{\1}", text)
    text = _FRAC_SECOND.sub(r"\1{\2}", text)
    text = _SQRT.sub(r"\\sqrt{\1}", text)
    text = _SCRIPT.sub(r"\1{\2}", text)
    text = _TEXT_IN_INDEX.sub(_index, text)
    text = _PRIMES.sub(lambda m: "'" * m.group().count("prime"), text)
    text = " ".join(text.split()).rstrip(" .,;:")
    return text.removeprefix("+").strip()


def _index(match: re.Match) -> str:
    word = match.group(1) or match.group(2)
    return "_{" + _DIGIT_WORDS.get(word, word) + "}"


def _calls(text: str) -> str:
    r"""`\sqrt(x)` as `\sqrt{x}`, `^(x)` as `^{x}`, `\exp(x)` as `e^{x}`. Unbalanced text stays as it is."""
    if not _CALL.search(text):
        return text
    pieces = tokens(text)
    levels = depths(pieces)
    if levels is None:
        return text
    waiting, previous = {}, ""
    for i, piece in enumerate(pieces):
        if piece == "(" and previous in (r"\sqrt", r"\exp", "^"):
            pieces[i] = "{"
            waiting[levels[i]] = True
        elif piece == ")" and waiting.pop(levels[i], False):
            pieces[i] = "}"
        elif piece == "(":
            waiting.pop(levels[i], None)
        previous = piece if piece != " " else previous
    return re.sub(r"\\exp\s*\{", "e^{", "".join(pieces))


def squeeze(text: str) -> str:
    r"""The normal form without `\text` and without spaces that mean nothing: equal keys are equal answers."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    if " " not in text:
        return text
    text = re.sub(r"(?<=[0-9]) +(?=[0-9])", "\x01", text)
    text = re.sub(r"(\\[A-Za-z]+) +(?=[A-Za-z])", "\\1\x01", text)
    return text.replace(" ", "").replace("\x01", " ")


def hostile(text: str, max_depth: int = MAX_DEPTH) -> bool:
    """Whether a text is beyond what is looked into: too long, control or direction characters, too deeply nested."""
    if len(text) > MAX_CHARS or _UNWANTED.search(text):
        return True
    level = deepest = 0
    for c in text:
        if c in "([{":
            level += 1
            deepest = max(deepest, level)
        elif c in ")]}":
            level -= 1
    return deepest > max_depth or text.count("^") + text.count("!") + text.count("\\frac") > 200


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Pieces of a text between separators (tokens) that are in no brackets; odd places hold the separators."""
    pieces = tokens(text)
    levels = depths(pieces)
    found = [[]]
    for piece, level in zip(pieces, levels or ()):
        if level == 0 and piece in separators:
            found += [[piece], []]
        else:
            found[-1].append(piece)
    return ["".join(part).strip() for part in found] if levels is not None else [text]


_NAME = re.compile(
    r"(?:\((?:[A-Za-z]|\\theta)(?:_\{\w+\})?(?:\s*,\s*[A-Za-z](?:_\{\w+\})?)*\)"
    r"|(?:\\(?:angle|triangle|overline|text|vec|dot|ddot|hat|bar|max|min|ell|alpha|beta|gamma|delta|theta|lambda|mu|phi"
    r"|omega|Delta)(?![a-z])|[A-Za-z'])(?:[\sA-Za-z']|\\theta|\{[\w\s]*\}|_\{[^{}]*\}|\([\w\s,]*\))*)\Z"
)
_RELATIONS = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
_CLOSED = (r"\le", r"\ge")
_FLIP = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


def has_thousands(text: str) -> bool:
    """Whether a text holds something that can be one number with separators or a list of numbers."""
    return bool(_THOUSANDS.search(text))


_STRUCTURED = re.compile(r"[,;=<>\[({]|\\(?:in|cup|pm|le|ge|ne|approx)")
_TEXT_LIST = re.compile(r"\\text\s*\{([^{}]*[,;][^{}]*)\}\Z")


@functools.lru_cache(maxsize=4_096)
def read(text: str, thousands: bool = True) -> Form:
    """The structure of a text in normal form, a leaf if it has none. With `thousands`, 1,000 is no list."""
    words = _TEXT_LIST.match(text)
    if words:
        text = words.group(1)
    if thousands and "," in text and not any(bracket in text for bracket in ("(", "[", r"\{")):
        text = _THOUSANDS.sub(lambda m: m.group().replace(",", ""), text)
    return _read(text)


def _read(text: str) -> Form:
    text = _unwrap(text)
    if not _STRUCTURED.search(text):
        return Form("leaf", text)
    parts = [part for part in split(text, (",", ";"))[::2] if part]
    if len(parts) > 1:
        return Form("list", text, parts=_elements(parts))
    both = _plus_minus(text)
    if len(both) == 2:
        return Form("list", text, parts=tuple(map(_read, both)))
    relation = _relation(text)
    if relation:
        return relation
    if r"\cup" in text:
        parts = split(text, (r"\cup",))[::2]
        if len(parts) > 1:
            return Form("union", text, parts=tuple(map(_read, parts)))
    if text.startswith(r"\begin") or text.startswith(r"(\begin"):
        return _matrix(text)
    return _group(text)


def _unwrap(text: str) -> str:
    """Takes away braces around the whole text."""
    while text.startswith("{") and text.endswith("}"):
        levels = depths(tokens(text))
        if levels is None or 0 in levels[1:-1]:
            break
        text = text[1:-1].strip()
    return text


def _plus_minus(text: str) -> list[str]:
    r"""`a \pm b` as two texts, with one `\pm` outside brackets; any other text as one."""
    pieces = split(text, (r"\pm",)) if r"\pm" in text else []
    if len(pieces) != 3:
        return [text]
    first, _, last = pieces
    return [f"{first} + {last}" if first and first[-1] not in "=," else f"{first} {last}".strip(), f"{first} - {last}"]


def _elements(parts: list[str]) -> tuple[Form, ...]:
    return tuple(_read(one) for part in parts for one in _plus_minus(part))


def _group(text: str) -> Form:
    pieces = tokens(text)
    opening, closing = pieces[0], pieces[-1]
    if opening not in ("(", "[", r"\{") or closing not in _OPENING[opening]:
        return Form("leaf", text)
    levels = depths(pieces)
    if levels is None or 0 in levels[1:-1]:
        return Form("leaf", text)
    inner = "".join(pieces[1:-1]).strip()
    parts = split(inner, (",", ";"))[::2]
    if opening == r"\{":
        return Form("set", text, parts=_elements([part for part in parts if part]))
    if len(parts) == 1:
        return _read(inner) if inner and opening + closing == "()" else Form("leaf", text)
    return Form("group", text, opening + closing, tuple(map(_read, parts)))


def _matrix(text: str) -> Form:
    body = re.fullmatch(r"\(?\\begin\s*\{([bp]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}\)?", text)
    if not body:
        return Form("leaf", text)
    rows = [row for row in split(body.group(2).strip(), (r"\\",))[::2] if row]
    forms = tuple(Form("row", row, parts=tuple(_read(cell) for cell in split(row, ("&",))[::2])) for row in rows)
    return Form("matrix", text, parts=forms)


def is_name(text: str) -> bool:
    """Whether a text can stand on the left of `name = value`: a symbol, f(x), a tuple of symbols, an angle..."""
    return bool(_NAME.match(text)) and text not in ("e", "i")


def _relation(text: str) -> Form | None:
    r"""A relation; `name > value` and `low < name \le high` are read as `name = interval`, `a = b = c` as `a = c`."""
    if not any(sign in text for sign in _RELATIONS) and r"\approx" not in text:
        return None
    approximate = split(text, (r"\approx",))
    if len(approximate) > 1:
        exact, last = approximate[0], approximate[-1]
        if not exact or is_name(exact):
            return Form("relation", text, "=", (Form("leaf", exact or "x"), _read(last)))
        return Form("approximate", text, parts=(_read(exact), _read(last)))
    chain = split(text, _RELATIONS)
    if len(chain) < 3 or not all(chain[::2]):
        return None
    sides, signs = chain[::2], [r"=" if sign == r"\in" else sign for sign in chain[1::2]]
    if set(signs) == {"="}:
        left, right = sides[0], sides[-1]
        if is_name(right) and not is_name(left):
            left, right = right, left
        return Form("relation", text, "=", (Form("leaf", left), _read(right)))
    if len(sides) == 2 and signs[0] in _FLIP:
        left, right, sign = sides[0], sides[1], signs[0]
        if is_name(right) and not is_name(left):
            left, right, sign = right, left, _FLIP[sign]
        if is_name(left):
            return _interval(text, left, right, sign)
        if sign in (">", r"\ge"):
            left, right, sign = right, left, _FLIP[sign]
        return Form("relation", text, sign, (Form("leaf", left), Form("leaf", right)))
    if len(sides) == 3 and is_name(sides[1]) and (set(signs) <= {"<", r"\le"} or set(signs) <= {">", r"\ge"}):
        low, high, lower, upper = sides[0], sides[2], signs[0], signs[1]
        if lower in (">", r"\ge"):
            low, high, lower, upper = high, low, upper, lower
        brackets = ("[" if lower in _CLOSED else "(") + ("]" if upper in _CLOSED else ")")
        return _bounded(text, sides[1], low, high, brackets)
    return Form("relation", text, signs[0], tuple(Form("leaf", side) for side in sides)) if len(sides) == 2 else None


def _interval(text: str, name: str, bound: str, sign: str) -> Form:
    closed = sign in _CLOSED
    if sign in (">", r"\ge"):
        return _bounded(text, name, bound, r"\infty", ("[" if closed else "(") + ")")
    return _bounded(text, name, r"-\infty", bound, "(" + ("]" if closed else ")"))


def _bounded(text: str, name: str, low: str, high: str, brackets: str) -> Form:
    span = Form("group", f"{brackets[0]}{low},{high}{brackets[1]}", brackets, (_read(low), _read(high)))
    return Form("relation", text, "=", (Form("leaf", name), span))
