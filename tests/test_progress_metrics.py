"""Progress and regret of a step's metrics against loops over traces and answers."""

import itertools

import numpy as np
import pytest

from configs import peak
from tto_jax import diagnostics, settings

B, G, S, A = 2, 3, 4, 2
BUDGETS = (6, 12, 18, 24)


def plan_of(start):
    config = peak.get_config("brpo,fast")
    config.rollout.start = start
    return settings.build(config)


def batch(start, seed=0):
    rng = np.random.default_rng(seed)
    size = S + start
    forks = np.minimum(rng.integers(1, 25, (B, G, 1)), BUDGETS)
    forks = np.concatenate([np.zeros((B, G, int(start)), int), forks], axis=-1)
    correct = rng.integers(0, 2, (B, G, size, A)).astype(np.float32)
    return correct, forks, rng.integers(3, 9, B), rng.integers(1, 5, (B, G, size, A))


def pooled(correct, forks, b, g, s, of):
    """Mean over all answers of the trace that share the fork."""
    same = [
        float(of[b, g, j, a]) for j in range(correct.shape[2]) if forks[b, g, j] == forks[b, g, s] for a in range(A)
    ]
    return sum(same) / len(same)


def normalized_regret(accuracy, tokens, limit):
    """One minus the share of the area under the curve from (0, 0), piece by piece; flat behind its last point."""
    points = [(0.0, 0.0), *zip(tokens, accuracy), (max(limit, tokens[-1]), accuracy[-1])]
    area = 0.0
    for (x, y), (to, end) in itertools.pairwise(points):
        if x < limit and to > x:
            stop = min(to, limit)
            area += (stop - x) * (y + y + (end - y) * (stop - x) / (to - x)) / 2
    return 1 - area / limit


@pytest.mark.parametrize("start", [False, True])
def test_metrics_equal_loops(start):
    plan = plan_of(start)
    correct, forks, prompt, answer = batch(start)
    row = diagnostics.progress_metrics(correct, forks.reshape(B * G, -1), prompt, answer.reshape(B * G, -1, A), plan)
    J = np.asarray(
        [[[pooled(correct, forks, b, g, s, correct) for s in range(S + start)] for g in range(G)] for b in range(B)]
    )
    gains, regret, group, normalised = [[] for _ in range(S)], [], [], []
    for b in range(B):
        first = sum(J[b, :, 0]) / G if start else None
        best = max(J[b, g, s] for g in range(G) for s in range(start, S + start))
        for g in range(G):
            own, at = J[b, g, start:].tolist(), forks[b, g, start:].tolist()
            for s in range(S):
                before = own[s - 1] if s else first
                if before is not None and at[s] > (at[s - 1] if s else 0):
                    gains[s].append(own[s] - before)
            regret.append(sum(1 - value for value in own))
            group.append(sum(best - value for value in own))
            tokens = []
            for s in range(S):
                cost = prompt[b] + at[s] + pooled(correct, forks, b, g, s + start, answer)
                tokens.append(max([cost, *tokens]))
            normalised.append([normalized_regret(own, tokens, float(limit)) for limit in BUDGETS])
    for s, name in enumerate(BUDGETS):
        mean = sum(gains[s]) / len(gains[s]) if gains[s] else None
        assert row[f"progress/{name}"] == (None if mean is None else pytest.approx(mean, abs=1e-6))
        expected = np.mean([values[s] for values in normalised])
        assert row[f"regret/normalized/{name}"] == pytest.approx(expected, abs=1e-5)
    assert (row["progress/6"] is not None) == start
    assert row["regret/cumulative"] == pytest.approx(np.mean(regret), abs=1e-6)
    assert row["regret/group"] == pytest.approx(np.mean(group), abs=1e-6)


def test_rows_of_episodes_name_no_budgets():
    """There are none: columns are numbered, and regret is that of whole traces."""
    config = peak.get_config("mrt_online,fast")
    plan = settings.build(config)
    correct, forks, prompt, answer = batch(False)
    row = diagnostics.progress_metrics(correct, forks.reshape(B * G, -1), prompt, answer.reshape(B * G, -1, A), plan)
    names = {f"progress/episode_{s}" for s in range(1, S + 1)}
    assert set(row) == names | {"regret/cumulative", "regret/group", "regret/normalized/24"}
    assert plan.schedule.tokens is None
