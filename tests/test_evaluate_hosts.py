"""The evaluation page as several processes over loopback: they find what one finds, whoever stops, whoever is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from test_distributed import PATIENT, finish, free_port, log_of
from test_evaluate_page import of_texts, page, results_of, run, texts, whole, without_timing  # noqa: F401

from tto_jax import checkpoint, settings, warm_start
from tto_jax.models import decoder

ROOT = Path(__file__).resolve().parents[1]
# The page; EVENT, such as "1 2 SIGTERM": process 1 gets the signal when it has written its second part.
PROGRAM = """
import os, signal
import jax
from absl import app
from tto_jax import completions, distributed, evaluate
write, written = completions.write, []
def write_and_signal(path, lines):
    write(path, lines)
    written.append(f"{path.parent.name}/{path.name[:5]}")
    process, number, name = os.environ.get("EVENT", "-1 0 SIGTERM").split()
    if (jax.process_index(), len(written)) == (int(process), int(number)):
        os.kill(os.getpid(), getattr(signal, name))
def pages(argv):
    for call in range(int(os.environ.get("CALLS", "1"))):
        evaluate.main(argv)
        print("wrote", *written, flush=True)
        distributed.initialize = lambda: None  # the processes of the next call are connected
completions.write = write_and_signal
app.run(distributed.ends_all(pages))
"""


def start(out, arguments, processes, devices, event="", calls=1, extra=lambda index: ()):
    """The page's processes, each with its share of the devices; `extra`: more arguments of a process, by its number."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes} {PATIENT}",
        "PYTHONPATH": str(ROOT),
        "CALLS": str(calls),
    }
    environment |= {"EVENT": event} if event else {}
    address, found = f"localhost:{free_port()}", []
    for index in range(processes):
        who = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={index}"]
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments), *who, *extra(index)]
        log = (out.parent / f"{out.name}.{index}.log").open("w")
        found.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
    return found


def wrote(out, index):
    """Parts that a process had written at the end of each call of the page."""
    return [line.split()[1:] for line in log_of(out, index).splitlines() if line.startswith("wrote")]


def files(out):
    """Name -> bytes of everything below an evaluation that does not tell the time, or the way to it."""
    folder, left_out = out / "evaluation", ("results.json", "scores.npz", "curve.png")
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): "" if str(name) in left_out else path.read_bytes() for name, path in found.items()}


def assert_same(out, other):
    """Every number, every score and every file of completions, to the bit; nothing else lies there."""
    assert without_timing(results_of(out)) == without_timing(results_of(other))
    assert files(out) == files(other)
    ours, theirs = (np.load(path / "evaluation" / "scores.npz") for path in (out, other))
    assert all((ours[name] == theirs[name]).all() for name in {*ours.files, *theirs.files})


def in_parts(texts, out, *more):  # noqa: F811
    return of_texts(texts, out, "--rows=8", "--mesh=1,-1,1", *more)


