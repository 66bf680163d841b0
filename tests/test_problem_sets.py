"""Reading and storing sets of problems. Oracles: `json` and `fractions` on the same texts."""

import collections
import fractions
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tto_jax import problem_sets
from tto_jax.problem_files import read_files
from tto_jax.problem_sets import open_set, write_set
from tto_jax.tasks.problem import prompt_id

REAL = {  # file: problems, records left out
    "deepscaler/test/aime.json": (30, 0),
    "deepscaler/test/amc.json": (83, 0),
    "deepscaler/test/math.json": (500, 0),
    "deepscaler/test/minerva.json": (272, 0),
    "deepscaler/test/olympiad_bench.json": (675, 0),
    "deepscaler/train/aime.json": (975, 0),
    "deepscaler/train/math.json": (7470, 4),  # two answers are null, two are empty
    "gsm8k/test.jsonl": (1319, 0),
    "gsm8k/train.jsonl": (7473, 0),
}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines_of(entries: list[str]) -> str:
    """JSON lines of entries that are JSON already."""
    return "".join(entry + "\n" for entry in entries)


def list_of(entries: list[str]) -> str:
    """A JSON list, each entry on a line of its own from line 2 on."""
    return "[\n" + ",\n".join(entries) + "\n]\n"


def good(n: int) -> str:
    return json.dumps({"problem": f"What is {n} + {n}?", "answer": str(2 * n)})


def answers_of(tmp_path, answer: str, **options) -> tuple[str, ...]:
    """Of a file with one record whose answer is this JSON text."""
    path = write(tmp_path / "one.jsonl", '{"problem": "q", "answer": ' + answer + "}")
    return read_files([path], **options).records[0].problem.answers


# Real files


def test_no_real_file_is_left_out(real_data):
    found = {
        str(p.relative_to(real_data)) for sub in ("deepscaler", "gsm8k") for p in (real_data / sub).rglob("*.json*")
    }
    assert found == set(REAL)


def expected_answers(answer) -> list[str]:
    if isinstance(answer, float):
        assert answer == int(answer)
        return [str(int(answer))]
    if isinstance(answer, list):
        return list(collections.OrderedDict.fromkeys(text.strip() for text in answer))
    worked = re.search(r"\n#### (.*)$", answer)
    return [worked[1] if worked else answer.strip()]


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_file(real_data, tmp_path, name):
    path = real_data / name
    text = path.read_text(encoding="utf-8")
    raw = json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.splitlines()]
    raw = [entry for entry in raw if entry["answer"] not in (None, "")]
    options = {"answer_after": "####"} if "gsm8k" in name else {}
    contents = read_files([path], skip_broken=True, **options)
    found = write_set(contents, tmp_path / "set")

    count, skipped = REAL[name]
    assert len(found) == len(raw) == count and len(contents.skipped) == skipped and contents.duplicates == 0
    problems = list(found)
    question = "question" if "gsm8k" in name else "problem"
    assert [p.prompt for p in problems] == [entry[question] for entry in raw]
    assert [list(p.answers) for p in problems] == [expected_answers(entry["answer"]) for entry in raw]
    assert len({p.id for p in problems}) == count and all(0 <= p.id < 2**32 for p in problems)
    assert sum(p.id != prompt_id(p.prompt) for p in problems) == 0
    # A record is where the set says it is.
    source = text.split("\n")
    for index in np.random.default_rng(0).integers(0, count, 20).tolist():
        file, _, line = found.where(index).rpartition(":")
        rest = "\n".join(source[int(line) - 1 :])
        assert file == str(path) and source[int(line) - 1].lstrip().startswith("{")
        assert json.JSONDecoder().raw_decode(rest, rest.index("{"))[0] == raw[index]


def test_real_answers(real_data):
    """What the formats of the evaluation sets come to."""

    def answers(name):
        return [r.problem.answers for r in read_files([real_data / "deepscaler" / "test" / name]).records]

    assert answers("aime.json")[1] == ("025",)
    assert answers("amc.json")[:2] == [("142",), ("144",)]
    minerva = answers("minerva.json")
    assert minerva[0] == ("9.6",) and ("0.01", "0.02") in minerva
    assert ("7.5 \\times 10^7",) in minerva  # two alternatives that differ in a trailing newline
    assert answers("olympiad_bench.json")[1] == ("$\\frac{1}{2 n+2}$",)


