"""Variants beside a baseline: what their evaluated runs measure, and paired differences with t-intervals over pairs.

A pair is a run of the variant and one of the baseline that share both seeds and problems; both are given as their
results.json. The tables are Markdown.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tto_jax import token_efficiency
from tto_jax.core import anytime
from tto_jax.summary import plain

Pairs = Sequence[tuple[dict, dict]]  # (run, run of the baseline)
_SIZES = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def measures(results: Sequence[dict]) -> tuple[str, ...]:
    """Names of what is compared: accuracies, lengths, each normalised regret that all have, sampled tokens."""
    shared = set.intersection(*(set(found["regret_tokens"]) for found in results))
    return ("final", "anytime", "mean_length", *(f"regret@{c}" for c in sorted(shared)), "tokens")


def differences(pairs: Pairs) -> dict[str, dict]:
    """Differences run - baseline of every measure, and tokens to equal accuracy.

    Returns:
      For each of `measures` {"difference": mean over pairs, "ci95": its t-interval, None of one pair, "differences"},
      and `tokens_to`, see `tokens_to`. final, anytime and regret@C0 are shares, mean_length is in tokens of thinking,
      `tokens` is what training sampled.
    """
    found = {}
    for name in measures([one for pair in pairs for one in pair]):
        values = [run[name] - base[name] for run, base in pairs]
        mean, interval = _mean(values)
        found[name] = {"difference": mean, "ci95": interval, "differences": values}
    return found | {"tokens_to": tokens_to(pairs)}


def tokens_to(pairs: Pairs) -> dict[str, list]:
    """Tokens, run / baseline, to the accuracy that the baseline's run has at each of its S budgets.

    Tokens are those of prompt, prefix, insertion and one answer, see `core.efficiency`.

    Returns:
      Lists of S: `accuracy`, the baseline's mean; `ratio`, geometric mean over pairs, and `ci95`, t-interval of the
      logarithms, both None unless every run has that accuracy (ci95 also of one pair); `reached`, of how many runs it
      is; `at_most`: some run has it at its first budget already, so that the ratio is an upper bound.
    """
    ratios, early = [], []
    for run, base in pairs:
        target = np.asarray(base["accuracy"])
        mine, its = (token_efficiency.needed((one["accuracy"], one["spent"]), target) for one in (run, base))
        ratios.append(mine / its)
        early.append(target <= run["accuracy"][0])
    ratios = np.array(ratios)
    means = [_mean(np.log(column).tolist()) if np.isfinite(column).all() else (None, None) for column in ratios.T]
    return {
        "accuracy": plain(np.mean([base["accuracy"] for _, base in pairs], axis=0)),
        "ratio": [None if mean is None else math.exp(mean) for mean, _ in means],
        "ci95": [None if interval is None else [math.exp(x) for x in interval] for _, interval in means],
        "reached": np.isfinite(ratios).sum(axis=0).tolist(),
        "at_most": np.any(early, axis=0).tolist(),
    }


def _mean(values: list[float]) -> tuple[float, list[float] | None]:
    """Mean and t-interval; None where there is one value."""
    if len(values) < 2:
        return float(values[0]), None
    mean, low, high = anytime.t_interval(values)
    return mean, [low, high]


def tables(baseline: str, bases: Sequence[dict], pairs: dict[str, Pairs], columns: int = 6) -> str:
    """Two tables: a line a variant with its mean over pairs and the difference; tokens to equal accuracy.

    Args:
      baseline: its name. bases: all of its runs.
      pairs: of each other variant; at least one.
      columns: most budgets of the second table.
    """
    found = {name: differences(some) for name, some in pairs.items()}
    runs = {baseline: bases} | {name: [run for run, _ in some] for name, some in pairs.items()}
    names = measures([one for results in runs.values() for one in results])
    rows = [["variant", "runs", *("sampled tokens" if name == "tokens" else name.replace("_", " ") for name in names)]]
    for variant, results in runs.items():
        means = [_text(name)(np.mean([one[name] for one in results])) for name in names]
        if variant in found:
            entries = [found[variant][name] for name in names]
            means = [f"{mean}, {_difference(entry, _text(name))}" for mean, entry, name in zip(means, entries, names)]
        rows.append([variant, str(len(results)), *means])
    tokens = {name: entry["tokens_to"] for name, entry in found.items()}
    budgets = bases[0]["budgets"]
    shown = np.unique(np.linspace(0, len(budgets) - 1, min(columns, len(budgets))).round().astype(int)).tolist()
    reference = np.mean([base["accuracy"] for base in bases], axis=0)
    titles = [f"{100 * reference[i]:.1f} (@{budgets[i]})" for i in shown]
    below = [[f"tokens to the accuracy of {baseline}", *titles]]
    below += [
        [name, *(_ratio({key: values[i] for key, values in entry.items()}, len(pairs[name])) for i in shown)]
        for name, entry in tokens.items()
    ]
    return f"{markdown(rows)}\n\n{markdown(below)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for readers of the text; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def count(number: float, sign: str = "") -> str:
    """A number of tokens for a reader: 1234567 is 1.23M. sign: as in format strings."""
    for unit, size in _SIZES:
        if abs(number) >= size:
            return f"{number / size:{sign}.3g}{unit}"
    return f"{number:{sign}.0f}"


def _text(name: str) -> Callable[..., str]:
    """How a measure is written: lengths and counts in tokens, the others in percent."""
    if name == "tokens":
        return count
    scale = 1 if name == "mean_length" else 100
    return lambda value, sign="": f"{round(scale * value, 1) + 0.0:{sign}.1f}"  # no -0.0


def _difference(entry: dict, text: Callable[..., str]) -> str:
    mean = text(entry["difference"], "+")
    return mean if entry["ci95"] is None else f"{mean} [{text(entry['ci95'][0], '+')}, {text(entry['ci95'][1], '+')}]"


def _ratio(entry: dict, pairs: int) -> str:
    if entry["ratio"] is None:
        return "never" if pairs == 1 else f"in {entry['reached']} of {pairs} runs"
    ratio = f"{'<=' if entry['at_most'] else ''}x{entry['ratio']:.2f}"
    return ratio if entry["ci95"] is None else "{} [{:.2f}, {:.2f}]".format(ratio, *entry["ci95"])
