"""From the scores of a step to its packed rows, and what the regression baseline learns from them."""

import dataclasses
import functools

import jax

from tto_jax import sharding
from tto_jax.core import credit, regression, rewards, token_tree
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.regression import NormalEquations
from tto_jax.core.types import Answers, Array, Credit, Prompts, TokenTree, Traces
from tto_jax.settings import CreditConfig, Settings


def fitted_baseline(plan: Settings, record: dict) -> jax.Array | None:
    """Coefficients f32[S,3] of the regression baseline, by the batches so far; None where there is none."""
    if not plan.credit.baseline_fit:
        return None
    sums = NormalEquations(**record["baseline_fit"])
    return sharding.put(regression.coefficients(sums, plan.credit.baseline_ridge))


def with_batch(plan: Settings, record: dict, sums: NormalEquations | None) -> dict:
    """The record with what a batch tells of the regression baseline, where there is one."""
    if not plan.credit.baseline_fit:
        return record
    sums = regression.accumulate(NormalEquations(**record["baseline_fit"]), sums, plan.credit.baseline_fit)
    return record | {"baseline_fit": regression.as_lists(sums)}


def shaped(config: CreditConfig, correct: Array, length: Array, most: int) -> Array:
    """Scores f32[B,G,S,A] after the penalties of traces of `length` i32[B,G], `most` tokens at most."""
    if config.serial_decay:
        correct = rewards.serial_decay(correct)
    if config.length_penalty:
        correct = rewards.length_penalty(correct, length, most, config.length_penalty)
    if config.relative_length_penalty:
        correct = rewards.relative_length_penalty(correct, length, config.relative_length_penalty)
    if config.overlong_margin:
        correct = rewards.overlong_penalty(correct, length, most, config.overlong_margin)
    return correct


@functools.partial(jax.jit, static_argnums=0)
def credit_and_pack(
    config: CreditConfig,
    schedule: BudgetSchedule,
    prompts: Prompts,
    traces: Traces,
    answers: Answers,
    forks: Array,
    correct: Array,
    coef: Array | None = None,
    values: Array | None = None,
) -> tuple[TokenTree, Credit, dict[str, jax.Array], NormalEquations | None]:
    """Scores f32[B,G,S,A] -> packed rows, credit, the baselines for the metrics, the sums of the regression baseline.

    With `start`, S is one more: the first column is of answers before any thinking, which have no block. values:
    f32[B,G,S], what thinking is paid by in place of the mean scores; forks are N x S.
    """
    group = correct.shape[:2]
    first = {"coef": coef}
    if config.start:
        first["start"] = correct[:, :, 0].reshape(group[0], -1)
        first["start_value"] = None if values is None else values[:, :, 0].mean(axis=1)
    by_trace, correct = forks.reshape(*group, -1)[..., config.start :], correct[:, :, config.start :]
    values = None if values is None else values[:, :, config.start :]
    length, most = traces.length.reshape(group), traces.tokens.shape[1]
    correct = shaped(config, correct, length, most)
    values = None if values is None else shaped(config, values[..., None], length, most)[..., 0]
    with jax.named_scope("credit"):
        earned = credit.assign(correct, by_trace, schedule, config.estimator, config.answers, values=values, **first)
        told = (correct, by_trace, schedule, config.estimator, values)
        sums = None if coef is None else credit.normal_equations(*told)
    weight = config.answer_weights(schedule, correct.shape[-1])
    with jax.named_scope("pack"):
        whole = credit.with_start(earned)
        rows = token_tree.pack(prompts, traces, answers, forks, whole, weight, config.one_token_answers)
        if config.mask_overlong:
            finished = (traces.ended | traces.eos)[:, None] | (rows.branch != 0)
            rows = dataclasses.replace(rows, loss_mask=rows.loss_mask & finished)
    baselines = credit.baselines(correct, by_trace, schedule, config.estimator.decay, coef)
    return rows, earned, baselines, sharding.constrain(sums)