def test_real_training_sets_together(real_data):
    """Problems of AIME that MATH has as well are kept once; no two of them disagree."""
    files = [real_data / "deepscaler" / "train" / name for name in ("aime.json", "math.json")]
    contents = read_files(files, skip_broken=True)
    assert (len(contents.records), contents.duplicates, len(contents.skipped)) == (975 + 7470 - 18, 18, 4)


def test_broken_real_records_are_errors(real_data):
    path = real_data / "deepscaler" / "train" / "math.json"
    with pytest.raises(ValueError, match=r"4 broken records:(.|\n)*math\.json:5318: 'answer'.*null"):
        read_files([path])
    with pytest.raises(ValueError, match=r"1,319 broken records:(.|\n)*test\.jsonl:1: .*--answer_after='####'"):
        read_files([real_data / "gsm8k" / "test.jsonl"])


# Answers and questions


NUMBERS = ("142.0", "4.5", "2.50", "100", "0", "-0.0", "1e33", "1.5E+3", "1E-3", "-7", "0.30000000000000004", "1e308")


@pytest.mark.parametrize("number", [*NUMBERS, "12345678901234567890123", "1234567890123456789012345678901234.5"])
def test_numbers_are_written_in_digits(tmp_path, number):
    (text,) = answers_of(tmp_path, number)
    assert re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*[1-9])?", text) and fractions.Fraction(text) == fractions.Fraction(number)
    assert text != "-0"


def test_texts_of_answers(tmp_path):
    assert answers_of(tmp_path, '"025"') == ("025",)
    assert answers_of(tmp_path, r'" \t$\\frac{1}{2}$\n\n"') == ("$\\frac{1}{2}$",)
    assert answers_of(tmp_path, r'["0.10\n", 0.10, "0.1", 7, "7"]') == ("0.10", "0.1", "7")
    assert answers_of(tmp_path, r'"so 1,000 + 1 #### 3\n#### 1,001 \n"', answer_after="####") == ("1,001",)
    assert answers_of(tmp_path, '["x => 1", "y => 2"]', answer_after="=>") == ("1", "2")


@pytest.mark.parametrize("form", [lines_of, list_of])
def test_every_text_comes_back_to_the_letter(tmp_path, form):
    rng = np.random.default_rng(3)
    alphabet = [*"ab \t\n\r\\\"'$\0/[]{},:", "é", "\u2028", "\u0085", "\ufeff", "\U0001f600", "\x7f"]
    texts = {"q" + "".join(rng.choice(alphabet, size=size)) for size in rng.integers(0, 60, 200)}
    entries = [{"question": text, "answer": [text, "z" + text]} for text in texts]
    ascii_only = rng.random(len(entries)) < 0.5
    path = write(tmp_path / "f", form([json.dumps(e, ensure_ascii=bool(a)) for e, a in zip(entries, ascii_only)]))
    found = write_set(read_files([path]), tmp_path / "set")
    assert [p.prompt for p in found] == [e["question"] for e in entries]
    assert [p.answers for p in found] == [tuple(dict.fromkeys(a.strip() for a in e["answer"])) for e in entries]


def test_both_formats_say_the_same(tmp_path):
    entries = [good(n) for n in range(5)]
    spread = json.dumps([json.loads(entry) for entry in entries], indent=2)
    forms = [
        lines_of(entries),
        "\ufeff" + lines_of(entries),
        list_of(entries),
        spread,
        json.dumps(list(map(json.loads, entries))),
    ]
    forms += [lines_of(entries).replace("\n", "\r\n"), "\n \n" + lines_of(entries) + "\n", lines_of(entries)[:-1]]
    contents = [read_files([write(tmp_path / f"{i}", form)]) for i, form in enumerate(forms)]
    for other in contents[1:]:
        assert [r.problem for r in other.records] == [r.problem for r in contents[0].records]
        assert other.fingerprint() == contents[0].fingerprint()
    lines = [[record.line for record in c.records] for c in contents]
    assert lines == [[1, 2, 3, 4, 5]] * 2 + [[2, 3, 4, 5, 6], [2, 6, 10, 14, 18], [1] * 5] + [
        *([1, 2, 3, 4, 5], [3, 4, 5, 6, 7], [1, 2, 3, 4, 5])
    ]