def test_two_processes_go_on_from_one_and_are_stopped(texts, whole, tmp_path):  # noqa: F811
    """One process has left two parts of five; a notice to the second of two stops both after a round; both go on."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    parts = sorted((out / "evaluation" / "completions").rglob("*.gz"))
    for name in ("results.json", "scores.npz", "curve.png"):
        (out / "evaluation" / name).unlink()
    left = [path for path in parts if path.parent.name == "sums"][:2]
    for path in {*parts} - {*left}:
        path.unlink()
    before = [path.stat().st_mtime_ns for path in left]
    finish(out, start(out, in_parts(texts, out), 2, 2, "1 1 SIGTERM", calls=2), seconds=600)
    assert wrote(out, 0) == [["sums/00002"], ["sums/00002", "sums/00004", "more/00000"]]
    assert wrote(out, 1) == [["sums/00003"], ["sums/00003", "more/00001"]]
    assert_same(out, whole)
    assert [path.stat().st_mtime_ns for path in left] == before, "they were read back"
    said = [log_of(out, index) for index in (0, 1)]
    assert "stopped in phase evaluation: what was sampled is kept in" in said[0]
    assert "2 processes, 2 devices" in said[0] and "sums: 9 problems, 1 left out" in said[0]
    assert not any(word in said[1] for word in ("stopped in phase", "problems", "anytime"))
    new, all_of_them = (results_of(path)["timing"]["tokens"] for path in (out, whole))
    assert 0 < new < all_of_them


@pytest.mark.slow
def test_processes_come_and_go(texts, whole, tmp_path):  # noqa: F811
    """Two are stopped, four are killed, one goes on: no part is lost, none is written twice."""
    out = tmp_path / "out"
    out.mkdir()
    finish(out, start(out, in_parts(texts, out), 2, 2, "0 1 SIGTERM"), seconds=600)
    assert len(list(out.rglob("*.gz"))) == 2 and not (out / "evaluation" / "results.json").exists()
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.gz")}
    running = start(out, in_parts(texts, out, "--heartbeat_seconds=10"), 4, 4, "2 1 SIGKILL")
    assert all(process.wait(timeout=600) != 0 for process in running)
    assert 2 < len(list(out.rglob("*.gz"))) <= 5
    page(*of_texts(texts, out))
    assert_same(out, whole)
    assert {path: path.stat().st_mtime_ns for path in first} == first


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0], ids=["worker", "coordinator"])
def test_a_lost_process_ends_the_other(texts, whole, tmp_path, lost):  # noqa: F811
    """SIGKILL after a part: the other ends within 60 s and says who is lost; started again, they go on."""
    out = tmp_path / "out"
    running = start(out, in_parts(texts, out, "--heartbeat_seconds=10"), 2, 2, f"{lost} 1 SIGKILL")
    try:
        running[lost].wait(timeout=600)
        begin = time.monotonic()
        assert running[1 - lost].wait(timeout=60) != 0 and time.monotonic() - begin < 60
    finally:
        for process in running:
            process.kill()
    assert running[lost].returncode == -signal.SIGKILL
    assert f"task:{lost}" in log_of(out, 1 - lost) or "coordination service" in log_of(out, 1 - lost).lower()
    assert not (out / "evaluation" / "results.json").exists()
    finish(out, start(out, in_parts(texts, out), 2, 2), seconds=600)
    assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("more", "step"), [((), 4), (("--warm_start",), 0)], ids=["checkpoint", "warm_start"])
def test_a_training_run(run, tmp_path, more, step):  # noqa: F811
    """What one process has saved, restored by two: one part of its own for each, by default."""
    config = ConfigDict(json.loads((run / "config.json").read_text()))
    params = decoder.init_params(settings.build(config).model, 1)
    checkpoint.save_params(warm_start.cache_path(config, epath.Path(run)), params, {})
    given = (f"--workdir={run}", "--traces=3", *more)
    page(*given, f"--out={tmp_path / 'alone'}")
    out = tmp_path / "two"
    finish(out, start(out, (*given, f"--out={out}", "--mesh=1,-1,1"), 2, 2), seconds=600)
    assert wrote(out, 0) == [["peak/00000"]] and wrote(out, 1) == [["peak/00001"]]
    assert without_timing(results_of(out)) == without_timing(results_of(tmp_path / "alone"))
    assert results_of(out)["step"] == step
    options = json.loads((out / "evaluation" / "options.json").read_text())["options"]
    assert options["rows"] == 9, "3 of the 6 problems on each"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extra", "said"),
    [
        ((), ("", "--seed=1"), "processes [1] have another configuration than process 0"),
        ((), ("", "--rows=4"), "processes [1] have another set of flags than process 0"),
        (("--mesh=1,1,1",), ("", ""), "mesh=(1, 1, 1) is one device, and there are 2 processes"),
    ],
    ids=["seed", "rows", "mesh"],
)
def test_what_does_not_go_together_is_refused(texts, tmp_path, arguments, extra, said):  # noqa: F811
    out = tmp_path / "out"
    running = start(
        out, in_parts(texts, out, *arguments), 2, 2, extra=lambda index: [extra[index]] if extra[index] else []
    )
    for index, process in enumerate(running):
        assert process.wait(timeout=600) != 0 and said in log_of(out, index), log_of(out, index)[-2000:]
    assert not out.exists()
