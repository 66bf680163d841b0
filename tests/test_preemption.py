"""A run that is told to go, or is killed, and goes on: the same parameters, rows and samples as one that was let be."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
import test_distributed
from kill_program import differences, environment, killed_run, line_of, rows_of
from test_distributed import arguments, folder  # noqa: F401
from test_math_path import model_dir, problem_set  # noqa: F401
from test_train_page import SMALL, run

from tto_jax import checkpoint, learner, metrics, preemption, profiling, train

ROOT = Path(__file__).resolve().parents[1]
RUN = {"steps": 9, "rollout__segment": 2}  # several segments a rollout


@pytest.fixture(scope="module", autouse=True)
def patience():
    """Of days: on a machine that is busy otherwise no step is saved for its slowness, and no process ends itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption, "PATIENCE", 1e6)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Holds the workdirs and beside them the one warm start."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(base):
    """A run that nothing stops."""
    return run(base / "whole", **RUN)


def notify():
    print(f"notified at {time.time()}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def at_call(patch, module, name, number, action=notify, only=lambda *args: True):
    """Calls `action` at the beginning of the given call of a function (of those that count)."""
    function, left = getattr(module, name), [number]

    def wrapped(*args, **kwargs):
        left[0] -= only(*args)
        if left[0] == 0:
            left[0] = -1
            action()
        return function(*args, **kwargs)

    patch.setattr(module, name, wrapped)


def during(phase, number):
    """The notice comes while the page waits for a phase of a step to end, for the given time since the start."""
    return profiling.Clock, "mark", number, notify, lambda clock, name, *_: name == phase


def looking(phase, number):
    """The notice comes just before the loop looks for it: between segments of a rollout, parts of an evaluation."""
    return preemption.Notice, "check", number, notify, lambda notice, name: name == phase


# One run, started again after every stop: the phase, when in it the notice comes since that start, the step that is
# saved. An evaluation is due at the even steps, as is a checkpoint, after it.
STOPS = [
    ("evaluation", looking("evaluation", 1), 0),
    ("data", during("data", 2), 1),
    ("think", looking("think", 1), 1),  # the first look in a step: between segments
    ("answer", during("answer", 2), 2),
    ("grade", during("grade", 1), 2),
    ("credit", during("credit", 2), 3),
    ("score", during("score", 1), 3),
    ("update", (learner, "train_step", 1), 4),  # the first minibatch; step 4 owes its evaluation
    ("evaluation", looking("evaluation", 2), 4),
    ("update", (learner, "train_step", 2), 5),  # between the minibatches
    ("update", (train.diagnostics, "update_metrics", 1), 6),
    ("save", (ocp.CheckpointManager, "save", 1), 8),
]


def test_a_notice_in_every_phase(whole, base, monkeypatch, capsys):
    workdir = base / "stops"
    for phase, call, step in STOPS:
        with monkeypatch.context() as patch:
            at_call(patch, *call)
            run(workdir, **RUN)
        assert f"stopped in phase {phase}: step {step} is saved" in capsys.readouterr().out
        assert last_step(workdir) == step
    run(workdir, **RUN)
    assert "stopped" not in capsys.readouterr().out
    assert differences(whole, workdir) == []


def last_step(workdir):
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_notices_while_saves_are_in_flight(whole, base, monkeypatch, capsys):
    """One from the thread that writes a checkpoint, which takes its time; more of them while the last step is saved."""
    workdir = base / "in_flight"
    with monkeypatch.context() as patch:
        at_call(patch, ocp.CheckpointManager, "_finalize", 3, lambda: (notify(), time.sleep(1)))
        at_call(patch, checkpoint.Checkpointer, "wait", 2, notify)  # the first one is of the start: there is nothing
        at_call(patch, ocp.CheckpointManager, "_finalize", 4, notify)
        run(workdir, **RUN)
    saved = re.search(r"^stopped in phase \w+: step (\d) is saved", capsys.readouterr().out, re.MULTILINE)
    assert int(saved[1]) == last_step(workdir) >= 4
    run(workdir, **RUN)
    assert differences(whole, workdir) == []


@pytest.mark.slow
def test_stopped_again_and_again(whole, base, monkeypatch, capsys):
    """Every start is stopped soon, most in the evaluation that the one before could not finish."""
    workdir = base / "again"
    for number in (1, 1, 2, 1, 2):
        with monkeypatch.context() as patch:
            at_call(patch, train.evaluation, "evaluate", number)
            run(workdir, **RUN)
    assert re.findall(r"evaluation: step (\d)", capsys.readouterr().out) == ["0", "0", "2", "2", "4"]
    run(workdir, **RUN)
    assert differences(whole, workdir) == []


def test_a_kill_after_an_evaluation_that_was_owed(whole, base, monkeypatch):
    """Stopped in an evaluation, resumed, killed after its row is written: the row is there once."""
    workdir = base / "owed"
    with monkeypatch.context() as patch:
        at_call(patch, train.evaluation, "evaluate", 2)
        run(workdir, **RUN)

    def die():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, learner, "score_logprobs", 1, die)
        run(workdir, **RUN)
    assert [row["step"] for row in metrics.read_rows(workdir)].count(2) == 2
    run(workdir, **RUN)
    assert differences(whole, workdir) == []


