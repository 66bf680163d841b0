"""Prefixes of an earlier policy: which they are, against loops; and training runs from them."""

import collections
import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from kill_program import differences
from test_train_page import SMALL, Compilations, config_of, run

from tto_jax import checkpoint, learner, metrics, prefixes, settings, sharding, train, warm_start
from tto_jax.core.types import Prompts
from tto_jax.data import ProblemSource, evaluation_batches

EVERY, TOKENS, BLOCK, STEPS = 2, 4, 2, 6
# Prefixes of 0, 2 or 4 tokens. Five steps in, the last checkpoint is one whose stale parameters are a step old.
PREFIX = {
    **{"prefix__every": EVERY, "prefix__tokens": TOKENS, "prefix__rule": "blocks", "episodes__block": BLOCK},
    **{"rollout__start": True, "credit__estimator__kind": "mrt_joint", "credit__answers": "grpo"},
    **{"evaluation__problems": 0, "checkpoint__every": 3, "checkpoint__keep": 10, "log__samples_every": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Holds the workdirs and beside them the one warm start."""
    return tmp_path_factory.mktemp("runs")


@dataclasses.dataclass
class Seen:
    """What a run did at each step."""

    stale: list
    drawn: list
    rows: list
    before: list  # prompts
    params: list  # the policy, before its update


@pytest.fixture(scope="module")
def whole(base):
    """A run without interruption: the first to run, so that it meets nothing compiled already."""
    seen = Seen([], [], [], [], [])
    draw, score = prefixes.draw, learner.score_logprobs

    def watched_draw(plan, params, prompts, *rest):
        seen.stale.append(jax.device_get(params))
        seen.before.append(prompts)
        seen.drawn.append(draw(plan, params, prompts, *rest))
        return seen.drawn[-1]

    def watched_score(model, config, params, rows):
        seen.params.append(jax.device_get(params))
        seen.rows.append(jax.device_get(rows))
        return score(model, config, params, rows)

    with pytest.MonkeyPatch.context() as patch:
        compilations = Compilations(patch)
        patch.setattr(train.prefixes, "draw", watched_draw)
        patch.setattr(train.learner, "score_logprobs", watched_score)
        workdir = run(base / "whole", **PREFIX)
        compilations.stop()
    return workdir, seen, compilations


def plan_of(base):
    return settings.build(config_of(base, **PREFIX))


def rows_of(workdir):
    return [row for row in metrics.read_rows(workdir) if "score/anytime" in row]


def assert_bitwise(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# ---------------------------------------------------------------- which episodes


def test_a_prefix_ends_where_an_episode_does():
    """Against a loop: behind no token that ended the trace, within so many tokens, each place once."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 12, 300)
    forks = np.sort(rng.integers(0, 12, (300, 4)), axis=1)
    forks = np.minimum(np.concatenate([forks, np.full((300, 1), 99)], axis=1), length[:, None])
    for most in (1, 5, 20):
        for row, n, found in zip(forks.tolist(), length, prefixes.whole_episodes(forks, length, most), strict=True):
            expected = [0]
            for fork in row:
                if expected[-1] < fork < n and fork <= most:
                    expected.append(fork)
            assert found.tolist() == expected


def test_every_number_of_episodes_is_equally_likely():
    """By seed, step and problem alone: neither the order of the rows nor what else is there matters."""
    ids = np.arange(4000, dtype=np.uint32)
    most = np.tile([0, 1, 3, 5], 1000)
    found = prefixes.numbers(7, 3, ids, most)
    for n in (0, 1, 3, 5):
        counted = collections.Counter(found[most == n].tolist())
        assert set(counted) == set(range(n + 1))
        share = 1 / (n + 1)
        assert all(abs(k - 1000 * share) <= 5 * math.sqrt(1000 * share * (1 - share)) for k in counted.values())
    order = np.random.default_rng(1).permutation(4000)[:500]
    np.testing.assert_array_equal(prefixes.numbers(7, 3, ids[order], most[order]), found[order])
    for seed, step in ((8, 3), (7, 4)):
        assert (prefixes.numbers(seed, step, ids, most) != found).any()


def test_prompts_go_on_with_prefixes():
    prompts = Prompts(tokens=np.array([[5, 6, 0], [7, 8, 9]]), length=np.array([2, 3]), id=np.array([3, 4], np.uint32))
    trace = np.array([[1, 2, 3], [4, 5, 6]])
    found = prefixes.extended(prompts, trace, np.array([2, 0]), 6, pad_id=11)
    assert found.tokens.tolist() == [[5, 6, 1, 2, 11, 11], [7, 8, 9, 11, 11, 11]]
    assert found.length.tolist() == [4, 3] and found.id is prompts.id


@pytest.mark.parametrize("rule", ["budgets", "blocks", "delimiters", "paragraphs"])
def test_rules(base, rule):
    """Ends of episodes within the prefix's tokens, of each of the rules, on two traces of labels and digits."""
    changes = {"prefix__rule": rule, "episodes__markers": ("a", "b"), "episodes__separator": " "}
    changes |= {"episodes__gap": 0, "episodes__group": 1, "prefix__tokens": 5}
    plan = settings.build(config_of(base, **PREFIX | changes))
    texts = ["a 1 1 b 2 2", "b 1 </think>"]
    ids = [plan.tokenizer.encode(text) for text in texts]
    tokens = np.array([row + [0] * (6 - len(row)) for row in ids])
    length = np.array([6, 3])
    found = prefixes.whole_episodes(plan.prefix.forks(tokens, length), length, plan.prefix.tokens)
    expected = {
        "budgets": ([0, 3], [0]),
        "blocks": ([0, 2, 4], [0, 2]),
        "delimiters": ([0, 3], [0]),
        "paragraphs": ([0, 1, 2, 3, 4, 5], [0, 1, 2]),
    }
    assert [ends.tolist() for ends in found] == list(map(list, expected[rule]))


# ---------------------------------------------------------------- a run


def test_rows(whole):
    """Prefixes within their bound, in the tokens that count; the trainer sees the sampler's distribution."""
    before = 0
    for number, row in enumerate(rows_of(whole[0])):
        assert row["prefix/age"] == number % EVERY
        assert 0 <= row["prefix/length"] == BLOCK * row["prefix/episodes"] <= TOKENS
        assert row["logprob_gap/max"] <= 1e-5
        # 16 traces of up to 6 tokens, 3 forks x 2 one-token answers each; 4 earlier traces of up to 5 tokens.
        assert 4 <= row["prefix/sampled"] <= 4 * (TOKENS + 1)
        assert row["length/mean"] * 16 + 96 + row["prefix/sampled"] == pytest.approx(row["tokens"] - before)
        before = row["tokens"]
    assert sum(row["prefix/length"] for row in rows_of(whole[0])) > 0


def test_prefixes_are_tokens_of_the_earlier_policy(whole, base):
    """Sampled anew with the parameters of the last refresh, the initial ones at first: the same prompts."""
    workdir, seen, _ = whole
    plan, config = plan_of(base), config_of(base, **PREFIX)
    initial = warm_start.get(config, plan, workdir)
    assert len(seen.stale) == STEPS
    for step in range(1, STEPS + 1):
        refreshed = (step - 1) // EVERY * EVERY  # after this step
        assert_bitwise(seen.stale[step - 1], seen.params[refreshed])
    assert_bitwise(seen.stale[0], initial)
    moved = [float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (seen.stale[0], seen.stale[2])))]
    assert max(moved) > 0, "the refresh changed nothing"
    for step in (1, 2):
        key = sharding.put(jax.random.fold_in(jax.random.key(plan.seed), step))
        again = prefixes.draw(plan, initial, seen.before[step - 1], key, step)
        assert_bitwise(dataclasses.replace(again, seconds=0.0).prompts, seen.drawn[step - 1].prompts)


