"""Problems with known answers, read from JSON lists and JSON-lines files; what is broken is told with file and line."""

import dataclasses
import decimal
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tto_jax.tasks.problem import Problem, prompt_id

QUESTION_FIELDS = ("problem", "question")
ANSWER_FIELDS = ("answer",)
_SHOWN = 20  # broken records that an error lists
_LARGEST_EXPONENT = 308  # of a number: what a double holds; 1e999999999 would be a text of a gigabyte
_BLANK = re.compile(r"[ \t\n\r]*")
_UNDECODED = re.compile(r"[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


@dataclasses.dataclass(frozen=True)
class Record:
    """One problem and where it came from."""

    problem: Problem
    file: str  # as it was given
    line: int  # where the record starts, from 1


@dataclasses.dataclass(frozen=True)
class Contents:
    """What was read from some files."""

    files: tuple[str, ...]
    records: tuple[Record, ...]  # in the order of the files
    skipped: tuple[str, ...]  # broken records that were left out, as "FILE:LINE: what is wrong"
    duplicates: int  # records left out because an earlier one has the same question and the same answers

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of ids, questions and answers in order."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps(dataclasses.astuple(record.problem)).encode() + b"\n")
        return digest.hexdigest()[:16]


class _Broken(ValueError):
    """Why one record can't be used."""


class _Unreadable(_Broken):
    """Why one record and everything after it in its file can't be read: there is no next record to go on from."""


class _Number(str):
    """A JSON number as the file spells it, NaN and Infinity included."""


_DECODER = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_Number)


def read_files(
    files: Sequence[str | os.PathLike],
    *,
    question: str | None = None,
    answer: str | None = None,
    answer_after: str | None = None,
    skip_broken: bool = False,
) -> Contents:
    """The problems of JSON lists and JSON-lines files, UTF-8, each entry an object with a question and an answer.

    Questions are kept to the letter. An answer is text, a number, or a list of these, any of which is right. Texts lose
    the blanks around them and nothing else (`025` and `$x$` stay); numbers are written out in decimal digits without
    trailing zeros (142.0 is `142`, 4.5 is `4.5`, 1e-3 is `0.001`); an alternative that repeats another is dropped.

    A question that occurs twice with the same answers (in any order) is kept once; with other answers it is broken.
    Ids are hashes of the questions. Where two questions share a hash, the later one gets another: among 40,000
    questions that happens in one set of six.

    Args:
      files: read in this order.
      question: field of the question; None: whichever of `QUESTION_FIELDS` a file has.
      answer: field of the answer; None: whichever of `ANSWER_FIELDS` a file has.
      answer_after: the answer is what follows the last occurrence of this text, such as `####` after worked solutions.
      skip_broken: leave broken records out. A list that can't be read to its end is an error still: how many records
        are lost is unknown.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: records are broken, a file is empty or lacks the fields, or no record remains. All broken records are
        counted, the first 20 are listed, each with file and line.
    """
    files = tuple(os.fspath(file) for file in files)
    if not files:
        raise ValueError("no files were given: name at least one JSON list or JSON-lines file")
    if answer_after is not None and not answer_after.strip():
        raise ValueError(f"answer_after={answer_after!r} must be some text, such as ####")
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}")
    collection = _Collection()
    for file in files:
        _read_file(file, question, answer, answer_after, collection)
    errors = [(text, lost) for text, lost in collection.broken if lost or not skip_broken]
    if errors:
        shown = "".join(f"\n  {text}" for text, _ in errors[:_SHOWN])
        more = f"\n  and {len(errors) - _SHOWN:,} more" if len(errors) > _SHOWN else ""
        advice = "" if all(lost for _, lost in errors) else "\nMend them, or leave them out with --skip_broken."
        raise ValueError(f"{len(errors):,} broken record{'s' * (len(errors) > 1)}:{shown}{more}{advice}")
    skipped = tuple(text for text, _ in collection.broken)
    if not collection.records:
        raise ValueError(f"no record remains of {', '.join(files)}: {len(skipped)} are broken, such as\n  {skipped[0]}")
    return Contents(files, tuple(collection.records), skipped, collection.duplicates)


class _Collection:
    """What was read so far, of all files."""

    def __init__(self):
        self.records: list[Record] = []
        self.broken: list[tuple[str, bool]] = []  # what is wrong and where; whether more was lost than one record
        self.duplicates = 0
        self._first: dict[str, Record] = {}  # by question
        self._ids: set[int] = set()

    def add(self, question: str, answers: tuple[str, ...], file: str, line: int) -> None:
        """Raises _Broken if the question is known with other answers."""
        if (first := self._first.get(question)) is not None:
            if set(first.problem.answers) != set(answers):
                raise _Broken(
                    f"the question of {first.file}:{first.line} with other answers: {_short(list(answers))} "
                    f"and there {_short(list(first.problem.answers))}"
                )
            self.duplicates += 1
            return
        record = Record(Problem(self._new_id(question), question, answers), file, line)
        self._first[question] = record
        self.records.append(record)

    def reject(self, file: str, line: int, reason: _Broken) -> None:
        """Keeps the reason for the report."""
        text = f"{file}:{line}: {reason}".encode(errors="backslashreplace").decode()  # can be printed
        self.broken.append((text, isinstance(reason, _Unreadable)))

    def _new_id(self, question: str) -> int:
        while (found := prompt_id(question)) in self._ids:
            question += "\0"  # salt
        self._ids.add(found)
        return found