# Broken records and files


BROKEN = {
    "no question": ('{"answer": "1"}', "no field 'problem'; its fields: answer"),
    "no answer": ('{"problem": "q", "solution": "1"}', "no field 'answer'; its fields: problem, solution"),
    "question is a number": ('{"problem": 5, "answer": "1"}', "'problem' must be text, got a number: 5"),
    "question is null": ('{"problem": null, "answer": "1"}', "'problem' must be text, got null"),
    "question is blank": (r'{"problem": " \n", "answer": "1"}', "'problem' is empty"),
    "answer is null": ('{"problem": "q", "answer": null}', "'answer' must be text, a number, .* got null"),
    "answer is blank": (r'{"problem": "q", "answer": "\n"}', "'answer' is empty"),
    "answer is an object": ('{"problem": "q", "answer": {"a": 1}}', "'answer' must be text.* got an object"),
    "answer is a boolean": ('{"problem": "q", "answer": true}', "'answer' must be text.* got a boolean: true"),
    "answers in lists": ('{"problem": "q", "answer": [["1"]]}', "'answer' must be text.* got a list"),
    "one answer is null": ('{"problem": "q", "answer": ["1", null]}', "'answer' must be text.* got null"),
    "one answer is blank": ('{"problem": "q", "answer": ["1", ""]}', "'answer' is empty"),
    "no answers": ('{"problem": "q", "answer": []}', "'answer' is an empty list"),
    "answer is not a number": ('{"problem": "q", "answer": NaN}', "'answer' must be a finite number.* got NaN"),
    "answer is infinite": ('{"problem": "q", "answer": -Infinity}', "'answer' must be a finite number.* got -Infinity"),
    "answer is too large": (
        '{"problem": "q", "answer": 1e999999999}',
        "'answer' must be a finite number.* 1e999999999",
    ),
    "exponent is too large": ('{"problem": "q", "answer": 1e-%s}' % ("9" * 30), "'answer' must be a finite.* 1e-9+$"),
    "answer is endless": ('{"problem": "q", "answer": ' + "9" * 10_000 + "}", r"'answer' must be a finite.* 9+\.\.\.$"),
    "answer is worked": ('{"problem": "q", "answer": "1 #### 1"}', "'answer' holds '####'.*--answer_after='####'"),
    "not an object": ('["q", "1"]', "must be an object, got a list"),
    "a text": ('"q"', 'must be an object, got text: "q"'),
    "half a character": (r'{"problem": "\ud83d", "answer": "1"}', "'problem' holds half of a surrogate pair"),
    "half a character in a field": (r'{"\ud83d": "q"}', r"no field 'problem'; its fields: \\ud83d$"),
    "invalid UTF-8": (b'{"problem": "q\xe9", "answer": "1"}', "not valid UTF-8"),
    "invalid UTF-8 elsewhere": (b'{"problem": "q", "answer": "1", "by": "\xff"}', "not valid UTF-8"),
    "another answer": (
        '{"problem": "What is 1 + 1?", "answer": "3"}',
        r'the question of .*:\d+ with .*\["3"\].*\["2"\]$',
    ),
}


@pytest.mark.parametrize("form", [lines_of, list_of])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_record(tmp_path, form, case):
    entry, said = BROKEN[case]
    entry = entry if isinstance(entry, str) else entry.decode("latin-1")  # every byte stays itself
    path = write(tmp_path / "file", form([good(1), good(2), entry, good(3)]).encode("latin-1"))
    line = 3 if form is lines_of else 4
    with pytest.raises(ValueError, match=r"^1 broken record:\n") as error:
        read_files([path])
    sentence = str(error.value).split("\n")[1]
    assert sentence.startswith(f"  {path}:{line}: ") and re.search(said, sentence), sentence
    contents = read_files([path], skip_broken=True)
    assert [r.problem.answers for r in contents.records] == [("2",), ("4",), ("6",)]
    assert contents.skipped == (sentence.strip(),)


