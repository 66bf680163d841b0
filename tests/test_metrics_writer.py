import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import tto_jax.metrics as metrics
from tto_jax.metrics import MetricsWriter, Progress, read_rows


def test_rows_are_exact_and_plain(tmp_path):
    x = np.float32(0.1)
    row = {
        "pi": math.pi,
        "x": x,
        "jax": jnp.float32(1 / 3),
        "half": jnp.bfloat16(1.5),
        "n": np.int64(2**53 + 1),
        "flag": np.bool_(True),
        "list": jnp.array([1.0, jnp.nan]),
        "bad": float("inf"),
        "none": None,
        "name": "é",
        "deep": {"a": (np.float64(0.1), 2)},
    }
    with MetricsWriter(tmp_path / "run") as w:
        w.write(np.int32(4), row)
        (got,) = read_rows(tmp_path / "run")  # on disk before close
    assert list(got) == ["step", *row]
    assert got["step"] == 4
    assert got["pi"] == math.pi and np.float32(got["x"]) == x and got["x"] == float(x)
    assert got["jax"] == float(np.float32(1 / 3)) and got["half"] == 1.5 and got["n"] == 2**53 + 1
    assert got["flag"] is True and got["list"] == [1.0, None] and got["bad"] is None and got["none"] is None
    assert got["name"] == "é" and got["deep"] == {"a": [0.1, 2]}


def test_what_has_no_place_in_a_row(tmp_path):
    with MetricsWriter(tmp_path) as w:
        with pytest.raises(ValueError, match="hidden has 5000 elements"):
            w.write(0, {"hidden": np.zeros(5000)})
        with pytest.raises(TypeError, match="loss/fn is a function"):
            w.write(0, {"loss": {"fn": lambda: 0}})
    assert read_rows(tmp_path) == []
    assert read_rows(tmp_path / "nowhere") == []


@pytest.fixture(params=["a disk", "an object store"])
def storage(request, monkeypatch):
    """Where the workdir lies. On the object store nothing is appended to, and no object is written twice."""
    if request.param == "a disk":
        return
    kind = type(epath.Path("."))

    def put(path, mode="r", **options):
        assert mode == "r" or (mode == "w" and not path.exists()), f"{path} is opened to {mode}"
        return open(path, mode, **options)

    monkeypatch.setattr(metrics, "_is_local", lambda path: False)
    monkeypatch.setattr(kind, "open", put)


def text_of(path):
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    return "".join(part.read_text() for part in parts)