def test_a_damaged_checkpoint_costs_steps_not_the_run(whole, base, monkeypatch, caplog):
    """The run goes back to the checkpoint before, drops the rows after it, and ends as if nothing had happened."""
    workdir = base / "damaged"
    with monkeypatch.context() as patch:
        at_call(patch, learner, "score_logprobs", 6)
        run(workdir, **RUN)
    assert last_step(workdir) == 5
    (workdir / "checkpoints" / "5" / "state" / "manifest.ocdbt").unlink()
    run(workdir, **RUN)
    assert "step 4 is used" in caplog.text and (workdir / "checkpoints" / "5.corrupt").is_dir()
    assert differences(whole, workdir) == []


def test_a_checkpoint_has_its_configuration(base, monkeypatch):
    """A run whose config.json is gone, or whose checkpoints come from elsewhere: what differs is named."""
    workdir = run(base / "configured", **RUN | {"steps": 1, "evaluation__every": 9})
    (workdir / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoints/1 belongs to another configuration:\n +seed: run has 0, you gave 1"
    ):
        run(workdir, **RUN, seed=1)


def test_slow_steps_are_all_saved(base, monkeypatch):
    """Where the loop goes without a look for longer than a notice may wait, a step is on the disk before the next."""
    monkeypatch.setattr(preemption, "PATIENCE", 0.0)
    rarely = {"steps": 3, "checkpoint__every": 100, "checkpoint__keep": 10, "evaluation__every": 100}
    workdir = run(base / "slow", **RUN | rarely)
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [0, 1, 2, 3]


# ---------------------------------------------------------------- as a process


PROGRAM = """
import hashlib, sys
sys.path[:0] = ["tests"]
import pytest, test_preemption
from absl import app
from tto_jax import preemption

def notify_and_hang():
    test_preemption.notify()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in which Python sees no signal

call, preemption.PATIENCE = test_preemption.PROCESSES[int(sys.argv.pop(1))][1], 1e6
if call[2] < 0:
    call, preemption.PATIENCE = (*call[:2], -call[2], notify_and_hang), 0.0
test_preemption.at_call(pytest.MonkeyPatch(), *call)
app.run(test_preemption.train.main)
"""
# The phase, the call at whose beginning the notice comes, counted from a fresh start, the step that is saved, the exit
# code. Minus the number of the call: it does not return.
ENDED = preemption.EXIT_CODE
PROCESSES = [
    ("start", (checkpoint.Checkpointer, "restore_latest", 1), None, -signal.SIGTERM),
    *((phase, during(phase, 4), 3, ENDED) for phase in ("data", "think", "answer", "grade", "credit", "score")),
    ("update", (learner, "train_step", 5), 3, ENDED),
    ("evaluation", (train.evaluation, "evaluate", 2), 2, ENDED),
    ("save", (ocp.CheckpointManager, "save", 3), 4, ENDED),
    ("hanging in update", (learner, "train_step", -7), 3, ENDED),
    ("hanging in score", (learner, "score_logprobs", -4), 3, ENDED),
]
IN_CI = ("hanging in update",)


