"""The rollout engine on a tiny random model: samples, their log-probs, and what the layout may not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax import learner, rollout
from tto_jax.core import token_tree
from tto_jax.core.budgets import BudgetSchedule, block_mask, forks_at_budgets
from tto_jax.core.sampling import SampleConfig
from tto_jax.core.types import Credit, Prompts
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig
from tto_jax.rollout import RolloutConfig, thinking

B, G, A, P, CAP = 4, 4, 3, 5, 4
BUDGETS = (2, 5, 7, 11)
S, C = len(BUDGETS), BUDGETS[-1]
THINK_END, EOS, VOCABULARY = 1, 2, 24
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    mlp_size=20,
    max_position=64,
    rope_theta=50.0,
    tie_embeddings=False,
    learned_positions=True,
)
CONFIG = RolloutConfig(
    group_size=G,
    trace_pad=C,
    answers=A,
    answer_cap=CAP,
    think_end=THINK_END,
    eos=EOS,
    elicit_ended=(5, 6),
    elicit_cut=(7, 8, 9),
    segment=4,
)
ONE_TOKEN = dataclasses.replace(CONFIG, answer_cap=1, eos=-1, sample=SampleConfig(temperature=0.7))
# Nothing is inserted after a trace that has ended (as in MRT), or nowhere.
SILENT_END = dataclasses.replace(CONFIG, elicit_ended=())
SILENT = dataclasses.replace(CONFIG, elicit_ended=(), elicit_cut=())
SILENT_ONE_TOKEN = dataclasses.replace(ONE_TOKEN, elicit_ended=())
SCHEDULE = BudgetSchedule.from_prior(BUDGETS)


@functools.cache
def params():
    """Random, and large enough that distributions are far from uniform and depend on the context."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(lambda: decoder.init_params(MODEL, 0))
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape) + (x.ndim == 1), jnp.float32), like)


def make_prompts(pad=P):
    rng = np.random.default_rng(1)
    tokens = np.zeros((B, pad), np.int32)
    tokens[:, :P] = rng.integers(10, VOCABULARY, size=(B, P))
    tokens[1] = tokens[0]  # the same prompt, another problem
    length = np.asarray([P, P, 1, 3], np.int32)
    return Prompts(tokens=tokens, length=length, id=np.asarray([7, 4_000_000_000, 0, 12], np.uint32))


def take(prompts, index):
    return jax.tree.map(lambda x: x[np.asarray(index)], prompts)


def run(config=CONFIG, prompts=None, weights=None, step=50, schedule=SCHEDULE, model=MODEL, first_fork=None, first=0):
    """(traces, forks, answers) of one rollout, on the host; the first column's fork may be set."""
    prompts, weights = make_prompts() if prompts is None else prompts, params() if weights is None else weights
    key = jax.random.fold_in(jax.random.key(0), step)
    prompts = jax.device_put(prompts)
    traces, trunk = rollout.sample_traces(model, config, weights, prompts, key, first)
    forks = forks_at_budgets(traces.length, schedule)
    forks = forks if first_fork is None else forks.at[:, 0].set(first_fork)
    answers = rollout.sample_answers(model, config, weights, trunk, traces, forks, key)
    return jax.device_get((traces, forks, answers))


@functools.cache
def base(config=CONFIG):
    return run(config)


def by_problem(result, group=G, problems=B):
    """Every array as [B, G, ...]."""
    return jax.tree.map(lambda x: x.reshape(problems, group, *x.shape[1:]), result)


