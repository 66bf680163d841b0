import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

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
    with MetricsWriter(tmp_path / "run", -1) as w:
        w.write(np.int32(4), row)
        (got,) = read_rows(tmp_path / "run")  # on disk before close
    assert list(got) == ["step", *row]
    assert got["step"] == 4
    assert got["pi"] == math.pi and np.float32(got["x"]) == x and got["x"] == float(x)
    assert got["jax"] == float(np.float32(1 / 3)) and got["half"] == 1.5 and got["n"] == 2**53 + 1
    assert got["flag"] is True and got["list"] == [1.0, None] and got["bad"] is None and got["none"] is None
    assert got["name"] == "é" and got["deep"] == {"a": [0.1, 2]}


def test_what_has_no_place_in_a_row(tmp_path):
    with MetricsWriter(tmp_path, -1) as w:
        with pytest.raises(ValueError, match="hidden has 5000 elements"):
            w.write(0, {"hidden": np.zeros(5000)})
        with pytest.raises(TypeError, match="loss/fn is a function"):
            w.write(0, {"loss": {"fn": lambda: 0}})
    assert read_rows(tmp_path) == []
    assert read_rows(tmp_path / "nowhere") == []


def test_a_resumed_run_has_each_row_once(tmp_path):
    with MetricsWriter(tmp_path, -1) as w:
        for step in range(5):
            w.write(step, {"loss": step * 0.1})
            w.write_samples(step, [{"prompt": f"p{step}", "trace": "a\nb"}])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 1, "loss": 0.')  # killed
    assert len(read_rows(tmp_path)) == 5
    with MetricsWriter(tmp_path, 2) as w:
        assert [r["step"] for r in read_rows(tmp_path)] == [0, 1, 2]
        for step in range(3, 6):
            w.write(step, {"loss": step * 0.1})
            w.write_samples(step, [{"prompt": f"p{step}", "trace": "a\nb"}])
    assert read_rows(tmp_path) == [{"step": s, "loss": s * 0.1} for s in range(6)]
    samples = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == list(range(6))
    text = (tmp_path / "samples.txt").read_text()
    assert text.count("==== step") == 6 and "trace:\n    a\n    b\n" in text and "prompt: p5" in text


@pytest.mark.parametrize("tail", ['{"step": 1, "x"', "garbage", '{"x": 1}'])
def test_only_the_last_line_may_be_torn(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": 1}\n' + tail)
    assert len(read_rows(tmp_path)) == 1
    with MetricsWriter(tmp_path, 10) as w:
        w.write(1, {"x": 2})
    assert [r["x"] for r in read_rows(tmp_path)] == [1, 2]
    path.write_text(f'{{"step": 0}}\n{tail}\n{{"step": 1}}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_rows(tmp_path)


def test_a_complete_line_without_its_newline_stays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}')
    with MetricsWriter(tmp_path, 0) as w:
        w.write(1, {})
    assert [r["step"] for r in read_rows(tmp_path)] == [0, 1]


def test_object_stores_are_written_at_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_is_local", lambda path: False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    w = MetricsWriter(tmp_path, 0)
    w.write(1, {"x": 1})
    assert read_rows(tmp_path) == [{"step": 0}]
    w.flush()
    assert read_rows(tmp_path) == [{"step": 0}, {"step": 1, "x": 1}]
    w.write(2, {"x": 2})
    w.close()
    assert len(read_rows(tmp_path)) == 3


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, -1) as w:
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