@pytest.mark.parametrize(
    "text", ['{"problem": "q", "answer": 01}', '{"problem": "q"', "q", '{"a": 1} {"b": 2}', "[" * 100_000]
)
def test_broken_line(tmp_path, text):
    path = write(tmp_path / "file", lines_of([good(1), text, good(2)]))
    with pytest.raises(ValueError, match=f"{path}:2: (the line is not one JSON value|nested too deeply)"):
        read_files([path])
    assert [r.line for r in read_files([path], skip_broken=True).records] == [1, 3]


def test_many_broken_records_are_counted(tmp_path):
    first = write(tmp_path / "first", lines_of([good(1)] + ["{}"] * 13))
    second = write(tmp_path / "second", list_of(["null"] * 12 + [good(2)]))
    with pytest.raises(ValueError) as error:
        read_files([first, second])
    text = str(error.value).split("\n")
    assert text[0] == "25 broken records:" and text[-2:-1] == ["  and 5 more"] and "--skip_broken" in text[-1]
    places = [line.split(": ")[0].strip() for line in text[1:-2]]
    assert places == [f"{first}:{n}" for n in range(2, 15)] + [f"{second}:{n}" for n in range(2, 9)]
    assert len(read_files([first, second], skip_broken=True).skipped) == 25


def test_a_list_that_is_cut_off_is_an_error_wherever_it_is(tmp_path):
    """Even where broken records are skipped: how many were lost is unknown."""
    text = list_of([json.dumps({"problem": f"é\n{n}", "answer": [n, "x"]}, ensure_ascii=False) for n in range(3)])
    data = text.rstrip().encode()
    path = tmp_path / "file"
    for size in range(len(data)):
        write(path, data[:size])
        with pytest.raises(ValueError) as error:
            read_files([path], skip_broken=True)
        line = int(re.search(rf"{path}:(\d+): ", str(error.value))[1])
        assert 1 <= line <= 1 + data[:size].count(b"\n")
    assert len(read_files([write(path, data)]).records) == 3


def test_lines_that_are_cut_off(tmp_path):
    whole = lines_of([good(1), good(2)])
    last = len(good(1)) + 1
    for size in range(last + 1, len(whole) - 1):
        path = write(tmp_path / "file", whole[:size])
        with pytest.raises(ValueError, match=f"{path}:2: the line is not one JSON value"):
            read_files([path])
        assert len(read_files([path], skip_broken=True).records) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r":1: the file is empty"),
        (" \n\n", r":1: the file is empty"),
        ("\n[ \n]", r":3: the list is empty"),
        (list_of([good(1)]) + "\n[]", r":5: there is more after the end of the list"),
        (list_of([good(1), good(2)]).replace(",\n", "\n"), r":3: a comma or the end of the list must follow"),
        (list_of([good(1), ""]), r":4: not JSON from here on"),
        (list_of([good(1), '{"problem": "a\nb"}']), r":3: not JSON from here on.*line 3"),
        (list_of([good(1), "[" * 100_000]), r":3: nested too deeply"),
    ],
)
def test_unreadable_file(tmp_path, text, said):
    path = write(tmp_path / "file", text)
    for skip in (False, True):
        with pytest.raises(ValueError, match=f"{path}{said}"):
            read_files([path], skip_broken=skip)


