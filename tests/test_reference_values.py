"""The probability of the reference answer at every fork, against plain sequences, token by token."""

import dataclasses

import jax
import numpy as np
import pytest
from test_rollout import BUDGETS, CONFIG, MODEL, A, B, G, P, S, make_prompts, params

from configs import chain
from tto_jax import reference_values, rollout, settings
from tto_jax.core import token_tree
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.math_task import MathTask
from tto_jax.models import decoder
from tto_jax.tasks import Problem

CAP, TEMPERATURE = CONFIG.answer_cap, 0.7


class Words:
    """A tokenizer and a task in one: a problem is its reference's tokens."""

    @staticmethod
    def encode(text):
        return [int(word) for word in text.split()]

    @staticmethod
    def reference(problem):
        return problem


@pytest.fixture(scope="module")
def made():
    """A plan of the tiny model, and a rollout with forks at 0 and at budgets."""
    config = chain.get_config("brpo,two_digits,fast")
    plan = settings.build(config)
    loss = dataclasses.replace(plan.loss, temperature=TEMPERATURE, micro_tokens=64, attention="reference")
    plan = dataclasses.replace(
        plan, model=MODEL, rollout=CONFIG, loss=loss, prompt_pad=P, tokenizer=Words(), task=Words()
    )
    prompts, cuts = jax.device_put(make_prompts()), rollout.Cuts(BudgetSchedule.from_prior(BUDGETS), start=True)
    key = jax.random.key(1)
    traces, forks, answers, _ = rollout.sample(MODEL, CONFIG, rollout.weights(MODEL, params()), prompts, key, cuts)
    return plan, prompts, traces, forks, answers


PROBLEMS = ["4 9", "11", "3 3 3 2", "5 6 7 8 9"]  # the last one is longer than an answer may be


def by_hand(prompts, traces, forks, answers):
    """One plain sequence a fork: prompt, trace up to the fork, insertion, reference."""
    sequences, targets = [], []
    for n, s in np.ndindex(*forks.shape):
        ids, b = Words.encode(PROBLEMS[n // G]), n // G
        before = [
            *prompts.tokens[b, : prompts.length[b]],
            *traces.tokens[n, : forks[n, s]],
            *answers.tokens[n, s, 0, : answers.forced[n, s]],
        ]
        sequences.append([*before, *ids])
        targets.append(range(len(before), len(before) + len(ids)))
    longest = max(map(len, sequences))
    tokens = np.asarray([[*row, *[0] * (longest - len(row))] for row in sequences], np.int32)
    rows = token_tree.sequences(tokens, np.asarray([len(row) for row in sequences]), np.zeros(tokens.shape, bool))
    hidden = jax.jit(decoder.forward_rows, static_argnums=0)(MODEL, params(), rows)
    table = jax.nn.log_softmax(decoder.logits(MODEL, params(), hidden) / TEMPERATURE)
    found = [np.exp(sum(float(table[i, t - 1, tokens[i, t]]) for t in where)) for i, where in enumerate(targets)]
    return np.asarray(found).reshape(B, G, -1)


def test_values_equal_plain_sequences(made):
    plan, prompts, traces, forks, answers = made
    with jax.transfer_guard("disallow"):
        values = reference_values.values(plan, params(), PROBLEMS, prompts, traces, forks, answers)
    expected = by_hand(*jax.device_get((prompts, traces, forks, answers)))
    assert values.shape == (B, G, S + 1) and values.dtype == np.float32
    assert not np.asarray(values[3]).any(), "what cannot be sampled has no probability"
    np.testing.assert_allclose(values[:3], expected[:3], rtol=2e-4, atol=1e-7)
    assert np.asarray(values[:3]).min() > 0 and np.ptp(np.asarray(values[0, :, 1:])) > 1e-4
    np.testing.assert_allclose(values[:, :, 0], values[:, :1, 0].repeat(G, 1), rtol=1e-4)  # before any thinking


def test_sampled_answers_do_not_matter(made):
    """Only the insertions are read: other samples, more of them, the same values."""
    plan, prompts, traces, forks, answers = made
    other = np.array(answers.tokens)
    index = np.arange(other.shape[-1]) >= np.asarray(answers.forced)[..., None, None]
    other = np.where(index, (other + 5) % MODEL.vocab_size, other)
    values = [
        reference_values.values(plan, params(), PROBLEMS, prompts, traces, forks, x)
        for x in (answers, dataclasses.replace(answers, tokens=jax.numpy.asarray(other), length=answers.length * 0 + A))
    ]
    np.testing.assert_array_equal(*values)


def test_references_of_tasks():
    """As they would be sampled: words with their EOS, a box around mathematics."""
    plan = settings.build(chain.get_config("brpo,two_digits,fast"))
    problem = plan.task.problem(0, "train")
    tokens, length = reference_values.encode(plan, [problem])
    words = plan.tokenizer.decode(tokens[0, : length[0]].tolist()).split()
    assert words == [*problem.answers[0].split(), plan.task.eos] and length[0] == plan.rollout.answer_cap
    boxed = MathTask.reference(plan.task, Problem(id=0, prompt="", answers=("\\frac{1}{2}", "0.5")))
    assert boxed == "\\boxed{\\frac{1}{2}}"
    assert plan.task.judge([(" ".join(words[:-1]), problem)])[0].correct
