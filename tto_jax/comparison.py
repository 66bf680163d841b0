"""Two evaluations of the same problems: paired differences of every metric, with 95% intervals over problems."""

import dataclasses
import json

import numpy as np
from etils import epath

from tto_jax import evaluation, summary, token_efficiency
from tto_jax.evaluation import Evaluation

SAMPLING = ("answers", "temperature", "evaluation_seed")  # may differ, and a reader should know
IN_TOKENS = ("mean_length", "spent", "fork_maj_tokens")  # how the names of such metrics begin


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """An evaluation as it lies on disk."""

    name: str
    results: dict  # results.json
    sets: dict[str, Evaluation]


def load(path: epath.PathLike) -> Evaluated:
    """Reads PATH/evaluation. Raises ValueError if PATH was not evaluated."""
    folder = epath.Path(path) / "evaluation"
    for name in ("results.json", "scores.npz"):
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing: `python -m tto_jax.evaluate` makes it.")
    results = json.loads((folder / "results.json").read_text())
    if "forks" not in results:
        raise ValueError(f"{folder / 'results.json'} lacks forks: it is of an older version; evaluate the run again.")
    return Evaluated(
        name=str(path).rstrip("/"),
        results=results,
        sets=evaluation.load(folder / "scores.npz"),
    )


def compare(a: Evaluated, b: Evaluated) -> dict:
    """The record of compare.json: differences A - B of each shared set under `sets`, and their mean over the sets.

    Problems are matched by their id, those of one evaluation only are left out and counted. Both sides of a difference
    are resampled together. A metric is {"a", "b", "difference", "ci95"}, with lists where it has one number a budget.
    `efficiency` (see `token_efficiency.compare`) wants the same problems on both sides, else it is {"refused": why}.

    Raises:
      ValueError: other budgets or another number of traces, no shared set, or no shared problem in one.
    """
    for what in ("forks", "budgets", "traces"):
        if a.results[what] != b.results[what]:
            raise ValueError(
                f"{what} differ: {a.name} has {a.results[what]}, {b.name} has {b.results[what]}; evaluate both with "
                f"the same --{what}, as pass@k, maj@k and every mean over budgets depend on them."
            )
    names = [name for name in a.sets if name in b.sets]
    if not names:
        raise ValueError(f"no set is shared: {a.name} has {list(a.sets)}, {b.name} has {list(b.sets)}.")
    seed = a.results["evaluation_seed"]
    limits = tuple(c for c in a.results["regret_tokens"] if c in b.results["regret_tokens"])
    pairs, draws, each = [], [], {}
    for name in names:
        pair, draw, matched = _paired(name, a, b, limits, seed)
        pairs.append(pair)
        draws.append(draw)
        each[name] = matched | _described([name], [pair], [draw], a, b)
    return {
        "a": a.name,
        "b": b.name,
        "budgets": a.results["budgets"],
        "traces": a.results["traces"],
        "notes": _notes(a, b),
        **_described(names, pairs, draws, a, b),
        "sets": each,
    }


def _paired(name, a, b, limits, seed):
    """Metrics of a and of b, draws of both, and how the problems matched."""
    ids = np.intersect1d(a.sets[name].id, b.sets[name].id)
    if not ids.size:
        raise ValueError(f"set {name}: {a.name} and {b.name} share no problem; they hold different problems.")
    sides = []
    for side in (a, b):
        order = np.argsort(side.sets[name].id)
        index = order[np.searchsorted(side.sets[name].id[order], ids)]
        found = summary.metrics(side.sets[name], limits)
        sides.append({key: metric.take(index) for key, metric in found.items()})
    sides = [{key: metric for key, metric in side.items() if key in sides[0] and key in sides[1]} for side in sides]
    counts = summary.counts_of(name, len(ids), seed)
    draws = [summary.resample(side, counts) for side in sides]
    left = {"problems": len(ids), "only_a": len(a.sets[name].id) - len(ids), "only_b": len(b.sets[name].id) - len(ids)}
    return sides, draws, left


def _described(names, pairs, draws, a, b) -> dict:
    """`metrics` and `efficiency` of some sets together."""
    draws = np.mean(draws, axis=0)  # [2, R, K]
    return {"metrics": _differences(pairs, draws[0] - draws[1]), "efficiency": _efficiency(names, pairs, draws, a, b)}


