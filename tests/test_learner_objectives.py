"""The objectives beside plain PPO: a step's value and gradient against float64 loops over tokens and sequences."""

import dataclasses

import jax
import numpy as np
import pytest
from test_learner import ADAM, LOSS, MODEL, A, S, adam, assert_close, fresh_state, host_params, random_rows
from test_learner import weighted_gradient as gradient_of_weights

from tto_jax import learner
from tto_jax.core import token_tree

NUMBER = token_tree.num_sequences(S, A)
CASES = [
    {"dual_clip": 1.2, "clip_high": 0.1},
    {"objective": "gspo", "aggregate": "sequence_mean", "clip_low": 0.1, "clip_high": 0.15},
    {"objective": "cispo", "clip_low": 0.3, "clip_high": 0.2},
    {"aggregate": "token_mean"},
    {"aggregate": "sequence_mean", "importance": "token", "importance_cap": 1.5},
    {"objective": "gspo", "importance": "sequence", "importance_cap": 2.5},
]


def members(rows):
    """Tokens of each sequence: {(row, sequence): [columns]}, trained ones only."""
    found = {}
    for n, t in np.argwhere(rows.loss_mask):
        found.setdefault((n, int(rows.sequence[n, t])), []).append((n, t))
    return found


def objective(config, rows, current):
    """(loss, what the gradient is taken of) of log-probs `current` [N, L], in float64 and by loops."""
    old, sampler, advantage = (
        np.asarray(getattr(rows, x), np.float64) for x in ("old_logprob", "sampler_logprob", "advantage")
    )
    groups, value = members(rows), 0.0
    tokens = sum(map(len, groups.values()))
    for own in groups.values():
        sequence_ratio = np.exp(sum(current[at] - old[at] for at in own) / len(own))
        gap = sum(old[at] - sampler[at] for at in own)
        for at in own:
            weight = {
                "constant": 1 / config.constant,
                "token_mean": 1 / tokens,
                "sequence_mean": 1 / (len(own) * len(groups)),
            }[config.aggregate]
            trust = {"none": 0.0, "token": old[at] - sampler[at], "sequence": gap}[config.importance]
            a = advantage[at] * min(np.exp(trust), np.inf if config.importance == "none" else config.importance_cap)
            ratio = sequence_ratio if config.objective == "gspo" else np.exp(current[at] - old[at])
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            if config.objective == "cispo":
                value -= weight * a * clipped * current[at]
                continue
            gain = min(ratio * a, clipped * a)
            value -= weight * (max(gain, config.dual_clip * a) if config.dual_clip and a < 0 else gain)
    return value


def slopes(config, rows, current):
    """d loss / d log-prob of each token by central differences; CISPO's ratio is held."""
    found = np.zeros(current.shape)
    for at in map(tuple, np.argwhere(rows.loss_mask)):
        if config.objective == "cispo":  # the value is linear in the log-prob once the ratio is a constant
            ratio = np.exp(current[at] - float(rows.old_logprob[at]))
            found[at] = -min(max(ratio, 1 - config.clip_low), 1 + config.clip_high) * float(rows.advantage[at])
            found[at] /= config.constant
            continue
        ends = []
        for step in (1e-5, -1e-5):
            moved = current.copy()
            moved[at] += step
            ends.append(objective(config, rows, moved))
        found[at] = (ends[0] - ends[1]) / 2e-5
    return found


@pytest.mark.parametrize("change", CASES, ids=lambda change: "-".join(map(str, change.values())))
def test_value_and_gradient_equal_loops(change):
    rows = random_rows()
    config = dataclasses.replace(LOSS, buckets=2, micro_tokens=60, num_sequences=NUMBER, **change)
    current = np.asarray(learner.score_logprobs(MODEL, LOSS, host_params(), rows)[0], np.float64)
    # A sampler that is near: products over a sequence stay below and above the cap.
    near = np.where(
        rows.loss_mask, rows.old_logprob + 0.1 * np.sin(np.arange(rows.tokens.size)).reshape(rows.tokens.shape), 0.0
    )
    rows = dataclasses.replace(rows, sampler_logprob=near.astype(np.float32))
    state, metrics = learner.train_step(MODEL, config, ADAM, fresh_state(), rows)
    assert metrics["loss/total"] == pytest.approx(objective(config, rows, current), rel=1e-4)
    expected = gradient_of_weights(slopes(config, rows, current).astype(np.float32), host_params(), rows)
    assert_close([x / (1 - ADAM.b1) for x in leaves(adam(state).mu)], leaves(expected), 2e-4)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": "reinforce"}, "ppo"),
        ({"aggregate": "mean"}, "token_mean"),
        ({"importance": "row"}, "sequence"),
        ({"objective": "gspo"}, "num_sequences=0"),
        ({"aggregate": "sequence_mean"}, "num_sequences=0"),
        ({"dual_clip": 0.9}, "above 1"),
        ({"dual_clip": 3.0, "objective": "cispo"}, "cispo has none"),
        ({"importance_cap": 0.0}, "positive"),
    ],
)
def test_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(LOSS, **change)
