"""Tokens to equal accuracy of two evaluations: against loops over problems and resamples."""

import json

import numpy as np
import pytest
from test_evaluation import evaluated, make, random_scores

from tto_jax import comparison, summary, token_efficiency
from tto_jax.core import efficiency

BUDGETS = (3, 6, 9)


def runs(a, b, /, ids=None, **lengths):
    sides = {"a": make(a, lengths.get("a"), ids), "b": make(b, lengths.get("b"), ids)}
    return [evaluated(name, {"x": one}) for name, one in sides.items()]


def curve(one, weights):
    """Points of a run: prompts of 4 tokens, an inserted and a sampled one; problems count as often as drawn."""
    tokens, accuracy = [], []
    for s in range(3):
        spent = [np.mean([min(length, BUDGETS[s]) + 6 for length in row]) for row in one.length]
        tokens.append(max([np.average(spent, weights=weights), *tokens]))
        accuracy.append(np.average([problem[:, s].mean() for problem in one.correct], weights=weights))
    return accuracy, tokens


def test_record_equals_loops():
    rng = np.random.default_rng(0)
    a, b = random_scores(0, 30, p=0.35), random_scores(1, 30, p=0.3)
    a[:, :, 0], b[:, :, 1] = a[:, :, 0] * (rng.random(30) < 0.5)[:, None, None], 1 - (1 - b[:, :, 1]) * 0.9
    lengths = {name: rng.integers(1, 10, (30, 5)) for name in "ab"}
    sides = runs(a, b, **lengths)
    record = comparison.compare(*sides)
    found, one, other = record["efficiency"], sides[0].sets["x"], sides[1].sets["x"]

    def ratios(weights):
        (mine, my_tokens), (target, tokens) = curve(one, weights), curve(other, weights)
        reach = efficiency.tokens_to_reach
        return list(zip(reach(mine, my_tokens, target), reach(target, tokens, target)))

    counts = np.asarray(summary.counts_of("x", 30, 0))[:300]
    need = np.array(ratios(np.ones(30)))
    as_number = lambda key: np.array([np.inf if x is None else x for x in np.ravel(found[key])], float)  # noqa: E731
    np.testing.assert_allclose(as_number("a"), need[:, 0], rtol=1e-4)
    np.testing.assert_allclose(as_number("b"), need[:, 1], rtol=1e-4)
    np.testing.assert_allclose(as_number("ratio"), need[:, 0] / need[:, 1], rtol=1e-4)
    draws = np.array([[x / y for x, y in ratios(drawn)] for drawn in counts])
    np.testing.assert_allclose(found["reached"], np.isfinite(draws).mean(axis=0), atol=0.08)
    low, high = as_number("ci95").reshape(3, 2).T
    for s in range(3):
        inside = np.mean((draws[:, s] >= low[s]) & (draws[:, s] <= high[s]))
        assert 0.9 <= inside <= 0.99 or low[s] == high[s]
    assert 0 < min(found["reached"]) < 1, "one of the targets is reached in some resamples only"
    assert record["sets"]["x"]["efficiency"] == found and json.loads(json.dumps(record, allow_nan=False))


def test_equal_runs_need_equal_tokens():
    a = np.sort(random_scores(2, 30), axis=2)  # accuracy grows
    found = comparison.compare(*runs(a, a))["efficiency"]
    assert found["ratio"] == [1, 1, 1] and found["ci95"] == [[1, 1]] * 3 and found["reached"] == [1, 1, 1]
    assert found["a"] == found["b"] == pytest.approx([9, 12, 15]) and found["at_most"] == [True, False, False]


def test_half_of_the_tokens():
    """A thinks exactly what B thinks, in half of the budget: the ratio is known, and has no spread."""
    b = np.tile(np.array([0.0, 0.5, 1.0])[:, None], (30, 5, 1, 2))
    a = np.tile(np.array([0.5, 1.0, 1.0])[:, None], (30, 5, 1, 2))
    found = comparison.compare(*runs(a, b))["efficiency"]
    assert found["a"] == [9, 9, 12] and found["b"] == [9, 12, 15] and found["at_most"] == [True, True, False]
    np.testing.assert_allclose(found["ratio"], [1, 9 / 12, 12 / 15])
    np.testing.assert_allclose(found["ci95"], np.transpose([found["ratio"]] * 2))


def test_what_is_never_reached_is_said():
    a, b = np.zeros((30, 5, 3, 2)), np.tile(np.array([0.0, 1.0, 1.0])[:, None], (30, 5, 1, 2))
    record = comparison.compare(*runs(a, b))
    found = record["efficiency"]
    assert found["a"] == [9, None, None] and found["ratio"] == [1, None, None] and found["reached"] == [1, 0, 0]
    assert found["ci95"] == [[1, 1], [None, None], [None, None]]
    text = comparison.table(record)
    assert "tokens to 100.0%" in text and "never" in text and "[never, never]" in text and "<=x1.00" in text


def test_different_problems_are_refused():
    a, b = (make(random_scores(seed, 30), ids=np.arange(first, first + 30)) for seed, first in ((0, 0), (1, 2)))
    record = comparison.compare(evaluated("a", {"x": a}), evaluated("b", {"x": b}))
    assert set(record["efficiency"]) == set(record["sets"]["x"]["efficiency"]) == {"refused"}
    said = "set x: token efficiency takes the same problems; 2 are of a only, 2 of b only"
    assert said in record["efficiency"]["refused"] and f"note: {said}" in comparison.table(record)
    with pytest.raises(ValueError, match=said):
        token_efficiency.check_problems("x", ("a", a.id), ("b", b.id))


def test_runs_with_other_numbers_of_answers_compare_what_both_have():
    sides = [
        evaluated(name, {"x": make(random_scores(0, 30, answers=n))}, answers=n) for name, n in (("a", 2), ("b", 1))
    ]
    record = comparison.compare(*sides)
    assert not [key for key in record["metrics"] if key.startswith("fork_maj")]
    assert record["notes"] == ["answers: 2 and 1"] and "ratio" in record["efficiency"]
