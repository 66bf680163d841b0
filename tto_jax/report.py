"""Compares evaluated runs: `python -m tto_jax.report RUN RUN... [--out=DIR] [--name NAME=RUN] [--baseline=NAME]`.

Reads of each RUN, a workdir, `evaluation/results.json`, `evaluation/scores.npz`, `metrics.jsonl` and `config.json`.
Writes `results.json`, `curves.png` and `training.png` and prints every run, paired differences against the baseline,
and in Markdown the variants side by side, with the tokens that they need for the baseline's accuracies.

Runs are of one variant if their configurations have the same `variant` (without one: the directory's name). Two runs
make a pair if they share problems; of variants with several runs, those pair that share both seeds (of the warm start
and of the run), and the t-interval is over these pairs.
"""

import argparse
import dataclasses
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from tto_jax import metrics, variants
from tto_jax.core import anytime

FIELDS = (
    *("budgets", "accuracy", "accuracy_ci95", "anytime", "anytime_ci95", "final", "mean_length", "problems"),
    *("seed", "warm_start_seed", "tokens", "seconds", "config_hash", "commit", "versions", "spent", "regret_tokens"),
)

BEYOND = {  # what results.json has of thinking after the last budget
    "extrapolation": "thinking made to go on",
    "linearised": "linearised thinking going on",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One evaluated run."""

    name: str
    variant: str
    results: dict  # as evaluation/results.json has it
    correct: np.ndarray  # f32[B, G, S, A]
    forks: np.ndarray  # i32[B, G, S], tokens
    id: np.ndarray  # u32[B], ascending within each set
    set: np.ndarray  # i32[B], ascending; 0 where there is one
    set_names: tuple[str, ...]
    rows: list[dict]  # of metrics.jsonl

    @property
    def seeds(self) -> tuple:
        """(warm_start_seed, seed): runs of different variants that agree in both are a pair."""
        return self.results["warm_start_seed"], self.results["seed"]

    @property
    def per_problem(self) -> np.ndarray:
        """f32[B, 2]: anytime and final accuracy of every problem."""
        accuracy = self.correct.mean(axis=(1, 3))
        return np.stack([accuracy.mean(axis=1), accuracy[:, -1]], axis=1)


def load_run(path: epath.PathLike, name: str | None = None, training: bool = True) -> Run:
    """Reads a workdir. Problems are put in the order of their sets and ids.

    Args:
      path: the run's workdir.
      name: default: the directory's name.
      training: the rows of a trained model's metrics.jsonl must be there; else it is not asked for.

    Raises:
      ValueError: a file is missing (with the command that makes it), lacks a field, or the files contradict each other.
    """
    path = epath.Path(path)

    def need(relative: str, page: str) -> epath.Path:
        if not (path / relative).exists():
            raise ValueError(
                f"{path / relative} is missing; `python -m tto_jax.{page} --workdir={path}` makes it"
                + ("" if path.exists() else f" ({path} does not exist)")
                + "."
            )
        return path / relative

    file = need("evaluation/results.json", "evaluate")
    results = json.loads(file.read_text())
    missing = [field for field in FIELDS if field not in results]
    if missing:
        raise ValueError(
            f"{file} lacks {', '.join(missing)}; every field is needed: {', '.join(FIELDS)}. Evaluate the run again."
        )
    scores = np.load(io.BytesIO(need("evaluation/scores.npz", "evaluate").read_bytes()))
    number = scores["set"] if "set" in scores else np.zeros(len(scores["id"]), np.int32)
    names = tuple(scores["set_names"].tolist()) if "set" in scores else ("unnamed",)
    order = np.lexsort((scores["id"], number))
    correct, forks, id_, number = (x[order] for x in (scores["correct"], scores["forks"], scores["id"], number))
    shape = correct.shape
    accuracy = over_sets(correct.mean(axis=(1, 3)), number).mean(axis=0) if correct.ndim == 4 else np.zeros(0)
    if forks.shape != shape[:3] or id_.shape != shape[:1] or accuracy.shape != np.shape(results["budgets"]):
        raise ValueError(
            f"{path / 'evaluation'}: correct{list(shape)}, forks{list(forks.shape)}, id{list(id_.shape)} and "
            f"{len(results['budgets'])} budgets; the rule is [B,G,S,A], [B,G,S], [B] and S budgets."
        )
    if np.abs(accuracy - np.asarray(results["accuracy"])).max() > 1e-4:
        raise ValueError(
            f"{path / 'evaluation'}: results.json says accuracy {np.round(results['accuracy'], 4).tolist()}, the "
            f"scores {accuracy.round(4).tolist()}: the two files are of different evaluations. Evaluate the run again."
        )
    config = path / "config.json"
    config = json.loads(config.read_text()) if config.exists() else {}
    if training and results["tokens"]:  # a model that was not trained has no rows
        need("metrics.jsonl", "star" if "star" in config else "train")
    variant = config.get("variant")
    name = name or os.path.basename(os.fspath(path).rstrip("/"))
    return Run(name, variant or name, results, correct, forks, id_, number, names, metrics.read_rows(path))


def over_sets(per_problem: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Means over the problems of each set. f32[B, ...], i32[B] -> f32[sets, ...]."""
    return np.stack([per_problem[number == i].mean(axis=0) for i in np.unique(number)])


def with_sets(run: Run) -> list[Run]:
    """For `curves`: the run, or where it has several sets their mean and each of them as if it were a run."""
    if len(run.set_names) == 1:
        return [run]
    each = {name: run.results | run.results["sets"][name] for name in run.set_names}
    shown = {"mean over sets": run.results} | each
    return [dataclasses.replace(run, name=name, variant=name, results=results) for name, results in shown.items()]


def _mismatch(a: Run, b: Run) -> str | None:
    """Why two runs can't be compared problem by problem; None if they can."""
    if a.set_names != b.set_names and max(len(a.set_names), len(b.set_names)) > 1:  # of single ones the ids decide
        return f"different sets ({', '.join(a.set_names)} and {', '.join(b.set_names)}): not compared"
    if not np.array_equal(a.id, b.id):
        shared = np.intersect1d(a.id, b.id).size
        return f"different problems ({shared} shared of {a.id.size} and {b.id.size}): not compared"
    if a.results["budgets"] != b.results["budgets"]:
        return f"different budgets ({a.results['budgets']} and {b.results['budgets']}): not compared"
    return None


def _entry(difference, low, high) -> dict:
    return {"difference": float(difference), "ci95": [float(low), float(high)]}


def _paired(differences: np.ndarray, number: np.ndarray, key: jax.Array):
    """Mean over sets and its bootstrap interval, problems resampled within each set: three times f32[...]."""
    sets = [differences[number == i] for i in np.unique(number)]
    keys = [key] if len(sets) == 1 else jax.random.split(key, len(sets))
    draws = [anytime.resampled_means(x, anytime.resample_counts(k, len(x))) for x, k in zip(sets, keys)]
    low, high = anytime.percentile_interval(np.mean(draws, axis=0))
    return over_sets(differences, number).mean(axis=0), np.asarray(low), np.asarray(high)


def _over_problems(run: Run, base: Run, key: jax.Array) -> dict:
    entry = {
        "over": "problems",
        "run": run.name,
        "variant": run.variant,
        "baseline": base.name,
        "problems": int(run.id.size),
    }
    note = _mismatch(run, base)
    if note:
        return entry | {"note": note}
    difference, low, high = _paired(run.per_problem - base.per_problem, run.set, key)
    return entry | {
        "anytime": _entry(difference[0], low[0], high[0]),
        "final": _entry(difference[1], low[1], high[1]),
    }


def pair(runs: Sequence[Run], baseline: str | None = None) -> tuple[str, list[Run], dict[str, list[tuple[Run, Run]]]]:
    """(baseline, its runs, the pairs of each other variant): (run, run of the baseline), with the same seeds.

    One run of a variant and one of the baseline are a pair whatever their seeds. Runs without a partner are in none.

    Args:
      runs: names must differ.
      baseline: a variant or the name of a run; default: the variant of the first run.

    Raises:
      ValueError: two runs with one name, two runs of one variant with the same seeds, or an unknown baseline.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"Several runs are called {', '.join(twice)}; names must differ: give --name NAME=RUN.")
    seen: dict[tuple, Run] = {}
    for run in runs:
        other = seen.setdefault((run.variant, *run.seeds), run)
        if other is not run:
            raise ValueError(
                f"{other.name} and {run.name} are both variant {run.variant} with (warm_start_seed, seed) {run.seeds}; "
                "runs of one variant must differ in a seed."
            )
    of_variant = _by_variant(runs)
    baseline = baseline or next(iter(of_variant))
    bases = of_variant.get(baseline) or [run for run in runs if run.name == baseline]
    if not bases:
        raise ValueError(f"No run is called {baseline}; the choices are variants {list(of_variant)} and runs {names}.")
    pairs = {}
    for variant, members in of_variant.items():
        group = [run for run in members if run not in bases]
        pairs[variant] = [(run, base) for run in group for base in bases if run.seeds == base.seeds]
        if not pairs[variant] and len(group) == len(bases) == 1:
            pairs[variant] = [(group[0], bases[0])]
    return baseline, bases, pairs


def compare(runs: Sequence[Run], baseline: str | None = None) -> list[dict]:
    """Paired differences (run minus baseline) of anytime and final accuracy.

    Records have `over`: "problems" for two runs, with a bootstrap interval over problems (it says what other problems
    would give, for these two models); "runs" for two variants with at least two pairs of runs, with a t-interval over
    pairs (it says what other seeds would give) and the other measures of `variants.differences`. A record that could
    not be computed has a `note` instead of numbers. Arguments and errors are those of `pair`.
    """
    baseline, bases, pairs = pair(runs, baseline)
    paired = []
    keys = (jax.random.fold_in(jax.random.key(0), i) for i in itertools.count())
    for variant, some in pairs.items():
        paired += [_over_problems(run, base, next(keys)) for run, base in some]
        matched = [*bases, *(run for run, _ in some)]
        paired += [
            {"over": "problems", "run": run.name, "baseline": baseline, "note": f"no {baseline} with seeds {run.seeds}"}
            for run in runs
            if run.variant == variant and run not in matched
        ]
        done = comparable(some)
        if len(done) > 1:
            record = {"over": "runs", "run": variant, "baseline": baseline, "pairs": len(done)}
            paired.append(record | variants.differences(done))
    return paired


def comparable(pairs: Sequence[tuple[Run, Run]]) -> list[tuple[dict, dict]]:
    """The results of those pairs that share problems and budgets."""
    return [(run.results, base.results) for run, base in pairs if _mismatch(run, base) is None]


def side_by_side(runs: Sequence[Run], baseline: str | None = None) -> str:
    """`variants.tables` of the pairs; empty where there is none."""
    baseline, bases, pairs = pair(runs, baseline)
    done = {variant: found for variant, some in pairs.items() if (found := comparable(some))}
    return variants.tables(baseline, [base.results for base in bases], done) if done else ""


def gap_closed(paired: Sequence[dict], target: str) -> dict[str, float]:
    """Share of the anytime gap between the baseline and `target` that each other variant closes, mean over pairs.

    Raises ValueError if `target` was not compared, or has no gap.
    """
    gaps: dict[str, list[float]] = {}
    for record in paired:
        if record["over"] == "problems" and "note" not in record:
            gaps.setdefault(record["variant"], []).append(record["anytime"]["difference"])
    if target not in gaps or not np.mean(gaps[target]):
        raise ValueError(f"--target={target} is no variant with a gap to the baseline; the choices are {sorted(gaps)}.")
    whole = np.mean(gaps[target])
    return {variant: float(np.mean(gap) / whole) for variant, gap in gaps.items() if variant != target}


def align(rows: list[list[str]]) -> str:
    """Lines of text: the first column begins, the others end at the same place."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _difference(entry: dict) -> str:
    return f"{100 * entry['difference']:+.1f} [{100 * entry['ci95'][0]:+.1f}, {100 * entry['ci95'][1]:+.1f}]"


def table(runs: Sequence[Run], paired: Sequence[dict], columns: int = 8) -> str:
    """Aligned text, in percent: accuracy at up to `columns` budgets, anytime with its interval, final; costs; pairs."""
    parts = []
    for budgets, group in _by_budgets(runs).items():
        shown = np.unique(np.linspace(0, len(budgets) - 1, min(columns, len(budgets))).round().astype(int))

        def cells(r: dict, interval: str, costs: tuple[str, str], shown=shown) -> list[str]:
            at = [_percent(r["accuracy"][i]) for i in shown]
            return [*at, _percent(r["anytime"]), interval, _percent(r["final"]), f"{r['mean_length']:.1f}", *costs]

        rows = [["run", *(f"@{budgets[i]}" for i in shown), "anytime", "[95%]", "final", "length", "tokens", "seconds"]]
        for run in group:
            r = run.results
            interval = "[{}, {}]".format(*map(_percent, r["anytime_ci95"]))
            rows.append([run.name, *cells(r, interval, (variants.count(r["tokens"]), f"{r['seconds']:.0f}"))])
        for variant, members in _by_variant(group).items():
            if len(members) > 1:
                names = ("accuracy", "anytime", "final", "mean_length")
                mean = {name: np.mean([run.results[name] for run in members], axis=0) for name in names}
                rows.append([f"{variant}, mean of {len(members)}", *cells(mean, "", ("", ""))])
        parts.append(align(rows))
    if paired:
        rows = [["paired difference", "over", "anytime [95%]", "final [95%]"]]
        notes = []
        for p in paired:
            title = f"{p['run']} - {p['baseline']}"
            if "note" in p:
                notes.append(f"{title}: {p['note']}")
                continue
            over = f"{p['pairs']} pairs of runs" if p["over"] == "runs" else f"{p['problems']} problems"
            rows.append([title, over, _difference(p["anytime"]), _difference(p["final"])])
        parts += [align(rows)] if len(rows) > 1 else []
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def _by_budgets(runs: Sequence[Run]) -> dict[tuple, list[Run]]:
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.results["budgets"]), []).append(run)
    return groups


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return groups