def test_files_that_cannot_be_named(tmp_path):
    path = write(tmp_path / "file", good(1))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_files([path, tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_files([tmp_path])
    with pytest.raises(ValueError, match="no files"):
        read_files([])
    with pytest.raises(ValueError, match="answer_after=' '"):
        read_files([path], answer_after=" ")
    with pytest.raises(ValueError, match="no record remains"):
        read_files([write(path, '{"problem": "", "answer": "1"}')], skip_broken=True)


# Fields, duplicates, ids


def test_fields(tmp_path):
    a = write(tmp_path / "a", '{"problem": "1", "answer": "x"}')
    b = write(tmp_path / "b", '{"question": "2", "answer": "y", "text": "t"}')
    both = write(tmp_path / "both", '{"question": "3", "problem": "4", "answer": "z"}')
    neither = write(tmp_path / "neither", '{"prompt": "5", "label": "w"}')
    assert [r.problem.prompt for r in read_files([a, b]).records] == ["1", "2"]  # each file's own
    with pytest.raises(ValueError, match=r"both has several of the fields problem, question; its fields: question, "):
        read_files([both])
    assert read_files([both], question="question").records[0].problem.prompt == "3"
    with pytest.raises(ValueError, match=r"neither has none of .*its fields: prompt, label\. .*--question=FIELD"):
        read_files([neither])
    with pytest.raises(ValueError, match=r"none of the fields answer; .*--answer=FIELD"):
        read_files([neither], question="prompt")
    assert read_files([neither], question="prompt", answer="label").records[0].problem.answers == ("w",)
    with pytest.raises(ValueError, match=r"b has no field 'problem'; its fields: question, answer, text"):
        read_files([b], question="problem")


def test_answer_after_must_occur(tmp_path):
    path = write(tmp_path / "file", '{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": 2}')
    with pytest.raises(
        ValueError, match=r"file:1: 'answer' has no '####'(.|\n)*file:2: 'answer' must be text, got a number"
    ):
        read_files([path], answer_after="####")


def test_duplicates(tmp_path):
    first = write(tmp_path / "a", lines_of(['{"problem": "p", "answer": ["1", "2"]}', good(1)]))
    second = write(tmp_path / "b", '{"problem": "p", "answer": ["2", 1]}\n{"problem": "p ", "answer": "9"}')
    contents = read_files([first, second])
    assert contents.duplicates == 1
    assert [r.problem.prompt for r in contents.records] == ["p", "What is 1 + 1?", "p "]
    third = write(tmp_path / "c", '{"problem": "p", "answer": ["1"]}')
    with pytest.raises(
        ValueError, match=r"c:1: the question of .*a:1 with other answers: \[\"1\"\] and there \[\"1\", \"2\"\]"
    ):
        read_files([first, third])
    assert read_files([first, third], skip_broken=True).records[0].problem.answers == ("1", "2")


def test_ids_that_collide_are_told_apart(tmp_path):
    seen = {}
    for n in range(2**20):  # a collision is expected within some 80,000
        other = seen.setdefault(prompt_id(f"q{n}"), n)
        if other != n:
            break
    pair = [f"q{other}", f"q{n}"]
    assert prompt_id(pair[0]) == prompt_id(pair[1])
    for order in (pair, pair[::-1]):
        path = write(tmp_path / "file", lines_of([json.dumps({"problem": text, "answer": "1"}) for text in order]))
        ids = [r.problem.id for r in read_files([path]).records]
        assert ids[0] == prompt_id(order[0]) != ids[1] and 0 <= ids[1] < 2**32
        assert ids == [r.problem.id for r in read_files([path]).records]


# Stored sets


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source"
    return read_files([write(path, lines_of([good(n) for n in range(1, 6)]))])


@pytest.fixture
def stored(tmp_path, contents):
    return write_set(contents, tmp_path / "sums")


def test_set(stored, contents, tmp_path, monkeypatch):
    problems = [record.problem for record in contents.records]
    assert list(stored) == problems and len(stored) == 5
    assert stored.__getitems__([4, 0, 4]) == [problems[4], problems[0], problems[4]]
    assert type(stored[0].id) is int and type(stored[0].prompt) is str and type(stored[0].answers) is tuple
    for index in (-1, 5):
        with pytest.raises(IndexError, match=r"0\.\.4"):
            stored[index]
    assert (stored.name, stored.path) == ("sums", str(tmp_path / "sums"))
    assert stored.fingerprint == contents.fingerprint() and re.fullmatch("[0-9a-f]{16}", stored.fingerprint)
    again = pickle.loads(pickle.dumps(stored))
    assert again == stored and list(again) == problems
    monkeypatch.chdir(tmp_path)
    assert open_set("sums") == stored
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sums"]


def test_fingerprint_is_of_the_content(tmp_path):
    def fingerprint(*entries):
        return read_files([write(tmp_path / "file", lines_of(list(entries)))]).fingerprint()

    same = fingerprint(good(1), good(2))
    assert same == fingerprint(good(1), good(1), good(2))
    others = [
        fingerprint(good(2), good(1)),
        fingerprint(good(1)),
        fingerprint(good(1), good(2).replace('"4"', '["4", "5"]')),
    ]
    assert len({same, *others}) == 4


def test_an_existing_folder_is_not_lost(tmp_path, contents, stored):
    out = tmp_path / "sums"
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_set(contents, out)
    fewer = read_files([write(tmp_path / "file", good(7))])
    replaced = write_set(fewer, out, name="other", overwrite=True)
    assert len(replaced) == 1 and replaced.name == "other"
    other = tmp_path / "other"
    other.mkdir()
    assert len(write_set(fewer, other)) == 1  # it was empty
    for i, text in enumerate(("", "{}", "[]", '{"name": "mnist"}')):
        folder = tmp_path / f"folder{i}"
        folder.mkdir()
        write(folder / "dataset_info.json", text)
        with pytest.raises(FileExistsError, match="no problem set"):
            write_set(fewer, folder, overwrite=True)
    file = write(tmp_path / "plain", "text")
    with pytest.raises(FileExistsError, match="no problem set"):
        write_set(fewer, file, overwrite=True)
    with pytest.raises(ValueError, match="local"):
        write_set(fewer, "gs://bucket/set")


def test_a_write_that_fails_changes_nothing(tmp_path, contents, stored, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(problem_sets.os, "rename", fail)
    for out in (tmp_path / "sums", tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            write_set(contents, out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sums"]
    assert list(open_set(stored.path)) == list(stored)


def test_what_does_not_open(tmp_path, stored):
    with pytest.raises(FileNotFoundError, match=r"nothing(.|\n)*python -m tto_jax\.prepare_data"):
        open_set(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"not a prepared problem set(.|\n)*python -m tto_jax\.prepare_data"):
        open_set(tmp_path / "empty")
    folder = Path(stored.path)
    (records,) = folder.glob("*.array_record*")
    whole = records.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b""):
        records.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            open_set(folder)
    records.unlink()
    with pytest.raises(ValueError, match="damaged"):
        open_set(folder)
    records.write_bytes(whole)
    assert len(open_set(folder)) == 5
    for name, (old, new), said in (
        ("metadata.json", ("fingerprint", "print"), "damaged"),
        ("features.json", ("{", ""), "damaged"),
        ("dataset_info.json", ('"1.0.0"', '"2.0.0"'), r"version 2\.0\.0, not 1\.0\.0"),
    ):
        before = (folder / name).read_text()
        write(folder / name, before.replace(old, new))
        with pytest.raises(ValueError, match=said):
            open_set(folder)
        write(folder / name, before)


def test_a_flipped_bit_is_found_or_harmless(stored, contents):
    (records,) = Path(stored.path).glob("*.array_record*")
    whole = np.frombuffer(records.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    found = 0
    for place in rng.choice(np.flatnonzero(whole), 40, replace=False):  # not in the padding
        damaged = whole.copy()
        damaged[place] ^= 1 << rng.integers(8)
        records.write_bytes(damaged.tobytes())
        try:
            assert list(open_set(stored.path)) == [record.problem for record in contents.records]
        except ValueError as error:
            assert "damaged" in str(error)
            found += 1
    assert found > 20


SUBPROCESS = """
import json, os, sys
from tto_jax import problem_files, problem_sets
contents = problem_files.read_files([sys.argv[1]])
if sys.argv[3] == "killed":
    problem_sets.os.rename = lambda *_: os._exit(9)  # everything is written, nothing is renamed
found = problem_sets.write_set(contents, sys.argv[2])
assert "tensorflow" not in sys.modules
print(json.dumps([[p.id, p.prompt, p.answers] for p in found] + [found.fingerprint]))
"""


def test_other_processes(tmp_path):
    """The same ids everywhere; no TensorFlow; a process that dies leaves nothing that opens and is in nobody's way."""
    source = write(tmp_path / "source", lines_of([good(n) for n in range(50)]))
    out = tmp_path / "set"

    def process(how, seed):
        command = [sys.executable, "-c", SUBPROCESS, source, out, how]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    killed = process("killed", "1")
    assert killed.returncode == 9, killed.stderr
    assert any(path.name.startswith("set.tmp-") for path in tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        open_set(out)
    finished = process("", "2")
    assert finished.returncode == 0, finished.stderr
    *problems, fingerprint = json.loads(finished.stdout)
    here = open_set(out)
    assert [[p.id, p.prompt, list(p.answers)] for p in here] == problems and here.fingerprint == fingerprint
    assert [p.id for p in here] == [prompt_id(p.prompt) for p in here]