def assert_same_rollout(actual, expected):
    """The same tokens, lengths and ends, and log-probs up to rounding."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b)


# What is sampled.


def test_traces_stop_after_think_end_or_eos_and_keep_it():
    traces, _, _ = base()
    for tokens, logprob, length, ended, eos in zip(*jax.tree.leaves(traces)):
        stops = [t for t in range(C) if tokens[t] in (THINK_END, EOS) and t < length]
        if ended or eos:
            assert stops == [length - 1] and tokens[length - 1] == (THINK_END if ended else EOS)
        else:
            assert not stops and length == C
        assert not (ended and eos)
        assert not tokens[length:].any() and not logprob[length:].any()
        assert (logprob[:length] < 0).all()


def test_answers_stop_after_eos_and_keep_it():
    _, _, answers = base()
    for index in np.ndindex(B * G, S, A):
        forced, length = answers.forced[index[:2]], answers.length[index]
        tokens, logprob = answers.tokens[index], answers.logprob[index]
        sampled = tokens[forced:length]
        assert 1 <= length - forced <= CAP
        if answers.ended[index]:
            assert sampled[-1] == EOS
        else:
            assert length - forced == CAP
        assert EOS not in sampled[:-1] and (EOS in sampled) == answers.ended[index]
        assert not tokens[length:].any()
        assert not logprob[:forced].any() and not logprob[length:].any() and (logprob[forced:length] < 0).all()


def test_what_is_inserted():
    """A fork that includes `</think>` needs no other: the short elicitation. Any other fork gets the long one."""
    traces, forks, answers = base()
    for n, s in np.ndindex(B * G, S):
        includes_end = traces.ended[n] and traces.length[n] <= BUDGETS[s]
        expected = (5, 6) if includes_end else (7, 8, 9)
        assert forks[n, s] == min(traces.length[n], BUDGETS[s])
        assert answers.forced[n, s] == len(expected)
        for a in range(A):
            assert tuple(answers.tokens[n, s, a, : len(expected)]) == expected


def test_the_sample_reaches_the_corners():
    """What the tests here rest on: every way to end, at a budget and between two, and answers of every length."""
    traces, forks, answers = base()
    assert traces.eos.any() and (traces.ended & (traces.length == C)).any() and (~traces.ended & ~traces.eos).any()
    assert {1, 2, 3} <= set((answers.length - answers.forced[..., None]).ravel().tolist())
    inner = traces.length[traces.ended & (traces.length < C)]
    assert set(inner.tolist()) & set(BUDGETS) and set(inner.tolist()) - set(BUDGETS)
    assert (np.diff(forks) == 0).any()
    assert answers.ended.any() and not answers.ended.all()


def test_a_step_a_problem_a_trace_a_column_and_an_answer_have_samples_of_their_own():
    traces, forks, answers = base()
    other, _, _ = run(step=51)
    assert (other.tokens != traces.tokens).any(axis=1).mean() > 0.9  # short traces may agree by chance
    tokens = traces.tokens.reshape(B, G, C)
    assert len(np.unique(tokens[:2].reshape(2 * G, C), axis=0)) == 2 * G, "problems 0 and 1 have one prompt"
    shared = [(n, s) for n, s in np.ndindex(B * G, S - 1) if forks[n, s] == forks[n, -1]]
    assert len(shared) > 8
    for n, s in shared:
        assert (answers.tokens[n, s] != answers.tokens[n, -1]).any(), "columns that share a fork have the same answers"


def test_the_numbers_drawn_are_independent():
    """A model that finds all tokens equally likely says what was drawn: draws agree no more than by chance."""
    traces, _, answers = run(weights=jax.tree.map(jnp.zeros_like, params()))
    index = answers.forced[..., None, None] + np.arange(CAP)
    drawn = np.take_along_axis(answers.tokens, np.broadcast_to(index, (B * G, S, A, CAP)), axis=-1)
    drawn = drawn.reshape(B, G, S, A, CAP)
    present = np.arange(CAP) < (answers.length - answers.forced[..., None]).reshape(B, G, S, A, 1)
    thought = traces.tokens.reshape(B, G, C)
    thinking = np.arange(C) < traces.length.reshape(B, G, 1)
    np.testing.assert_allclose(traces.logprob[thinking.reshape(B * G, C)], -np.log(VOCABULARY), rtol=1e-6)

    def agreement(a, b, both):
        """By how many standard deviations the agreements exceed chance."""
        number, chance = both.sum(), 1 / VOCABULARY
        assert number > 60
        return ((a == b)[both].sum() - number * chance) / np.sqrt(number * chance)

    for values, there in ((drawn, present), (thought, thinking)):
        for axis in range(values.ndim):
            for shift in range(1, values.shape[axis]):
                moved, moved_there = (np.roll(x, shift, axis) for x in (values, there))
                if (there & moved_there).sum() > 60:
                    assert agreement(values, moved, there & moved_there) < 4, (axis, shift)
    both = present & thinking[:, :, None, None, :CAP]
    assert agreement(drawn, thought[:, :, None, None, :CAP], both) < 4
    counts = np.bincount(drawn[present], minlength=VOCABULARY)
    assert counts.min() > 0 and counts.max() < 3 * counts.mean()


# Whose log-probs are recorded.


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def all_logprobs(temperature, params, rows):
    hidden = decoder.forward_rows(MODEL, params, rows)
    return jax.nn.log_softmax(decoder.logits(MODEL, params, hidden) / temperature)


def plain_sequences(result):
    """Every trace and every answer as (prompt + what precedes, sampled tokens, their recorded log-probs)."""
    (traces, forks, answers), prompts = result, make_prompts()
    for n in range(B * G):
        prompt = list(prompts.tokens[n // G][: prompts.length[n // G]])
        trace = list(traces.tokens[n][: traces.length[n]])
        yield prompt, trace, traces.logprob[n]
        for s, a in np.ndindex(S, answers.tokens.shape[2]):
            forced, length = answers.forced[n, s], answers.length[n, s, a]
            tokens = list(answers.tokens[n, s, a, :length])
            yield prompt + trace[: forks[n, s]] + tokens[:forced], tokens[forced:], answers.logprob[n, s, a, forced:]


def assert_plain_logprobs(result, temperature):
    """Recorded log-probs are those of a full forward of each plain sequence, without any cache."""
    sequences = list(plain_sequences(result))
    tokens = np.zeros((len(sequences), P + C + 3 + CAP), np.int32)
    for row, (before, sampled, _) in zip(tokens, sequences):
        row[: len(before) + len(sampled)] = before + sampled
    length = [len(before) + len(sampled) for before, sampled, _ in sequences]
    rows = token_tree.sequences(tokens, length, np.zeros(tokens.shape, bool))
    table = np.asarray(all_logprobs(temperature, params(), rows))
    for i, (before, sampled, recorded) in enumerate(sequences):
        for t, token in enumerate(sampled):
            assert abs(table[i, len(before) + t - 1, token] - recorded[t]) < 1e-5, (i, t)


def packed(config, result):
    traces, forks, answers = result
    credit = Credit(
        trace_advantage=np.ones((B, G, S), np.float32),
        answer_advantage=np.ones((B, G, S, A), np.float32),
        block_mask=np.asarray(block_mask(forks)).reshape(B, G, S),
    )
    weight = np.ones(S, np.float32)
    return token_tree.pack(make_prompts(), traces, answers, forks, credit, weight, config.answer_cap == 1)


def assert_learner_logprobs(config, result, model=MODEL, atol=1e-5):
    """The trainer's log-probs of the packed rows are the sampler's; nothing that was sampled is left out."""
    traces, _, answers = result
    rows = packed(config, result)
    pad = config.forced_pad + config.answer_cap
    loss = learner.LossConfig(
        num_targets=C + S * A * config.answer_cap,
        num_states=token_tree.num_states(P, C, S, A, pad, config.answer_cap == 1),
        constant=1.0,
        temperature=config.sample.temperature,
    )
    logprob, _ = learner.score_logprobs(model, loss, params(), rows)
    mask = np.asarray(rows.loss_mask)
    assert mask.sum() == traces.length.sum() + (answers.length - answers.forced[..., None]).sum()
    np.testing.assert_allclose(np.asarray(logprob)[mask], np.asarray(rows.sampler_logprob)[mask], atol=atol)


@pytest.mark.parametrize(
    ("config", "first_fork"),
    [(CONFIG, None), (ONE_TOKEN, None), (CONFIG, 0), (SILENT_END, None), (SILENT, 0), (SILENT_ONE_TOKEN, 0)],
    ids=["answers", "one-token-tempered", "no-thinking", "silent-end", "silent-no-thinking", "silent-one-token"],
)
def test_recorded_logprobs_are_the_models_and_the_learners(config, first_fork):
    result = base(config) if first_fork is None else run(config, first_fork=first_fork)
    if config in (SILENT_END, SILENT, SILENT_ONE_TOKEN):
        assert (result[2].forced == 0).any()
    assert_plain_logprobs(result, config.sample.temperature)
    assert_learner_logprobs(config, result)


def test_bfloat16_differs_by_rounding_only():
    """Cached decoding and packed rows round differently: log-probs agree within 0.1 nats."""
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    result = run(model=model)
    assert result[0].logprob.dtype == np.float32
    assert_learner_logprobs(CONFIG, result, model, atol=0.1)


def test_one_token_answers():
    """Exactly one sampled token each; without an EOS in the vocabulary no trace and no answer ends with it."""
    traces, _, answers = base(ONE_TOKEN)
    assert answers.tokens.shape == (B * G, S, A, 4)
    np.testing.assert_array_equal(answers.length, np.broadcast_to(answers.forced[..., None] + 1, answers.length.shape))
    assert not answers.ended.any() and not traces.eos.any() and (traces.tokens == EOS).any()


# What the layout may not change.


def test_problems_in_another_order():
    order = [2, 0, 3, 1]
    permuted = by_problem(run(prompts=take(make_prompts(), order)))
    assert_same_rollout(permuted, jax.tree.map(lambda x: x[order], by_problem(base())))


def test_fewer_problems_and_columns_more_traces_and_answers_other_segments_and_a_larger_prompt_pad():
    """All at once, in another layout: the same tokens for the same problem, trace, column and answer."""
    few, more = [3, 1], G + 2
    config = dataclasses.replace(CONFIG, group_size=more, answers=A + 1, segment=3)
    schedule = BudgetSchedule.from_prior(BUDGETS[:-1])
    result = run(config, take(make_prompts(pad=P + 3), few), schedule=schedule)
    traces, _, answers = jax.tree.map(lambda x: x[:, :G], by_problem(result, group=more, problems=len(few)))
    expected_traces, _, expected = jax.tree.map(lambda x: x[few], by_problem(base()))
    assert_same_rollout(traces, expected_traces)
    names = ("tokens", "logprob", "length", "ended")
    assert_same_rollout(
        [answers.forced, *(getattr(answers, name)[:, :, :, :A] for name in names)],
        [expected.forced[:, :, :-1], *(getattr(expected, name)[:, :, :-1] for name in names)],
    )


def test_traces_in_parts():
    half = dataclasses.replace(CONFIG, group_size=G // 2)
    parts = [by_problem(run(half, first=first), group=G // 2) for first in (0, G // 2)]
    assert_same_rollout(jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts), by_problem(base()))


# When the host stops.


def always(token):
    """Parameters of a model that says one token whatever it reads."""
    weights = jax.tree.map(jnp.zeros_like, params())
    weights["embed"]["embedding"] = jnp.ones_like(weights["embed"]["embedding"])
    weights["norm"]["scale"] = jnp.ones_like(weights["norm"]["scale"])
    weights["lm_head"]["kernel"] = weights["lm_head"]["kernel"].at[:, token].set(10.0)
    return weights


@pytest.mark.parametrize(("token", "segments"), [(THINK_END, 1), (EOS, 1), (13, 3)], ids=["think-end", "eos", "never"])
def test_no_segment_runs_after_all_traces_have_ended(token, segments, monkeypatch):
    steps, think = [], thinking.think

    def counted(*args, **options):
        state, progress = think(*args, **options)
        steps.append(int(progress.steps))
        return state, progress

    monkeypatch.setattr(thinking, "think", counted)
    traces, _, answers = run(weights=always(token))
    stopped = segments == 1
    assert steps == ([1] if stopped else [4, 4, 3])
    assert (traces.length == (1 if stopped else C)).all()
    assert traces.ended.all() == (token == THINK_END) and traces.eos.all() == (token == EOS)
    assert (traces.tokens[:, : traces.length[0]] == token).all()
    assert (answers.forced == (2 if token == THINK_END else 3)).all()
    assert (answers.length - answers.forced[..., None] == (1 if token == EOS else CAP)).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *(({name: 0}, rf"rollout\.{name}=0") for name in ("group_size", "trace_pad", "answers", "answer_cap")),
        ({"segment": -1}, r"rollout\.segment=-1"),
    ],
    ids=str,
)
def test_configurations_that_cannot_work_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CONFIG, **change)