def plain_axes(columns: int):
    """A figure 1800 pixels wide, meant to be shown at 900, with `columns` plain axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _colors(runs: Sequence[Run]) -> dict[str, str]:
    return {variant: f"C{i % 10}" for i, variant in enumerate(_by_variant(runs))}


def curves(runs: Sequence[Run]):
    """Accuracy against budget. A variant of one run has its 95% band; of several: the runs thin, their mean thick."""
    figure, (axis,) = plain_axes(1)
    colors = _colors(runs)
    for variant, members in _by_variant(runs).items():
        style = {"color": colors[variant]}
        same = len(_by_budgets(members)) == 1
        for run in members:
            budgets, accuracy = run.results["budgets"], 100 * np.asarray(run.results["accuracy"])
            if len(members) == 1:
                low, high = 100 * np.asarray(run.results["accuracy_ci95"]).T
                axis.fill_between(budgets, low, high, alpha=0.15, linewidth=0, **style)
                axis.plot(budgets, accuracy, marker="o", markersize=3.5, label=f"{run.name} (95% band)", **style)
            else:
                label = None if same else run.name
                axis.plot(budgets, accuracy, linewidth=0.8, alpha=0.5, label=label, **style)
        if len(members) > 1 and same:
            mean = 100 * np.mean([run.results["accuracy"] for run in members], axis=0)
            label = f"{variant} (mean of {len(members)} runs)"
            axis.plot(budgets, mean, marker="o", markersize=3.5, linewidth=2.2, label=label, **style)
    axis.set_xlabel(_columns(runs[0]))
    axis.set_ylabel("accuracy (%)")
    axis.legend(frameon=False)
    return figure


def _columns(run: Run) -> str:
    of_episodes = "forks" in run.results and run.results["forks"] == "episodes"
    return "episodes of thinking" if of_episodes else "thinking budget (tokens)"


def by_tokens(run: Run):
    """Accuracy against the tokens of prompt, prefix and answers: of one answer, of the majority of k at a fork,
    and of thinking that was made to go on.
    """
    figure, (axis,) = plain_axes(1)
    votes = sorted(int(name.split("@")[1]) for name in run.results if re.fullmatch(r"fork_maj@\d+", name))
    lines = [("accuracy", "spent", "one answer")]
    lines += [(f"fork_maj@{k}", f"fork_maj_tokens@{k}", f"majority of {k} answers") for k in votes]
    for accuracy, tokens, label in lines:
        _band(axis, run.results, run.results[tokens], accuracy, 100, f"{label} (95% band)")
    for name, label in BEYOND.items():
        if name in run.results:
            found = run.results[name]
            _band(axis, found, found["spent"], "accuracy", 100, f"{label} (95% band)")
    axis.set_xlabel("tokens of prompt, thinking and answers")
    axis.set_ylabel("accuracy (%)")
    axis.legend(frameon=False)
    return figure


def cumulative_regret(run: Run):
    """Cumulative regret against budget."""
    figure, (axis,) = plain_axes(1)
    for name, label in (("cumulative_regret", "against 1"), ("cumulative_regret_best", "against the trace's best")):
        _band(axis, run.results, run.results["budgets"], name, 1, f"{label} (95% band)")
    axis.set_xlabel(_columns(run))
    axis.set_ylabel("cumulative regret (forks)")
    axis.legend(frameon=False)
    return figure


def _band(axis, results: dict, x, name: str, scale: float, label: str) -> None:
    low, high = scale * np.asarray(results[f"{name}_ci95"]).T
    (line,) = axis.plot(x, scale * np.asarray(results[name]), marker="o", markersize=3.5, label=label)
    axis.fill_between(x, low, high, alpha=0.15, linewidth=0, color=line.get_color())


def _training(runs: Sequence[Run]):
    """`eval/anytime` against steps and against sampled tokens; the runs of a variant share a colour."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, axes = plain_axes(2)
    colors, labelled = _colors(runs), set()
    for run in runs:
        rows = [row for row in run.rows if row.get("eval/anytime") is not None]
        if not rows:
            continue
        label = None if run.variant in labelled else run.variant
        labelled.add(run.variant)
        for axis, x in zip(axes, ("step", "tokens")):
            points = [(row[x], 100 * row["eval/anytime"]) for row in rows if row.get(x) is not None]
            if points:
                axis.plot(
                    *zip(*points), marker="o", markersize=2.5, linewidth=1.3, color=colors[run.variant], label=label
                )
    axes[0].set_xlabel("steps")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set_xlabel("sampled tokens")
    axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].set_ylabel("anytime accuracy (%)")
    if labelled:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    else:
        axes[0].text(0.5, 0.5, "no run has eval/anytime in metrics.jsonl", ha="center", transform=axes[0].transAxes)
    return figure


