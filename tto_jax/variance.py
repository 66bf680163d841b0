"""What each baseline leaves of the return's variance: `python -m tto_jax.variance RUN RUN... [--out=DIR] [--seed=0]`.

    python -m tto_jax.evaluate --workdir=runs/brpo --as_training --out=runs/brpo_as_training
    python -m tto_jax.variance runs/brpo_as_training --out=runs/variance

Reads of each RUN `evaluation/results.json`, `evaluation/scores.npz` and `config.json`: an evaluation whose forks are
those that training credits. Returns are by the configuration's prior, of the verifier's scores, without penalties of
lengths. Prints and writes (results.json, table.txt, residuals.png) for every block Var[R - V] / Var[R] over the traces
that reached it, and its difference from the group mean without the trace itself, with 95% bootstrap intervals over
problems, the regression fitted anew in each resample. Several runs of a variant: their mean, the lowest, the highest.
V1 has only the trace's own earlier scores; with its own trace in V2, R - V2 is smaller by 1 - 1/G without a better
baseline (`core.variance`).
"""

import argparse
import dataclasses
import functools
import io
import json
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from tto_jax import host, report, summary
from tto_jax.core import anytime, variance
from tto_jax.core.budgets import BudgetSchedule

TITLES = {
    "prefix": "V1",
    "group": "V2, own trace",
    "group_leave_one_out": "V2, others",
    "brpo": "BRPO, own trace",
    "brpo_leave_one_out": "BRPO, others",
    "regression": "regression, others",
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What was found on one set of one run."""

    name: str  # of the run, with the set's where there are several
    variant: str  # the same
    record: dict  # as results.json has it

    def values(self, key: str) -> np.ndarray:
        """f64[K,S] or, of intervals, f64[K,S,2]; a row for each of `variance.BASELINES`, NaN for None."""
        return np.asarray([self.record[key][name] for name in variance.BASELINES], np.float64)


def measure(path: epath.PathLike, seed: int) -> list[Study]:
    """Of every set of an evaluated run; seed: of the bootstrap.

    Raises:
      ValueError: a file is missing, there is one trace a problem or one problem, or the prior is not over these forks.
    """
    path = epath.Path(path)
    run = report.load_run(path, training=False)
    file = path / "config.json"
    if not file.exists():
        raise ValueError(f"{file} is missing: give the folder that `python -m tto_jax.evaluate --as_training` wrote")
    config, results = json.loads(file.read_text()), run.results
    first = int(results["budgets"][0] == 0)  # answers before any thinking have no block
    columns = results["budgets"][first:]
    schedule = _schedule(path, columns, config["budgets"]["prior"], results.get("forks"))
    about = {"run": run.name, "variant": run.variant, "columns": columns}
    about |= {"prior": np.asarray(schedule.weights).tolist()}
    about |= {key: results[key] for key in ("seed", "warm_start_seed", "config_hash", "commit", "versions")}
    about |= {key: results.get(key) for key in ("step", "temperature", "forks")}
    found = []
    for number, name in enumerate(run.set_names):
        mine = run.set == number
        correct, forks = run.correct[mine][:, :, first:], run.forks[mine][:, :, first:]
        size = {"problems": correct.shape[0], "traces": correct.shape[1], "answers": correct.shape[3]}
        if min(size["problems"], size["traces"]) < 2:
            raise ValueError(
                f"{path}: {size['problems']} problems of {size['traces']} traces in set {name}, there must be 2 or "
                "more of both: evaluate it with --as_training"
            )
        counts = np.asarray(summary.counts_of(name, size["problems"], seed))
        record = about | {"set": name} | size | _found(correct, forks, schedule, config["credit"], counts)
        suffix = f"/{name}" if len(run.set_names) > 1 else ""
        found.append(Study(run.name + suffix, run.variant + suffix, record))
    return found


def _schedule(path, columns, prior, forks) -> BudgetSchedule:
    try:
        if forks == "episodes" and prior == "linear":
            raise ValueError("prior='linear' over episodes: it weighs by tokens, which these forks do not have")
        return BudgetSchedule.from_prior(columns, prior)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; evaluate it with --as_training") from error


def _found(correct, forks, schedule, credit, counts) -> dict:
    """The numbers of a set; counts f32[R,B] of its resamples."""
    sums = jax.device_get(_moments(correct, forks, schedule, credit["estimator"]["decay"])).astype(np.float64)
    halves = np.stack([sums[half::2].sum(axis=0) for half in (0, 1)])
    drawn = [np.tensordot(counts[:, half::2].astype(np.float64), sums[half::2], axes=1) for half in (0, 1)]
    found = variance.residuals(halves, credit["baseline_ridge"])
    draws = variance.residuals(np.stack(drawn, axis=1), credit["baseline_ridge"])
    minus = lambda x: {name: values - x[variance.REFERENCE] for name, values in x.items()}  # noqa: E731
    plain = lambda x: {name: summary.plain(values) for name, values in x.items()}  # noqa: E731
    interval = lambda x: plain({k: np.stack(anytime.percentile_interval(v), axis=-1) for k, v in x.items()})  # noqa: E731
    return {
        "reached": (variance.reached(halves) / (correct.shape[0] * correct.shape[1])).tolist(),  # share of the traces
        "variance": summary.plain(variance.return_variance(halves)),
        "residual": plain(found),
        "residual_ci95": interval(draws),
        "difference": plain(minus(found)),
        "difference_ci95": interval(minus(draws)),
    }


_moments = functools.partial(jax.jit, static_argnames="decay")(variance.moments)


def groups(studies: Sequence[Study]) -> dict[tuple, list[Study]]:
    """By variant and columns."""
    found = {}
    for study in studies:
        found.setdefault((study.variant, tuple(study.record["columns"])), []).append(study)
    return found


def pooled(members: Sequence[Study], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(value, low, high), f64[K,S] each: of one run with its interval, or of several the mean, lowest and highest."""
    values = [study.values(key) for study in members]
    if len(members) == 1:
        return values[0], *np.moveaxis(members[0].values(f"{key}_ci95"), -1, 0)
    return np.mean(values, axis=0), np.min(values, axis=0), np.max(values, axis=0)


def table(studies: Sequence[Study]) -> str:
    """Aligned text: lines for each variant, a column for each block of thinking."""
    return "\n\n".join(_part(title, columns, members) for (title, columns), members in groups(studies).items())


def _part(title, columns, members) -> str:
    one, several = members[0].record, len(members) > 1
    number = f"{len(members)} runs: mean (lowest, highest)" if several else "[95% interval]"
    head = f"{title}, {one['problems']} problems x {one['traces']} traces x {one['answers']} answers; {number}"
    mean = lambda key: np.mean([np.asarray(study.record[key], np.float64) for study in members], axis=0)  # noqa: E731
    empty = [""] * len(columns)
    rows = [["block that ends at", *map(str, columns)]]
    rows += [["traces that reached it", *(f"{x:.3f}" for x in mean("reached"))]]
    rows += [["Var[R]", *(f"{x:.4f}" for x in mean("variance"))]]
    rows += [["Var[R - V] / Var[R]", *empty], *_rows(pooled(members, "residual"), several, "")]
    rows += [[f"minus that of {TITLES[variance.REFERENCE]}", *empty]]
    rows += _rows(pooled(members, "difference"), several, "+", leave_out=variance.REFERENCE)
    return f"{head}\n{report.align(rows)}"


def _rows(found: tuple, several: bool, sign: str, leave_out: str = "") -> list[list[str]]:
    form = "{} ({}, {})" if several else "{} [{}, {}]"
    text = lambda *x: "none" if np.isnan(x[0]) else form.format(*(f"{y:{sign}.3f}" for y in x))  # noqa: E731
    each = [(name, *values) for name, *values in zip(variance.BASELINES, *found) if name != leave_out]
    return [["  " + TITLES[name], *(text(*x) for x in zip(*values))] for name, *values in each]


def residuals(studies: Sequence[Study]):
    """Var[R - V] / Var[R] against blocks, an axis a variant; bands: 95%, or from the lowest run to the highest."""
    found = groups(studies)
    figure, axes = report.plain_axes(len(found))
    for axis, ((title, columns), members) in zip(axes, found.items()):
        at = range(len(columns))
        for i, (name, value, low, high) in enumerate(zip(variance.BASELINES, *pooled(members, "residual"))):
            line = "--" if name in ("group", "brpo") else "-"
            axis.plot(at, value, marker="o", markersize=3.5, label=TITLES[name], color=f"C{i}", linestyle=line)
            axis.fill_between(at, low, high, alpha=0.12, linewidth=0, color=f"C{i}")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(at, map(str, columns))
        axis.set_xlabel("end of the block")
        axis.set_title(title if len(members) == 1 else f"{title} ({len(members)} runs)")
    axes[0].set_ylabel("Var[R - V] / Var[R]")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def write(studies: Sequence[Study], out: epath.PathLike, seed: int) -> None:
    """results.json, table.txt and residuals.png."""
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    record = {"studies": {s.name: s.record for s in studies}, "bootstrap_seed": seed, "commit": host.commit()}
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "table.txt").write_text(table(studies) + "\n")
    picture = io.BytesIO()
    residuals(studies).savefig(picture, format="png")
    (out / "residuals.png").write_bytes(picture.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    """The page."""
    parser = argparse.ArgumentParser(prog="python -m tto_jax.variance", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of an evaluation made with --as_training")
    parser.add_argument("--out", default="variance", help="directory for results.json, table.txt and residuals.png")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    flags = parser.parse_args(argv)
    if not flags.runs:
        parser.error("Give at least one RUN.")
    if not 0 <= flags.seed < 2**32:
        parser.error(f"--seed={flags.seed}: seeds lie in [0, 2**32)")
    try:
        studies = [study for path in dict.fromkeys(flags.runs) for study in measure(path, flags.seed)]
    except ValueError as error:
        parser.error(str(error))
    if len({study.name for study in studies}) < len(studies):
        parser.error(f"two runs have the same name: {sorted(study.name for study in studies)}; rename a folder")
    write(studies, flags.out, flags.seed)
    print(table(studies))


if __name__ == "__main__":
    main()