def test_a_resumed_run_has_each_row_once(tmp_path, storage):
    def go(writer, steps):
        for step in steps:
            writer.write(step, {"loss": step * 0.1})
            writer.write_samples(step, [{"prompt": f"p{step}", "trace": "a\nb"}] * 2)

    with MetricsWriter(tmp_path) as w:
        go(w, range(3))
        written = w.flush()
        go(w, range(3, 5))
        w.flush()
    assert written == [3, 6]
    assert len(read_rows(tmp_path)) == 5
    with MetricsWriter(tmp_path, written) as w:
        assert [r["step"] for r in read_rows(tmp_path)] == [0, 1, 2]
        go(w, range(3, 6))
        assert w.flush() == [6, 12]
    assert read_rows(tmp_path) == [{"step": s, "loss": s * 0.1} for s in range(6)]
    samples = [json.loads(x) for x in text_of(tmp_path / "samples.jsonl").splitlines()]
    assert [s["step"] for s in samples] == [s // 2 for s in range(12)]
    text = text_of(tmp_path / "samples.txt")
    assert text.count("==== step") == 12 and "trace:\n    a\n    b\n" in text and "prompt: p5" in text


@pytest.mark.parametrize("seed", range(5))
def test_any_history_of_kills(tmp_path, storage, seed):
    """Rows of any steps, saves, kills, resumes from any checkpoint that is left: what is read is what was kept."""
    rng = np.random.default_rng(seed)
    saved, rows, number = [((0, 0), [])], [], 0
    writer = MetricsWriter(tmp_path)
    for _ in range(60):
        what = rng.choice(["row", "row", "row", "flush", "save", "kill"])
        if what == "row":
            number += 1
            writer.write(number // 3, {"n": number})
            writer.write_samples(number // 3, [{"n": number}] * int(rng.integers(3)))
            rows = [*rows, number]
        elif what == "flush":
            writer.flush()
        elif what == "save":
            saved.append((writer.flush(), rows))
        else:
            written, rows = saved[-1] if rng.random() < 0.7 else saved[rng.integers(len(saved))]
            saved = saved[: [kept for _, kept in saved].index(rows) + 1]  # the later ones were damaged
            writer = MetricsWriter(tmp_path, written)
            assert [row["n"] for row in read_rows(tmp_path)] == rows
    writer.close()
    assert [row["n"] for row in read_rows(tmp_path)] == rows
    samples = [json.loads(line)["n"] for line in text_of(tmp_path / "samples.jsonl").splitlines()]
    assert set(samples) <= set(rows) and samples == sorted(samples)
    assert text_of(tmp_path / "samples.txt").count("==== step") == len(samples)


def test_lost_rows_are_said(tmp_path, storage, caplog):
    with MetricsWriter(tmp_path, (2, 0)) as w:
        w.write(3, {})
        w.flush()
    assert "metrics.jsonl has 0 entries, not 2" in caplog.text
    assert [row["step"] for row in read_rows(tmp_path)] == [3]


@pytest.mark.parametrize("tail", ['{"step": 1, "x"', "garbage", '{"x": 1}'])
def test_only_the_last_line_may_be_torn(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": 1}\n' + tail)
    assert len(read_rows(tmp_path)) == 1
    with MetricsWriter(tmp_path, (1, 0)) as w:
        w.write(1, {"x": 2})
    assert [r["x"] for r in read_rows(tmp_path)] == [1, 2]
    path.write_text(f'{{"step": 0}}\n{tail}\n{{"step": 1}}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_rows(tmp_path)


def test_a_complete_line_without_its_newline_stays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}')
    with MetricsWriter(tmp_path, (1, 0)) as w:
        w.write(1, {})
    assert [r["step"] for r in read_rows(tmp_path)] == [0, 1]


def test_object_stores_get_a_part_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_is_local", lambda path: False)
    w = MetricsWriter(tmp_path)
    w.write(0, {"x": 0})
    w.write(1, {"x": 1})
    assert read_rows(tmp_path) == []
    assert w.flush() == w.flush() == [2, 0]
    assert read_rows(tmp_path) == [{"step": 0, "x": 0}, {"step": 1, "x": 1}]
    w.write(2, {"x": 2})
    w.close()
    assert sorted(path.name for path in (tmp_path / "metrics.jsonl").iterdir()) == ["000000002", "000000003"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path) as w:
        w.write(0, {"eval/anytime": 0.5, "list": [1, 2], "bad": float("nan")})
    assert list((tmp_path / "tensorboard").iterdir())


def test_progress_without_a_terminal_prints_lines():
    out = io.StringIO()
    with Progress(20, initial=4, every=5, seconds=1e9, stream=out) as p:
        for step in range(5, 21):
            p.update(step, {"loss": jnp.float32(0.5), "note": "x"})
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["5/20", "10/20", "15/20", "20/20"]
    assert "loss=0.5 note=x" in lines[0]
    out = io.StringIO()
    with Progress(20, seconds=0.0, stream=out) as p:
        for step in range(1, 21):
            p.update(step, {})
    assert len(out.getvalue().splitlines()) == 20


def test_progress_with_a_terminal_draws_a_bar():
    out = io.StringIO()
    with Progress(3, force=True, stream=out) as p:
        for step in range(1, 4):
            p.update(step, {"loss": 0.25})
    assert "3/3" in out.getvalue() and "loss=0.25" in out.getvalue()