def _efficiency(names, pairs, draws, a, b) -> dict:
    try:
        for name in names:
            token_efficiency.check_problems(name, *((side.name, side.sets[name].id) for side in (a, b)))
    except ValueError as error:
        return {"refused": str(error)}
    values, resamples = [], []
    for side in (0, 1):
        parts = summary.split(pairs[0][side], draws[side])
        values.append([np.mean([pair[side][key].value() for pair in pairs], axis=0) for key in ("accuracy", "spent")])
        resamples.append([parts[key] for key in ("accuracy", "spent")])
    return token_efficiency.compare(*values, *resamples)


def _differences(pairs: list[list[summary.Metrics]], draws: np.ndarray) -> dict:
    bounds, found = summary.intervals(pairs[0][0], draws), {}
    for key in pairs[0][0]:
        a, b = (np.mean([pair[side][key].value() for pair in pairs], axis=0) for side in (0, 1))
        values = {"a": a, "b": b, "difference": a - b}
        found[key] = {name: summary.plain(value) for name, value in values.items()} | {"ci95": bounds[key]}
    return found


def _notes(a: Evaluated, b: Evaluated) -> list[str]:
    notes = [
        f"{what}: {a.results[what]} and {b.results[what]}" for what in SAMPLING if a.results[what] != b.results[what]
    ]
    for side, other in ((a, b), (b, a)):
        if only := [name for name in side.sets if name not in other.sets]:
            notes.append(f"only {side.name} has {', '.join(only)}: left out")
    return notes


def table(record: dict, columns: int = 8) -> str:
    """The record for a reader: one block a set, one line a metric; accuracy at up to `columns` budgets.

    Rates are in percent, lengths in tokens, cumulative regret in budgets. Where a metric has one number a budget, the
    last one is shown. Of `tokens to` an accuracy, which is B's at a budget, the ratio A / B is shown, as x0.50.
    """
    blocks = {name: (entry, _count(entry)) for name, entry in record["sets"].items()}
    if len(blocks) > 1:
        blocks["mean over sets"] = (record, "")
    parts = [f"A  {record['a']}\nB  {record['b']}"]
    picked = np.unique(np.linspace(0, len(record["budgets"]) - 1, min(columns, len(record["budgets"]))).round())
    picked = picked.astype(int).tolist()
    for name, (found, count) in blocks.items():
        rows = [[f"{name}{count}", "A", "B", "A - B", "95%"]]
        rows += [_row(key, entry) for key, entry in _shown(found["metrics"], record["budgets"], picked)]
        rows += token_efficiency.rows(found["efficiency"], picked)
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        parts.append("\n".join(lines))
    refused = [entry["efficiency"]["refused"] for entry in record["sets"].values() if "refused" in entry["efficiency"]]
    return "\n\n".join(parts + [f"note: {note}" for note in record["notes"] + refused])


def _count(entry: dict) -> str:
    found = [f"{entry['problems']} problems"]
    found += [f"{entry[f'only_{side}']} of {side.upper()} only" for side in "ab" if entry[f"only_{side}"]]
    return f" ({', '.join(found)})"


def _shown(found: dict, budgets: list[int], picked: list[int]) -> list[tuple[str, dict]]:
    """(label, entry of plain numbers) of the lines of a block."""
    at = lambda entry, i: {key: value[i] for key, value in entry.items()}  # noqa: E731
    lines = [(f"accuracy at {budgets[i]}", at(found["accuracy"], i)) for i in picked]
    for key, entry in found.items():
        if key != "accuracy":
            of_budgets = isinstance(entry["difference"], list)
            lines.append((f"{key} at {budgets[-1]}", at(entry, -1)) if of_budgets else (key, entry))
    return lines


def _row(key: str, entry: dict) -> list[str]:
    scale, digits = (1, 2) if key.startswith("cumulative") else (1, 1) if key.startswith(IN_TOKENS) else (100, 1)

    def text(value, sign=""):
        if value is None:
            return "none"
        return f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"  # no -0.0

    low, high = (text(value, "+") for value in entry["ci95"])
    return [key, text(entry["a"]), text(entry["b"]), text(entry["difference"], "+"), f"[{low}, {high}]"]
