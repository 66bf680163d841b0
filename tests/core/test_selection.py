"""Selection of traces against loops over exact fractions, and what must hold of any selection."""

import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest

from tto_jax.core import selection
from tto_jax.core.selection import Rule

RULES = [
    Rule(criterion, cut, ties, unfinished)
    for criterion, cut, ties, unfinished in itertools.product(
        selection.CRITERIA, (False, True), selection.TIES, (False, True)
    )
    if not (cut and criterion == "final")
]
B, G, S, A = 40, 5, 4, 3
choose = jax.jit(selection.select, static_argnums=4)


def cases(seed, rate=0.35):
    """Traces of random lengths at fixed budgets: those that end early share forks."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 13, (B, G))
    forks = np.minimum(length[..., None], np.array([2, 5, 8, 12])).astype(np.int32)
    correct = (rng.random((B, G, S, A)) < rate).astype(np.float32)
    correct[0] = 0  # nothing is right
    correct[1] = 1  # everything is
    start = (rng.random((B, G * A)) < 0.2).astype(np.float32)
    return correct, forks, start, rng.random((B, G)) < 0.7


def rate_at(correct, forks, s):
    """The exact mean score of the answers of one trace that share the fork of column s."""
    found = [int(x) for j, column in enumerate(correct) if forks[j] == forks[s] for x in column]
    return Fraction(sum(found), len(found))


def oracle(correct, forks, start, ended, rule):
    """{trace: (column, answer, progress)} of one problem."""
    candidates = {}
    for g in range(len(correct)):
        rates = [rate_at(correct[g], forks[g], s) for s in range(S)]
        best = rates.index(max(rates))
        column = best if rule.cut else S - 1
        if rates[column] == 0 or not (ended[g] or rule.cut or rule.unfinished):
            continue
        worth = {"final": Fraction(1), "best": rates[best], "total": rates[-1]}[rule.criterion]
        answer = next(
            j * A + a for j in range(S) for a in range(A) if forks[g][j] == forks[g][column] and correct[g][j][a] == 1
        )
        before = Fraction(int(start.sum()), start.size)
        candidates[g] = (worth, forks[g][column], (column, answer, float(rates[column] - before)))
    most = max((worth for worth, _, _ in candidates.values()), default=None)
    kept = {g: found for g, found in candidates.items() if found[0] == most}
    if rule.ties == "shortest" and kept:
        first = min(kept, key=lambda g: (kept[g][1], g))
        kept = {first: kept[first]}
    return {g: found[2] for g, found in kept.items()}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_oracle(rule):
    given = cases(0)
    found = jax.device_get(choose(*given, rule))
    number = 0
    for b in range(B):
        wanted = oracle(*(x[b] for x in given), rule)
        assert set(np.flatnonzero(found.kept[b])) == set(wanted)
        for g, (column, answer, progress) in wanted.items():
            assert (found.column[b, g], found.answer[b, g]) == (column, answer)
            assert found.progress[b, g] == pytest.approx(progress, abs=1e-6)
        number += len(wanted)
    assert number > B // 4 and not found.kept[0].any()


def test_what_holds_of_every_selection():
    correct, forks, start, ended = cases(1)
    found = {rule: jax.device_get(choose(correct, forks, start, ended, rule)) for rule in RULES}
    for rule, one in found.items():
        for b, g in np.argwhere(one.kept):
            column, (own, number) = one.column[b, g], divmod(one.answer[b, g], A)
            assert correct[b, g, own, number] == 1 and forks[b, g, own] == forks[b, g, column]
            assert rule.cut or (column == S - 1 and (ended[b, g] or rule.unfinished))
        if rule.ties == "shortest":
            all_ties = found[Rule(rule.criterion, rule.cut, "all", rule.unfinished)]
            assert (one.kept <= all_ties.kept).all()
            np.testing.assert_array_equal(one.kept.sum(axis=1), all_ties.kept.any(axis=1))
    final = found[Rule("final", cut=False)].kept
    for criterion in ("best", "total"):  # whole traces: STaR keeps all that MRT-STaR may
        assert (found[Rule(criterion, cut=False)].kept <= final).all()


def test_order_of_traces_and_start_change_nothing_else():
    correct, forks, start, ended = cases(2)
    order = np.random.default_rng(0).permutation(G)
    for rule in (rule for rule in RULES if rule.ties == "all"):
        one = jax.device_get(choose(correct, forks, start, ended, rule))
        other = jax.device_get(choose(correct[:, order], forks[:, order], 1 - start, ended[:, order], rule))
        np.testing.assert_array_equal(one.kept[:, order], other.kept)
        np.testing.assert_array_equal(one.column[:, order], other.column)
        shift = (start.mean(axis=1) - (1 - start).mean(axis=1))[:, None]
        np.testing.assert_allclose(one.progress[:, order] + shift, other.progress, atol=1e-6)


def test_equal_rates_tie_whatever_the_number_of_answers():
    """2 of 3 at one fork, 4 of 6 at a fork that two columns share: neither is the better one."""
    correct = np.array([[[0, 1, 1], [0, 0, 0]], [[1, 1, 0], [1, 0, 1]]], np.float32)[None]
    forks = np.array([[[3, 6], [2, 2]]], np.int32)
    found = choose(correct, forks, np.zeros((1, 3)), np.ones((1, 2), bool), Rule())
    assert found.kept.tolist() == [[True, True]] and found.column.tolist() == [[0, 0]]
    shortest = choose(correct, forks, np.zeros((1, 3)), np.ones((1, 2), bool), Rule(ties="shortest"))
    assert shortest.kept.tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion": "progress"}, "criterion='progress' is unknown: choose one of"),
        ({"ties": "first"}, "ties='first' is unknown: choose one of"),
        ({"criterion": "final"}, "STaR keeps whole traces"),
    ],
)
def test_rules_that_are_none(options, said):
    with pytest.raises(ValueError, match=said):
        Rule(**options)