def test_no_prefix_ends_thinking(whole, base):
    plan = plan_of(base)
    for prompts, drawn in zip(whole[1].before, whole[1].drawn):
        np.testing.assert_array_equal(drawn.prompts.id, prompts.id)
        for row, n, found, longer in zip(prompts.tokens, prompts.length, drawn.prefixes, drawn.prompts.tokens):
            assert plan.tokenizer.think_end_id not in found
            assert longer[: n + len(found)].tolist() == row[:n].tolist() + found
        np.testing.assert_array_equal(drawn.prompts.length, prompts.length + drawn.length)


def test_no_token_of_a_prefix_is_trained(whole, base):
    plan = plan_of(base)
    for rows, drawn in zip(whole[1].rows, whole[1].drawn, strict=True):
        assert rows.tokens.shape[0] == plan.rows and (rows.tree[:, : plan.context_pad] >= 0).any(axis=1).all()
        assert not rows.loss_mask[:, : plan.context_pad].any()
        assert (rows.position[rows.loss_mask] >= np.repeat(drawn.prompts.length, 4).min()).all()
        for n, row in enumerate(rows.tokens):
            end = drawn.prompts.length[n // 4]
            assert row[:end].tolist() == drawn.prompts.tokens[n // 4][:end].tolist()
            assert (rows.position[n][rows.loss_mask[n]] >= end).all()


def test_later_steps_compile_nothing(whole):
    """The first samples are written after the first row; the first refresh comes after the second."""
    counts = dict(whole[2].at)
    assert counts[1] > 5 and {counts[step] for step in range(2, STEPS + 1)} == {counts[2]}


def test_samples_show_the_prefix(whole):
    samples = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == STEPS * SMALL["log.samples"]
    assert all(len(sample["prefix"].split()) in (0, 2, 4) for sample in samples)
    assert "prefix: " in (whole[0] / "samples.txt").read_text()


def test_a_kill_changes_nothing(whole, base):
    """It dies between two refreshes, and goes on from a checkpoint whose stale parameters are a step old."""
    workdir = base / "killed"
    write = metrics.MetricsWriter.write

    def write_and_raise(writer, step, row):
        write(writer, step, row)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(metrics.MetricsWriter, "write", write_and_raise)
        run(workdir, **PREFIX)
    run(workdir, **PREFIX)
    assert differences(whole[0], workdir) == []
    plan = plan_of(base)
    with checkpoint.Checkpointer(workdir / "checkpoints", keep=10) as saved:
        state, _ = saved.restore(3, learner.abstract_state(plan.model, plan.optimizer, lags=True))
    assert_bitwise(state.stale, whole[1].params[2])


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2)])
@pytest.mark.slow
def test_on_a_mesh(whole, base, shape):
    plan = plan_of(base)
    batch = next(evaluation_batches(ProblemSource(plan.task, "train", 4), plan.tokenizer, 4, plan.prompt_pad))
    key = jax.random.key(5)
    alone = prefixes.draw(plan, whole[1].stale[0], batch.prompts, jax.device_put(key), 1)
    mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])
    with sharding.use(mesh):
        placed = sharding.place(mesh, whole[1].stale[0], plan.model.num_kv_heads)
        many = prefixes.draw(plan.on(mesh), placed, batch.prompts, sharding.put(key), 1, True)
    assert_bitwise(alone.prompts, many.prompts)
