"""Variants side by side: every number against loops over pairs, and what a reader sees."""

import math
import statistics

import numpy as np
import pytest

from tto_jax import variants

T_OF_2 = 4.302652729911275  # 97.5% of Student's t with 2 degrees of freedom


def results(accuracy, spent=(10.0, 20.0, 30.0), **changes):
    found = {
        "budgets": [3, 6, 9],
        "accuracy": list(accuracy),
        "spent": list(spent),
        "anytime": sum(accuracy) / len(accuracy),
        "final": accuracy[-1],
        "mean_length": 21.5,
        "regret_tokens": [9],
        "regret@9": 0.5,
        "tokens": 1_000_000,
    }
    return found | changes


def needed(accuracy, spent, target):
    """Where the polygon through the points first has the target."""
    if target <= accuracy[0]:
        return spent[0]
    for s in range(1, len(accuracy)):
        if accuracy[s - 1] < target <= accuracy[s]:
            return spent[s - 1] + (target - accuracy[s - 1]) / (accuracy[s] - accuracy[s - 1]) * (
                spent[s] - spent[s - 1]
            )
    return math.inf


def t_interval(values):
    half = T_OF_2 * statistics.stdev(values) / math.sqrt(3)
    return [statistics.mean(values) - half, statistics.mean(values) + half]


@pytest.fixture
def pairs():
    rng, found = np.random.default_rng(0), []
    for _ in range(3):
        base, run = np.sort(rng.uniform(0.1, 0.6, 3)), np.sort(rng.uniform(0.5, 0.9, 3))
        run[0] = base[0] - 0.05
        sides = [
            results(x.tolist(), np.sort(rng.uniform(5, 40, 3)), **{"tokens": int(n), "regret@9": float(r)})
            for x, n, r in zip((run, base), rng.integers(1000, 2000, 2), rng.random(2))
        ]
        found.append(tuple(sides))
    return found


def test_differences_equal_loops(pairs):
    found = variants.differences(pairs)
    assert list(found) == ["final", "anytime", "mean_length", "regret@9", "tokens", "tokens_to"]
    for name in ("final", "anytime", "mean_length", "regret@9", "tokens"):
        values = [run[name] - base[name] for run, base in pairs]
        assert found[name]["differences"] == values
        assert found[name]["difference"] == pytest.approx(statistics.mean(values))
        assert found[name]["ci95"] == pytest.approx(t_interval(values))


def test_tokens_to_equal_accuracy_equal_loops(pairs):
    found = variants.tokens_to(pairs)
    for s in range(3):
        ratios = [
            needed(run["accuracy"], run["spent"], base["accuracy"][s])
            / needed(base["accuracy"], base["spent"], base["accuracy"][s])
            for run, base in pairs
        ]
        logs = [math.log(ratio) for ratio in ratios]
        assert found["ratio"][s] == pytest.approx(math.prod(ratios) ** (1 / 3))
        assert found["ci95"][s] == pytest.approx([math.exp(x) for x in t_interval(logs)])
        assert found["accuracy"][s] == pytest.approx(statistics.mean(base["accuracy"][s] for _, base in pairs))
    assert found["reached"] == [3, 3, 3] and found["at_most"] == [False] * 3


def test_an_accuracy_that_a_run_never_has():
    base = results([0.2, 0.4, 0.8])
    found = variants.tokens_to([(results([0.2, 0.5, 0.9]), base), (results([0.3, 0.5, 0.7]), base)])
    assert found["reached"] == [2, 2, 1] and found["at_most"] == [True, False, False]
    assert found["ratio"][2] is None and found["ci95"][2] is None and found["ratio"][0] == 1
    assert found["ci95"][0] == [1, 1]


def test_equal_runs():
    """Whatever is compared with itself: no difference, the same tokens."""
    base = results([0.2, 0.4, 0.8])
    found = variants.differences([(base, base)] * 2)
    assert all(
        found[name]["difference"] == 0 and found[name]["ci95"] == [0, 0] for name in found if name != "tokens_to"
    )
    assert found["tokens_to"]["ratio"] == [1, 1, 1]


def test_regret_is_compared_where_all_have_it():
    a, b = results([0.1] * 3), results([0.1] * 3, **{"regret_tokens": [9, 18], "regret@18": 0.4})
    assert variants.measures([a, b]) == ("final", "anytime", "mean_length", "regret@9", "tokens")
    assert variants.measures([b, b])[3:5] == ("regret@9", "regret@18")


def test_what_is_shown():
    bases = [results([0.2, 0.4, 0.8]), results([0.3, 0.4, 0.6])]
    run = results([0.5, 0.6, 0.7], mean_length=11.5, tokens=1_500_000)
    text = variants.tables("grpo", bases, {"brpo": [(run, base) for base in bases], "one": [(run, bases[0])]})
    above, below = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in x.splitlines()] for x in text.split("\n\n")
    )
    assert above[0] == ["variant", "runs", "final", "anytime", "mean length", "regret@9", "sampled tokens"]
    assert above[2] == ["grpo", "2", "70.0", "45.0", "21.5", "50.0", "1M"]
    assert above[3][:2] == ["brpo", "2"] and above[3][2].startswith("70.0, +0.0 [-127.1, +127.1]")
    assert above[3][4:] == ["11.5, -10.0 [-10.0, -10.0]", "50.0, +0.0 [+0.0, +0.0]", "1.5M, +500k [+500k, +500k]"]
    assert above[4] == ["one", "1", "70.0, -10.0", "60.0, +13.3", "11.5, -10.0", "50.0, +0.0", "1.5M, +500k"]
    assert below[0] == ["tokens to the accuracy of grpo", "25.0 (@3)", "40.0 (@6)", "70.0 (@9)"]
    assert below[2] == ["brpo", "<=x1.00 [1.00, 1.00]", "<=x0.50 [0.50, 0.50]", "in 1 of 2 runs"]
    assert below[3] == ["one", "<=x1.00", "<=x0.50", "never"]
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()}) == 1, "aligned"


def test_numbers_of_tokens():
    assert [variants.count(x) for x in (0, 999, 1000, 1_234_567, 2.5e9)] == ["0", "999", "1k", "1.23M", "2.5G"]
    assert variants.count(-1500, "+") == "-1.5k" and variants.count(500, "+") == "+500"
