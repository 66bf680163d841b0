"""Kills a training run with SIGKILL at random moments, starts it again each time, and compares it with one left alone.

    python tests/kill_program.py --workdir=DIR [--kills=20] [--seed=0] [--steps=60] [--json=FILE] [-- FLAGS OF THE PAGE]

Writes DIR/whole and DIR/killed, prints a line a kill (and writes a line of JSON), and exits with 1 if the two differ in
anything but times: the state bit for bit, the data's cursor, every row of the metrics, every sample. Without flags of
`tto_jax.train` the run is the smallest one of the tests.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMES = re.compile(r"^(seconds$|seconds/|speed/|memory/)")


def environment() -> dict[str, str]:
    """Of a process that will not live long: whatever another one has compiled is not compiled again."""
    return os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def rows_of(workdir: Path) -> int:
    """Complete rows of metrics so far."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# The training page, which writes into a file what it is doing, so that a kill can be told from others.
PROGRAM = """
import os, sys
said = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
now = []

def say(phase):
    os.pwrite(said, phase.ljust(20).encode(), 0)
    now[:] = [phase]

def during(owner, name, phase):
    function = getattr(owner, name)
    def wrapped(*args, **kwargs):
        before = now[0]
        say(phase(*args) if callable(phase) else phase)
        try:
            return function(*args, **kwargs)
        finally:
            if not callable(phase):
                say(before)
    setattr(owner, name, wrapped)

say("imports")
from absl import app
from tto_jax import checkpoint, profiling, train
say("start")
during(train.warm_start, "get", "warm start")
during(checkpoint.Checkpointer, "restore_latest", "restore")
during(checkpoint.Checkpointer, "save", "save")
during(train, "evaluate_row", "evaluation")
during(profiling.Clock, "_enter", lambda clock, phase: phase)
app.run(train.main)
"""


def killed_run(flags: list[str], workdir: Path, kills: int, seed: int, total: int):
    """Trains with `flags` until the run ends by itself, killed `kills` times before; yields a dict for each kill.

    Every other kill comes some rows after a start, so that the run gets on, and not so many that it ends before the
    last kill: `total` is how many it will have. The others come at any moment up to the first new row: while the
    process imports, restores, compiles.
    """
    rng, done, start_up = random.Random(seed), 0, 0.0
    phase, errors = workdir.parent / f"{workdir.name}.phase", workdir.parent / f"{workdir.name}.stderr"
    command = [sys.executable, "-c", PROGRAM, str(phase), *flags, f"--workdir={workdir}"]
    while True:
        begin, rows, there = time.monotonic(), rows_of(workdir), checkpoints_in(workdir)
        phase.write_text("imports")
        with errors.open("w") as stderr:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr)
        if done < kills and done % 2 and start_up:
            wait(process, rng.uniform(0, start_up))
        elif done < kills:
            until(process, lambda: rows_of(workdir) > rows)  # noqa: B023
            start_up = time.monotonic() - begin
            most = (total - rows) // (kills - done + 1)
            ahead = rows + rng.randint(1, max(most, 1))
            until(process, lambda: rows_of(workdir) >= ahead)  # noqa: B023
            wait(process, rng.uniform(0, 1))
        if done < kills and process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        if code == 0 and done == kills:
            return
        if code != -signal.SIGKILL:
            said = errors.read_text()[-2000:] or "too short"
            raise RuntimeError(f"the run ended with {code} after {done} of {kills} kills: {said}")
        done += 1
        yield {
            "kill": done,
            "seconds": round(time.monotonic() - begin, 2),
            "phase": phase.read_text().strip(),
            "resumed_from": there[-1] if there else None,
            "rows": rows_of(workdir),
            "checkpoints": checkpoints_in(workdir),
        }


def checkpoints_in(workdir: Path) -> list[int]:
    """Steps of the checkpoints that were finished."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def line_of(kill: dict) -> str:
    """A kill as a line of text."""
    resumed = "the beginning" if kill["resumed_from"] is None else f"step {kill['resumed_from']}"
    return (
        f"kill {kill['kill']:2}: {kill['seconds']:6.2f} s after a start from {resumed}, in {kill['phase']}; "
        f"{kill['rows']} rows, checkpoints {kill['checkpoints']}"
    )


def wait(process: subprocess.Popen, seconds: float) -> None:
    """Until the time is over or the process ends."""
    end = time.monotonic() + seconds
    until(process, lambda: time.monotonic() >= end)


def until(process: subprocess.Popen, true) -> None:
    """Until something is true or the process ends."""
    while not true() and process.poll() is None:
        time.sleep(0.005)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs beside times."""
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from tto_jax import checkpoint, learner, metrics, settings

    plan = settings.build(ConfigDict(json.loads((one / "config.json").read_text())))
    like, ends = learner.abstract_state(plan.model, plan.optimizer, plan.prefix is not None), []
    for workdir in (one, other):
        with checkpoint.Checkpointer(workdir / "checkpoints", keep=1000) as saved:
            ends.append(saved.restore_latest(like))
    (step, state, host), (other_step, other_state, other_host) = ends
    found = [] if step == other_step else [f"the last steps are {step} and {other_step}"]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other_state), strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            found.append(f"state{jax.tree_util.keystr(path)} differs")
    for record in (host, other_host):
        del record["totals"]["seconds"], record["began"]
    if host != other_host:
        found.append(f"beside the state: {host} and {other_host}")
    rows = [
        [{name: value for name, value in row.items() if not TIMES.match(name)} for row in metrics.read_rows(workdir)]
        for workdir in (one, other)
    ]
    if [row["step"] for row in rows[0]] != [row["step"] for row in rows[1]]:
        found.append(f"rows are of steps {[row['step'] for row in rows[0]]} and {[row['step'] for row in rows[1]]}")
    found += [f"the rows of step {a['step']} differ" for a, b in zip(*rows) if a != b]
    for name in ("samples.jsonl", "samples.txt"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs")
    return found


def main(argv: list[str]) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of the smallest run")
    parser.add_argument("--json", type=Path, help="a file for one line of JSON a kill")
    parser.add_argument("flags", nargs="*", help="of tto_jax.train, after --")
    options = parser.parse_args(argv)
    if there := [name for name in ("whole", "killed") if (options.workdir / name).exists()]:
        parser.error(f"--workdir={options.workdir} holds {' and '.join(there)} of another time: name a new folder")
    flags = options.flags
    if not flags:
        sys.path[:0] = [str(ROOT)]
        from test_train_page import SMALL

        small = SMALL | {"steps": options.steps, "warm_start.cache": options.workdir.absolute()}
        flags = ["--config=configs/peak.py:brpo", *(f"--config.{name}={value}" for name, value in small.items())]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.workdir.absolute() / "compiled"))
    whole, killed = options.workdir.absolute() / "whole", options.workdir.absolute() / "killed"
    page = [sys.executable, "-m", "tto_jax.train", *flags, f"--workdir={whole}"]
    subprocess.run(page, cwd=ROOT, env=environment(), check=True)
    log = options.json.open("w") if options.json else contextlib.nullcontext()
    with log as file:
        for kill in killed_run(flags, killed, options.kills, options.seed, rows_of(whole)):
            print(line_of(kill), flush=True)
            if file:
                print(json.dumps(kill), file=file, flush=True)
    found = differences(whole, killed)
    print("\n".join(found) or f"{options.kills} kills: the same state, rows and samples as without")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(sys.argv[1:])