def _common(runs: Sequence[Run], field: str):
    """The field's value if all runs agree, else null: each run's record has its own."""
    values = [run.results[field] for run in runs]
    return values[0] if all(value == values[0] for value in values) else None


def write(runs: Sequence[Run], paired: Sequence[dict], out: epath.PathLike) -> None:
    """Writes `results.json`, `curves.png` and `training.png` to the directory `out`.

    results.json: {"runs": {name: record}, "commit", "versions" (null where runs differ), "config_hash": {name: hash},
    "paired": [record of `compare`]}. A run's record is its own results.json and `variant`.
    """
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "runs": {run.name: run.results | {"variant": run.variant} for run in runs},
        "commit": _common(runs, "commit"),
        "versions": _common(runs, "versions"),
        "config_hash": {run.name: run.results["config_hash"] for run in runs},
        "paired": list(paired),
    }
    (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, figure in (("curves.png", curves(runs)), ("training.png", _training(runs))):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        (out / name).write_bytes(buffer.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    """The page."""
    parser = argparse.ArgumentParser(prog="python -m tto_jax.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="workdir of an evaluated run")
    parser.add_argument("--out", default="report", help="directory for results.json, curves.png and training.png")
    parser.add_argument("--name", action="append", default=[], metavar="NAME=RUN", help="call RUN by NAME (repeatable)")
    parser.add_argument(
        "--target", help="variant whose gap to the baseline is the whole; prints the share others close"
    )
    parser.add_argument("--baseline", help="variant or run to compare with; default: the variant of the first run")
    flags = parser.parse_args(argv)
    named = dict.fromkeys(flags.runs)
    for pair in flags.name:
        name, separator, path = pair.partition("=")
        if not (name and separator and path):
            parser.error(f"--name is {pair!r}; the form is NAME=RUN.")
        named[path] = name
    if not named:
        parser.error("Give at least one RUN.")
    try:
        runs = [load_run(path, name) for path, name in named.items()]
        paired = compare(runs, flags.baseline)
        closed = gap_closed(paired, flags.target) if flags.target else {}
    except ValueError as error:
        parser.error(str(error))
    write(runs, paired, flags.out)
    print("\n\n".join(filter(None, (table(runs, paired), side_by_side(runs, flags.baseline)))))
    for variant, share in closed.items():
        print(f"{variant} closes {100 * share:.0f}% of the gap in anytime accuracy to {flags.target}")
    for field in ("commit", "versions"):
        if _common(runs, field) is None:
            print(f"note: the runs differ in {field}; see results.json", file=sys.stderr)


if __name__ == "__main__":
    main()
