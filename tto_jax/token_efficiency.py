"""Tokens to equal accuracy: what run A needs for the accuracy that run B has at each of its budgets.

A run's curve has a point a budget: the mean over problems of `spent` (prompt, prefix, insertion and one answer, in
tokens) and of the accuracy. Both runs are measured on the same problems, which are resampled together.
"""

import numpy as np

from tto_jax.core import efficiency
from tto_jax.summary import plain

_LEVELS = (0.025, 0.975)


def check_problems(name: str, a: tuple[str, np.ndarray], b: tuple[str, np.ndarray]) -> None:
    """Raises ValueError unless the runs, (name, ids u32[B]) each, were evaluated on the same problems of set `name`."""
    only_a, only_b = (np.setdiff1d(x[1], y[1]).size for x, y in ((a, b), (b, a)))
    if only_a or only_b:
        raise ValueError(
            f"set {name}: token efficiency takes the same problems; {only_a} are of {a[0]} only, {only_b} of {b[0]} "
            "only. Evaluate both runs on one set with the same --problems."
        )


def compare(a: tuple, b: tuple, a_draws: tuple, b_draws: tuple) -> dict:
    """Tokens of both runs to B's accuracies, and their ratio A / B with its 95% interval over problems.

    Args:
      a, b: accuracy f64[S] and spent tokens f64[S] of a run.
      a_draws, b_draws: the same in R resamples, f64[R, S] each.

    Returns:
      Lists of S: `accuracy` (the target), `a` and `b` (tokens; each run's first crossing), `ratio`, `ci95`, `reached`
      (the share of resamples in which A has the accuracy at all) and `at_most` (A has it at its first budget already,
      so that `a` and `ratio` are upper bounds). None stands for what lies beyond A's last budget, in `a`, `ratio` and
      the ends of the interval: A does not have that accuracy.
    """
    mine, reference = needed(a, b[0]), needed(b, b[0])
    draws = needed(a_draws, b_draws[0]) / needed(b_draws, b_draws[0])
    return {
        "accuracy": plain(b[0]),
        "a": _finite(mine),
        "b": _finite(reference),
        "ratio": _finite(mine / reference),
        # Order statistics: between a number and infinity there is nothing to interpolate.
        "ci95": _finite(np.quantile(draws, _LEVELS, axis=0, method="inverted_cdf").T),
        "reached": plain(np.isfinite(draws).mean(axis=0)),
        "at_most": (np.asarray(b[0]) <= a[0][0]).tolist(),
    }


def needed(curve: tuple, target: np.ndarray) -> np.ndarray:
    """Tokens f64[..., K] to the accuracies f64[..., K], of a curve: accuracy and spent tokens f64[..., S].

    Where shorter answers make a longer prefix cheaper, it counts as much as the one before.
    """
    accuracy, spent = curve
    return efficiency.tokens_to_reach(accuracy, np.maximum.accumulate(spent, axis=-1), target)


def _finite(values) -> list:
    return plain(np.where(np.isfinite(values), values, np.nan))


def rows(found: dict, shown: list[int]) -> list[list[str]]:
    """Lines of the comparison's table, for the budgets numbered `shown`: label, A, B, ratio, interval."""
    if "refused" in found:
        return []
    return [_row({key: values[i] for key, values in found.items()}) for i in shown]


def _row(entry: dict) -> list[str]:
    bound = "<=" if entry["at_most"] else ""
    tokens = "never" if entry["a"] is None else f"{bound}{entry['a']:.1f}"
    ratio = "none" if entry["ratio"] is None else f"{bound}x{entry['ratio']:.2f}"
    low, high = ("never" if value is None else f"x{value:.2f}" for value in entry["ci95"])
    return [f"tokens to {100 * entry['accuracy']:.1f}%", tokens, f"{entry['b']:.1f}", ratio, f"[{low}, {high}]"]
