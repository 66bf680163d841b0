import json
import subprocess
import sys
from pathlib import Path

import pytest

from tto_jax import prepare_data, problem_sets

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = [
    {"question": "Short?", "result": "worked => 1"},
    {"question": "A longer question?", "result": ["x => 2", "y => 3"]},
    {"question": "Short?", "result": "otherwise worked => 1"},
    {"question": "Broken?", "result": "worked"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "entries.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    return path


def test_page(file, tmp_path):
    """As a user types it: what it says, and nothing else on the terminal."""
    more = tmp_path / "more.json"
    more.write_text(json.dumps([{"question": "Third?", "result": "=> 4"}]))
    options = [f"--files={file},{more}", "--out=sets/tiny", "--answer=result", "--answer_after==>", "--skip_broken"]
    done = subprocess.run(
        [sys.executable, "-m", "tto_jax.prepare_data", *options, "--name=Tiny"],
        **{"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 120},
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = dict(line.split(None, 1) for line in done.stdout.splitlines())
    found = problem_sets.open_set(tmp_path / "sets" / "tiny")
    assert said == {
        "problems": f"3 of {file}, {more}",
        "answers": "4; 1 problems have several, at most 2",
        "longest": f"18 characters, {file}:2",
        "twice": "1 records with a question and answers that an earlier one has, left out",
        "skipped": f"{file}:4: 'result' has no '=>' (--answer_after)",  # the last of two lines of this name
        "name": "Tiny",
        "content": found.fingerprint,
        "written": found.path,
    }
    assert "skipped   1 broken records\n" in done.stdout
    assert [p.prompt for p in found] == ["Short?", "A longer question?", "Third?"]
    assert [p.answers for p in found] == [("1",), ("2", "3"), ("4",)] and found.name == "Tiny"


def test_refusals(file, tmp_path, capsys):
    out = tmp_path / "set"
    files, fields = f"--files={file}", ("--answer=result", "--answer_after==>", "--skip_broken")

    def refused(*options) -> str:
        with pytest.raises(SystemExit) as stop:
            prepare_data.main(list(options))
        assert stop.value.code not in (0, None)
        return str(stop.value.code) + capsys.readouterr().err

    assert "--files" in refused(f"--out={out}") and "--out" in refused(files)
    assert "no files were given" in refused("--files=,", f"--out={out}")
    assert "none of the fields answer; its fields: question, result" in refused(files, f"--out={out}")
    assert f"{file}:4: 'result' has no '=>'" in refused(files, f"--out={out}", *fields[:2])
    assert "no such file: " in refused(f"--files={file}x", f"--out={out}")
    assert not out.exists()
    prepare_data.main([files, f"--out={out}", *fields])
    assert "skipped   1 broken records" in capsys.readouterr().out
    assert "--overwrite" in refused(files, f"--out={out}", *fields)
    prepare_data.main([files, f"--out={out}", *fields, "--overwrite"])
    assert problem_sets.open_set(out).name == "set"


def test_many_skipped_records_are_listed_in_the_metadata(tmp_path, capsys):
    file, out = tmp_path / "file", tmp_path / "set"
    file.write_text('{"problem": "p", "answer": "1"}\n' + "{}\n" * 25)
    prepare_data.main([f"--files={file}", f"--out={out}", "--skip_broken"])
    text = capsys.readouterr().out
    assert f"{file}:21: " in text and f"{file}:22: " not in text and "and 5 more skipped" in text
    skipped = json.loads((out / "metadata.json").read_text())["skipped"]
    assert [place.split(": ")[0] for place in skipped] == [f"{file}:{line}" for line in range(2, 27)]
