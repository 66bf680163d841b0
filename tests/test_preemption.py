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
from kill_program import differences, environment, killed_run, rows_of
from test_train_page import SMALL, run

from tto_jax import checkpoint, data, evaluation, grading, learner, metrics, preemption, rollout, train

ROOT = Path(__file__).resolve().parents[1]
RUN = {"steps": 6, "rollout__segment": 2, "evaluation__traces": 2}  # several segments a rollout


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


def is_training(model, config, *_):
    return config.group_size == SMALL["rollout.group_size"]


# The phase; the call during which the notice comes, in step 3 or 4; the step that is saved. Checkpoints of their own
# have the even steps, each after an evaluation.
PHASES = [
    ("data", (data, "_host_batch", 4), 3),
    ("think", (rollout, "_think", 10, notify, is_training), 3),  # 3 a step: the first one of step 4
    ("answer", (rollout, "sample_answers", 4, notify, is_training), 3),
    ("grade", (grading, "grade", 4 + 2), 3),  # two of them of the evaluations at 0 and 2
    ("credit", (train, "credit_and_pack", 4), 3),
    ("score", (learner, "score_logprobs", 4), 3),
    ("update", (learner, "train_step", 5), 3),  # the first minibatch of step 3
    ("update", (learner, "train_step", 6), 3),  # between its minibatches
    ("update", (train.diagnostics, "update_metrics", 3), 3),
    ("evaluation", (evaluation, "_sample", 1), 0),
    ("evaluation", (evaluation, "_sample", 2), 2),
    ("save", (ocp.CheckpointManager, "save", 3), 4),
    ("save", (ocp.CheckpointManager, "save", 4), 6),
]


IDS = [f"{phase}-{call[1]}-{call[2]}" for phase, call, _ in PHASES]


@pytest.mark.parametrize(("phase", "call", "step"), PHASES, ids=IDS)
def test_a_notice_in_every_phase(whole, base, tmp_path, monkeypatch, capsys, phase, call, step):
    workdir = base / tmp_path.name
    with monkeypatch.context() as patch:
        at_call(patch, *call)
        run(workdir, **RUN)
    assert re.search(rf"^stopped in phase {phase}: step {step} is saved", capsys.readouterr().out, re.MULTILINE)
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


def test_stopped_again_and_again(whole, base, monkeypatch, capsys):
    """Every start is stopped soon, most in the evaluation that the one before could not finish."""
    workdir, calls = base / "again", [("_sample", 1), ("_sample", 1), ("_sample", 2), ("_sample", 1), ("_sample", 2)]
    for name, number in calls:
        with monkeypatch.context() as patch:
            at_call(patch, evaluation, name, number)
            run(workdir, **RUN)
    assert re.findall(r"evaluation: step (\d)", capsys.readouterr().out) == ["0", "0", "2", "2", "4"]
    run(workdir, **RUN)
    assert differences(whole, workdir) == []


def test_a_kill_after_an_evaluation_that_was_owed(whole, base, monkeypatch):
    """Stopped in an evaluation, resumed, killed after its row is written: the row is there once."""
    workdir = base / "owed"
    with monkeypatch.context() as patch:
        at_call(patch, evaluation, "_sample", 2)
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


# ---------------------------------------------------------------- as a process


PROGRAM = """
import sys
sys.path[:0] = ["tests"]
import pytest, test_preemption
from absl import app
test_preemption.at_call(pytest.MonkeyPatch(), *test_preemption.PHASES[int(sys.argv.pop(1))][1])
app.run(test_preemption.train.main)
"""


def flags(workdir):
    given = SMALL | {name.replace("__", "."): value for name, value in RUN.items()}
    given |= {"warm_start.cache": workdir.parent}
    options = [f"--config.{name}={value}" for name, value in given.items()]
    return ["--config=configs/peak.py:brpo", f"--workdir={workdir}", *options]


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=[] if PHASES[i][0] == "think" else pytest.mark.slow) for i in range(len(PHASES))],
    ids=IDS,
)
def test_the_page_ends_well_and_soon(whole, base, number):
    """The page as a process of its own: exit code 0, within 30 s of the notice, and a line that says where."""
    phase, _, step = PHASES[number]
    workdir = base / f"process_{number}"
    command = [sys.executable, "-c", PROGRAM, str(number), *flags(workdir)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    end = time.time()
    assert done.returncode == 0, done.stderr
    assert f"stopped in phase {phase}: step {step} is saved" in done.stdout
    assert end - float(re.search(r"notified at (\S+)", done.stderr)[1]) < 30
    run(workdir, **RUN)
    assert differences(whole, workdir) == []


def test_killed_at_random_moments(whole, base):
    """With SIGKILL, and started again, three times; `kill_program.py` does it more often."""
    workdir = base / "killed"
    command = [sys.executable, "-m", "tto_jax.train", *flags(workdir)]
    lines = list(killed_run(command, workdir, kills=3, seed=int(time.time()), span=1.0))
    assert len(lines) == 3 and rows_of(workdir) == rows_of(whole)
    assert differences(whole, workdir) == [], lines


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
