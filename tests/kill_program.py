"""Kills a training run with SIGKILL at random moments, starts it again each time, and compares it with one left alone.

    python tests/kill_program.py --workdir=DIR [--kills=20] [--seed=0] [--steps=60] [-- FLAGS OF tto_jax.train]

Writes DIR/whole and DIR/killed, prints a line a kill, and exits with 1 if the two differ in anything but times: the
state bit for bit, the data's cursor, every row of the metrics, every sample. Without flags of its own the run is the
smallest one of the tests.
"""

import argparse
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
TIMES = re.compile(r"^seconds(/|$)")


def environment() -> dict[str, str]:
    """Of a process that will not live long: whatever another one has compiled is not compiled again."""
    return os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def rows_of(workdir: Path) -> int:
    """Complete rows of metrics so far."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_run(command: list[str], workdir: Path, kills: int, seed: int, span: float):
    """Runs `command` until it ends by itself, killed `kills` times before; yields a line for each kill.

    Every other kill comes up to `span` seconds after a new row, so that the run gets on; the others come at any moment
    since the start of the process: while it imports, restores, compiles.
    """
    rng, done, start_up = random.Random(seed), 0, 0.0
    while True:
        begin, rows = time.monotonic(), rows_of(workdir)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done < kills and done % 2 and start_up:
            wait(process, rng.uniform(0, start_up + span))
        elif done < kills:
            while rows_of(workdir) <= rows and process.poll() is None:
                time.sleep(0.01)
            start_up = time.monotonic() - begin
            wait(process, rng.uniform(0, span))
        if done < kills and process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code, said = process.wait(), process.stderr.read()
        if code == 0 and done == kills:
            return
        if code != -signal.SIGKILL:
            raise RuntimeError(
                f"the run ended with {code} after {done} of {kills} kills: {said[-2000:] or 'too short'}"
            )
        done += 1
        there = sorted(path.name for path in (workdir / "checkpoints").glob("*"))
        yield f"kill {done} after {time.monotonic() - begin:.2f} s: {rows_of(workdir)} rows, checkpoints {there}"


def wait(process: subprocess.Popen, seconds: float) -> None:
    """Until the time is over or the process ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(min(0.01, seconds))


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs beside times."""
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from tto_jax import checkpoint, learner, metrics, settings

    plan = settings.build(ConfigDict(json.loads((one / "config.json").read_text())))
    like, ends = learner.abstract_state(plan.model, plan.optimizer), []
    for workdir in (one, other):
        with checkpoint.Checkpointer(workdir / "checkpoints", keep=1000) as saved:
            ends.append(saved.restore_latest(like))
    (step, state, host), (other_step, other_state, other_host) = ends
    found = [] if step == other_step else [f"the last steps are {step} and {other_step}"]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other_state), strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            found.append(f"state{jax.tree_util.keystr(path)} differs")
    for record in (host, other_host):
        del record["totals"]["seconds"]
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
    parser.add_argument("flags", nargs="*", help="of tto_jax.train, after --")
    options = parser.parse_args(argv)
    flags = options.flags
    if not flags:
        sys.path[:0] = [str(ROOT)]
        from test_train_page import SMALL

        small = SMALL | {"steps": options.steps, "warm_start.cache": options.workdir.absolute()}
        flags = ["--config=configs/peak.py:brpo", *(f"--config.{name}={value}" for name, value in small.items())]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.workdir.absolute() / "compiled"))
    whole, killed = options.workdir.absolute() / "whole", options.workdir.absolute() / "killed"
    command = [sys.executable, "-m", "tto_jax.train", *flags]
    subprocess.run([*command, f"--workdir={whole}"], cwd=ROOT, env=environment(), check=True)
    seconds = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    for line in killed_run(
        [*command, f"--workdir={killed}"], killed, options.kills, options.seed, 2 * seconds / (options.kills + 1)
    ):
        print(line, flush=True)
    found = differences(whole, killed)
    print("\n".join(found) or f"{options.kills} kills: the same state, rows and samples as without")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(sys.argv[1:])