def flags(workdir):
    given = SMALL | {name.replace("__", "."): value for name, value in RUN.items()}
    given |= {"warm_start.cache": workdir.parent}
    options = [f"--config.{name}={value}" for name, value in given.items()]
    return ["--config=configs/peak.py:brpo", *options]


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=[] if PROCESSES[i][0] in IN_CI else pytest.mark.slow) for i in range(len(PROCESSES))],
    ids=[phase for phase, *_ in PROCESSES],
)
def test_the_page_ends_well_and_soon(whole, base, number):
    """The page as a process of its own ends within 30 s of the notice, says where, and goes on from there."""
    phase, _, step, code = PROCESSES[number]
    workdir = base / f"process_{number}"
    command = [sys.executable, "-c", PROGRAM, str(number), *flags(workdir), f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    end = time.time()
    assert done.returncode == code, done.stderr
    if phase.startswith("hanging"):
        assert "did not come to an end: what was finished is saved" in done.stdout
    elif step is not None:
        assert f"stopped in phase {phase}: step {step} is saved" in done.stdout
    if step is not None:
        assert max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) == step
    assert end - float(re.search(r"notified at (\S+)", done.stderr)[1]) < 30
    run(workdir, **RUN)
    assert differences(whole, workdir) == []


def test_killed_at_random_moments(whole, base):
    """With SIGKILL, and started again, three times; `kill_program.py` does it more often."""
    workdir = base / "killed"
    kills = list(killed_run(flags(workdir), workdir, kills=3, seed=int(time.time()), total=rows_of(whole)))
    assert len(kills) == 3 and rows_of(workdir) == rows_of(whole)
    assert differences(whole, workdir) == [], [line_of(kill) for kill in kills]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_a_notice_to_one_of_two_processes(folder, arguments, processes):  # noqa: F811
    """Both save the same step and end; as many processes, or fewer, go on from there: every row is there once."""
    workdir = folder / f"notice_{processes}"
    running = test_distributed.start(workdir, arguments, 2, 4)
    try:
        log = lambda: test_distributed.log_of(workdir, 0)  # noqa: E731
        test_distributed.wait_for(lambda: "train 1/" in log() or running[0].poll() is not None, 240)
        running[1].send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert [process.wait(timeout=60) for process in running] == [ENDED, ENDED], log()[-3000:]
        assert time.monotonic() - begin < 30
    finally:
        for process in running:
            process.kill()
    assert re.search(r"stopped in phase \w+: step [1-4] is saved", log())
    test_distributed.finish(workdir, test_distributed.start(workdir, arguments, processes, 4))
    assert [row["step"] for row in metrics.read_rows(workdir)] == [0, 1, 2, 2, 3, 4, 4]


# ---------------------------------------------------------------- the notice itself


def test_a_notice_is_a_flag_while_it_is_open():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.Notice() as stop:
        assert not stop.requested()
        stop.check("think")
        for _ in range(2):
            notify()
            assert stop.requested()
            with pytest.raises(preemption.Stopped, match=r"^stopped in phase think$"):
                stop.check("think")
    assert signal.getsignal(signal.SIGTERM) == before
    with preemption.Notice() as stop:
        assert not stop.requested(), "the next one starts anew"


def test_a_notice_in_another_thread_changes_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with preemption.Notice() as stop:
            seen.append((stop.requested(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def hang(seconds):
    """Ends itself 0.5 s after a notice that comes while Python does not run; returns (exit code, text, seconds)."""
    program = f"""
import hashlib, os, signal, sys, threading, time
from tto_jax import preemption
preemption.PATIENCE, begin = 0.5, time.monotonic()
with preemption.Notice(lambda: time.monotonic() > begin + {seconds}):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


def test_a_notice_that_nothing_looks_at_ends_the_process():
    code, said, took = hang(2)
    assert code == preemption.EXIT_CODE == 143 and "stopped after 0.5 s" in said
    assert took > 2, "it waits until the last whole step is safe"


def test_slow_is_a_long_time_without_a_look(monkeypatch):
    monkeypatch.setattr(preemption, "PATIENCE", 0.2)
    stop = preemption.Notice()
    assert not stop.was_slow()
    time.sleep(0.3)
    assert stop.was_slow(), "not looked yet"
    assert not stop.requested() and stop.was_slow(), "a look does not undo it"
    stop.begin()
    assert not stop.was_slow()