def _read_file(file: str, question: str | None, answer: str | None, marker: str | None, into: _Collection) -> None:
    """Adds the records of one file."""
    entries = list(_entries(Path(file).read_bytes().decode("utf-8-sig", errors="surrogateescape")))
    objects = [entry for _, entry in entries if isinstance(entry, dict)]
    if objects:
        question = _field(file, "question", question, QUESTION_FIELDS, objects)
        answer = _field(file, "answer", answer, ANSWER_FIELDS, objects)
    for line, entry in entries:
        try:
            if isinstance(entry, _Broken):
                raise entry
            if not isinstance(entry, dict):
                raise _Broken(f"must be an object, got {_kind(entry)}")
            into.add(_question(entry, question), _answers(entry, answer, marker), file, line)
        except _Broken as reason:
            into.reject(file, line, reason)


def _field(file: str, what: str, given: str | None, choices: tuple[str, ...], objects: list[dict]) -> str:
    """The name of a field: the given one, or the only one of `choices` that occurs."""
    found = dict.fromkeys(key for entry in objects for key in entry)
    names = [name for name in ((given,) if given else choices) if name in found]
    if len(names) == 1:
        return names[0]
    wanted = f"no field {given!r}" if given else f"{'several' if names else 'none'} of the fields {', '.join(choices)}"
    fields = ", ".join(list(found)[:_SHOWN]) or "none"
    raise ValueError(f"{file} has {wanted}; its fields: {fields}. Name the {what}'s field with --{what}=FIELD")


def _entries(text: str) -> Iterator[tuple[int, object]]:
    """(line, JSON value or what is wrong) of every entry of a list, or of every line that is not blank."""
    begin = _BLANK.match(text).end()
    if begin == len(text):
        yield 1, _Unreadable("the file is empty")
    elif text[begin] == "[":
        yield from _list_entries(text, begin)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if not _BLANK.fullmatch(line):
                yield number, _line_entry(line)


def _line_entry(line: str) -> object:
    """The JSON value of a line, or what is wrong with it."""
    if _UNDECODED.search(line):
        return _Broken("not valid UTF-8")
    try:
        return _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return _Broken(f"the line is not one JSON value: {error.msg} (column {error.colno})")
    except RecursionError:
        return _Broken("nested too deeply")


def _list_entries(text: str, begin: int) -> Iterator[tuple[int, object]]:
    """As `_entries`, of the list that starts at `text[begin]`."""
    at = _BLANK.match(text, begin + 1).end()
    line = 1 + text.count("\n", 0, at)
    if text.startswith("]", at):
        yield line, _Unreadable("the list is empty")
        return
    while True:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            yield line, _Unreadable(f"not JSON from here on: {error.msg} ({place}). Is the file cut off?")
            return
        except RecursionError:
            yield line, _Unreadable("nested too deeply")
            return
        yield line, _Broken("not valid UTF-8") if _UNDECODED.search(text, at, end) else value
        after = _BLANK.match(text, end).end()
        line += text.count("\n", at, after)
        if text.startswith("]", after):
            at = _BLANK.match(text, after + 1).end()
            if at < len(text):
                yield line + text.count("\n", after, at), _Unreadable("there is more after the end of the list")
            return
        if not text.startswith(",", after):
            yield line, _Unreadable("a comma or the end of the list must follow. Is the file cut off?")
            return
        at = _BLANK.match(text, after + 1).end()
        line += text.count("\n", after, at)


def _value(entry: dict, field: str) -> object:
    if field not in entry:
        raise _Broken(f"no field {field!r}; its fields: {', '.join(list(entry)[:_SHOWN]) or 'none'}")
    return entry[field]


def _question(entry: dict, field: str) -> str:
    """The question, to the letter."""
    value = _value(entry, field)
    if type(value) is not str:
        raise _Broken(f"{field!r} must be text, got {_kind(value)}")
    if not value.strip():
        raise _Broken(f"{field!r} is empty")
    return _unicode(field, value)


def _answers(entry: dict, field: str, marker: str | None) -> tuple[str, ...]:
    """The alternatives, in their order, each once."""
    value = _value(entry, field)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise _Broken(f"{field!r} is an empty list")
    return tuple(dict.fromkeys(_answer(field, item, marker) for item in items))


def _answer(field: str, value: object, marker: str | None) -> str:
    if isinstance(value, _Number) and marker is None:
        return _digits(field, value)
    if type(value) is not str:
        raise _Broken(f"{field!r} must be text{'' if marker else ', a number, or a list of these'}, got {_kind(value)}")
    if marker is not None:
        _, found, value = value.rpartition(marker)
        if not found:
            raise _Broken(f"{field!r} has no {marker!r} (--answer_after)")
    elif "####" in value:
        raise _Broken(f"{field!r} holds '####', as worked answers do: give --answer_after='####'")
    value = value.strip()
    if not value:
        raise _Broken(f"{field!r} is empty")
    return _unicode(field, value)


def _digits(field: str, number: str) -> str:
    """A number in plain decimal digits: graders know no exponents."""
    try:
        value = decimal.Decimal(number)
    except decimal.InvalidOperation:  # an exponent beyond any bounds
        value = decimal.Decimal("NaN")
    if not value.is_finite() or abs(value.adjusted()) > _LARGEST_EXPONENT or len(number) > 2 * _LARGEST_EXPONENT:
        raise _Broken(f"{field!r} must be a finite number within 1e±{_LARGEST_EXPONENT}, got {_short(number)}")
    if not value:
        return "0"
    digits = format(value, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _unicode(field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Broken(f"{field!r} holds half of a surrogate pair, which is no character") from None
    return value


def _kind(value: object) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null", _Number: "a number"}
    return names[type(value)] + ("" if value is None else f": {_short(value)}")


def _short(value: object) -> str:
    text = value if isinstance(value, _Number) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
