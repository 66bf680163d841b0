r"""Units and words after a number: `864 \text{ inches}^{2}`, `5 cm`, `90^{\circ}`, `\$18.90`, `240 \text{ ways}`."""

import re

_NAMES = {
    "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "km": "km kilometer kilometre",
    "m": "m meter metre", "in": "inch inche in", "ft": "foot feet ft", "yd": "yard yd", "mi": "mile mi",
    "deg": "degree deg", "rad": "radian rad", "s": "second sec", "min": "minute min", "h": "hour hr h", "d": "day",
    "week": "week", "month": "month", "yr": "year yr", "usd": "dollar usd", "cent": "cent", "eur": "euro",
    "lb": "pound lb", "oz": "ounce oz", "g": "gram g", "kg": "kilogram kg", "l": "liter litre l", "ml": "milliliter ml",
    "gal": "gallon gal", "mph": "mph", "km/h": "km/h kmh kph", "m/s": "m/s", "am": "am", "pm": "pm", "hz": "hz",
    "c": "celsius", "f": "fahrenheit", "k": "kelvin", "acre": "acre", "mi/h": "mi/h",
}  # fmt: skip
_UNITS = {name: unit for unit, names in _NAMES.items() for name in names.split()}
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}

_DEGREES = re.compile(r"\s*\^\s*\{\s*\\circ\s*\}\s*(?:\\text\s*\{\s*([CF])\s*\}|([CF]))?\Z")
_OF_AN_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_TEXT = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{\s*(-?[0-9])\s*\})?\Z")
_PLAIN = re.compile(r"(?<=[0-9}%!)])(\s*)([A-Za-z][A-Za-z./ ]*)(?:\^\s*\{\s*([23])\s*\})?\Z")
_NUMBER_ONLY = re.compile(r"[-+0-9.,/\s]*\Z")


def split_unit(text: str) -> tuple[str, str]:
    r"""(`text` without its unit, the unit in one spelling) of a text in normal form; the unit is "" if none is known.

    `\text{...}` after a value is a unit or a description; a description is dropped. Words without `\text` are a unit if
    known and of two letters or more (`6 m` may be a product), a description if of three or more, after a plain number.
    """
    if text.startswith(r"\$"):
        return text[2:].strip(), "usd"
    degrees = _DEGREES.search(text)
    if degrees and degrees.start() and not _OF_AN_ANGLE.search(text):
        return text[: degrees.start()], (degrees.group(1) or degrees.group(2) or "deg").lower()
    if text.endswith("}") and r"\text" in text:
        return _after_value(text)
    if text[-1:].isalpha() or text.endswith("}"):
        plain = _PLAIN.search(text)
        if plain and plain.start() > 0:
            return _plain_words(text, plain)
    return text, ""


def _after_value(text: str) -> tuple[str, str]:
    found = []
    rest = text
    while match := _TEXT.search(rest):
        rest = rest[: match.start()]
        found.append(_unit(match.group(1), match.group(2)))
    if not rest or not found:
        return text, ""
    return rest.rstrip(), found[0] if len(found) == 1 else ""


def _plain_words(text: str, match: re.Match) -> tuple[str, str]:
    value, words = text[: match.start()], match.group(2)
    unit = _unit(words, match.group(3))
    if unit and len(words.strip()) > 1:
        return value, unit
    described = match.group(1) and all(len(word) > 2 for word in words.split()) and _NUMBER_ONLY.match(value)
    return (value, "") if described else (text, "")


def _unit(words: str, power: str | None) -> str:
    """One spelling of a known unit, with its power; "" if unknown."""
    found = ""
    for word in words.lower().replace(".", "").split():
        if word in _POWERS and not power:
            power = _POWERS[word]
            continue
        name = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
        if name is None or found:
            return ""
        found = name
    return found + (power if found and power not in (None, "1") else "")
