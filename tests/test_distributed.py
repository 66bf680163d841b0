"""Several processes over loopback: the same run as in one, and an end when one is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_math_path import MODEL, config_of, model_dir, problem_set  # noqa: F401

from tto_jax import metrics, pretrained

ROOT = Path(__file__).resolve().parents[1]
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # on a loaded machine a device may wait long


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def options(model_dir, problem_set, mesh, **changes):  # noqa: F811
    """The test's configuration as command-line options."""
    given = config_of(model_dir, problem_set, mesh=mesh, steps=4, learner__micro_tokens=1, **changes)
    return [f"--config={ROOT / 'configs' / 'math.py'}:brpo"] + [
        f"--config.{name}={given_at(given, name)!r}"
        if isinstance(given_at(given, name), tuple)
        else f"--config.{name}={given_at(given, name)}"
        for name in CHANGED
    ]


CHANGED = (
    *("init", "data.train", "data.eval", "steps", "mesh", "model.dtype", "model.remat", "task.max_prompt_tokens"),
    *("task.max_answer_tokens", "task.prompting.instruction", "task.prompting.elicit_ended"),
    *("task.prompting.elicit_cut", "task.prompting.paragraph", "task.verifier.workers", "budgets.tokens"),
    *("rollout.problems", "rollout.group_size", "rollout.answers", "learner.micro_tokens", "learner.tokens_per_row"),
    *("learner.optimizer.learning_rate", "evaluation.budgets", "evaluation.every", "evaluation.problems"),
    *("evaluation.traces", "checkpoint.every", "log.samples_every"),
)


def given_at(config, name):
    for part in name.split("."):
        config = config[part]
    return config


def start(workdir, arguments, processes, devices, extra=()):
    """Processes of one run, each with its share of the devices."""
    address = f"localhost:{free_port()}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes} {PATIENT}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }
    command = [sys.executable, "-m", "tto_jax.train", *arguments, f"--workdir={workdir}", *extra]
    found = []
    for index in range(processes):
        who = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={index}"]
        log = (workdir.parent / f"{workdir.name}.{index}.log").open("w")
        found.append(subprocess.Popen([*command, *who], env=environment, stdout=log, stderr=log, cwd=ROOT))
    return found


def log_of(workdir, index):
    return (workdir.parent / f"{workdir.name}.{index}.log").read_text()


def finish(workdir, running, seconds=240):
    try:
        for index, process in enumerate(running):
            assert process.wait(timeout=seconds) == 0, log_of(workdir, index)[-3000:]
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def arguments(model_dir, problem_set):  # noqa: F811
    return options(model_dir, problem_set, (1, 4, 1))


@pytest.fixture(scope="module")
def alone(folder, arguments):
    workdir = folder / "one"
    finish(workdir, start(workdir, arguments, 1, 4))
    return workdir


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_one_run(folder, arguments, alone, processes):
    """Three steps on scores that vary, and a fourth on one process with another mesh: the losses, all metrics and the
    parameters of a run on one process.
    """
    workdir = folder / f"of_{processes}"
    finish(workdir, start(workdir, [*arguments, "--config.steps=3"], processes, 4))
    assert [row["step"] for row in metrics.read_rows(workdir)] == [0, 1, 2, 2, 3]
    said = [log_of(workdir, index) for index in range(processes)]
    others = [argument for argument in arguments if not argument.startswith("--config.mesh=")]
    finish(workdir, start(workdir, [*others, "--config.mesh=(1,2,1)"], 1, 2))
    one, many = metrics.read_rows(alone), metrics.read_rows(workdir)
    assert [row["step"] for row in one] == [row["step"] for row in many] == [0, 1, 2, 2, 3, 4, 4]
    for a, b in zip(one, many):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith(("seconds", "speed/", "memory/")):
                same = a[name] is b[name] if a[name] is None else a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5)
                assert same, (a["step"], name, a[name], b[name])
    assert all(0 < row["score/anytime"] < 1 for row in one if "score/anytime" in row)
    trained = [pretrained.find(path).load(MODEL) for path in (alone, workdir)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *trained)
    assert f"{processes} processes, 4 devices" in said[0] and said[1].count("hosts ") == 0


def test_different_configurations_are_refused(folder, arguments):
    """One process that was started with another seed: all end with the reason, none hangs."""
    workdir, address = folder / "differ", f"localhost:{free_port()}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {PATIENT}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tto_jax.train",
                *arguments,
                f"--workdir={workdir}{index}",
                f"--config.seed={index}",
                f"--coordinator_address={address}",
                "--num_processes=2",
                f"--process_id={index}",
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for index in range(2)
    ]
    for process in running:
        said = process.communicate(timeout=120)[0]
        assert process.returncode != 0 and "processes [1] have another configuration than process 0" in said, said[
            -2000:
        ]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0], ids=["worker", "coordinator"])
def test_a_lost_process_ends_the_others(folder, arguments, lost):
    """SIGKILL in the middle of a run: the others end within 60 s; the job then goes on from its last checkpoint."""
    workdir = folder / f"lost_{lost}"
    running = start(workdir, [*arguments, "--config.steps=200"], 2, 4, ["--heartbeat_seconds=10"])
    try:
        wait_for(lambda: (workdir / "checkpoints" / "3").exists() or running[0].poll() is not None, 200)
        running[lost].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        running[1 - lost].wait(timeout=60)
        assert time.monotonic() - begin < 60 and running[1 - lost].returncode != 0
        said = log_of(workdir, 1 - lost)
        assert re.search(rf"task[:_/ ]*{lost}|process {lost}|coordination service", said, re.IGNORECASE), said[-3000:]
    finally:
        for process in running:
            process.kill()
    before = max(row["step"] for row in metrics.read_rows(workdir))
    steps = before + 2
    finish(workdir, start(workdir, [*arguments, f"--config.steps={steps}"], 2, 4))
    found = [row["step"] for row in metrics.read_rows(workdir) if "score/anytime" in row]
    assert found == list(range(1, steps + 1)), "no row is missing or doubled"


def wait_for(condition, seconds):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "timed out"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_processes=2"], "go together: give all three"),
        (
            ["--num_processes=2", "--process_id=2", "--coordinator_address=localhost:1"],
            "must be below --num_processes=2",
        ),
    ],
)
def test_flags_that_do_not_fit(arguments, flags, said):
    command = [sys.executable, "-m", "tto_jax.train", *arguments, "--dry_run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode != 0 and said in done.stderr + done.stdout
