"""The value of a fork without sampling: the policy's probability of the reference answer there.

Every trace is packed once, with the reference as its forks' only answer, so the trunk is computed once for all of them.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import learner, sharding
from tto_jax.core import token_tree
from tto_jax.core.types import Answers, Array, Credit, Prompts, TokenTree, Traces
from tto_jax.models.decoder import Params
from tto_jax.settings import Settings
from tto_jax.tasks import Problem


def values(
    plan: Settings,
    params: Params,
    problems: Sequence[Problem],
    prompts: Prompts,
    traces: Traces,
    forks: Array,
    answers: Answers,
) -> jax.Array:
    """f32[B,G,S] in [0, 1], of the distribution that answers are sampled from.

    0 for a reference that is longer than any answer may be: it cannot be sampled either.

    Args:
      problems: of this process's rows; the rest are those of a rollout, of which only `answers`' insertions are read.
    """
    tokens, length = encode(plan, problems)
    rows = _rows(plan.rollout.forced_pad, prompts, traces, forks, answers, *sharding.put_rows((tokens, length)))
    size, width = forks.shape[1], plan.rollout.forced_pad + plan.rollout.answer_cap
    states = plan.context_pad + plan.rollout.trace_pad + size * width
    config = dataclasses.replace(plan.loss, num_targets=size * plan.rollout.answer_cap, num_states=states)
    logprob, _ = learner.score_logprobs(plan.model, config, params, rows)
    return _probability(logprob, rows.loss_mask, (size, width), plan.rollout.group_size)


def encode(plan: Settings, problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens i32[B, cap] and number i32[B] of the references; 0 of those that do not fit."""
    cap = plan.rollout.answer_cap
    tokens, length = np.zeros((len(problems), cap), np.int32), np.zeros(len(problems), np.int32)
    for row, problem in enumerate(problems):
        ids = plan.tokenizer.encode(plan.task.reference(problem))
        if len(ids) <= cap:
            tokens[row, : len(ids)], length[row] = ids, len(ids)
    return tokens, length


@functools.partial(jax.jit, static_argnums=0)
def _rows(forced_pad, prompts, traces, forks, answers, tokens, length) -> TokenTree:
    """Packed rows whose only targets are the references."""
    rows, size = forks.shape
    problems, cap = tokens.shape
    group = rows // problems
    forced = answers.forced[..., None, None]  # [N,S,1,1]
    slot = jnp.arange(forced_pad + cap)
    index = jnp.broadcast_to(jnp.clip(slot - forced, 0, cap - 1), (rows, size, 1, slot.size))
    own = jnp.repeat(tokens, group, axis=0)[:, None, None, :]
    reference = jnp.take_along_axis(jnp.broadcast_to(own, (rows, size, 1, cap)), index, axis=-1)
    inserted = jnp.pad(answers.tokens[:, :, :1, :forced_pad], ((0, 0), (0, 0), (0, 0), (0, cap)))
    number = jnp.repeat(length, group)[:, None, None]
    none = jnp.zeros((problems, group, size))
    packed = token_tree.pack(
        prompts,
        traces,
        Answers(
            tokens=jnp.where(slot < forced, inserted, reference),
            logprob=jnp.zeros(index.shape),
            length=answers.forced[..., None] + number,
            forced=answers.forced,
            ended=jnp.zeros((rows, size, 1), bool),
        ),
        forks,
        Credit(trace_advantage=none, answer_advantage=none[..., None], block_mask=none > 0),
        jnp.zeros(size),
    )
    return dataclasses.replace(packed, loss_mask=packed.loss_mask & (packed.branch > 0))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _probability(logprob, target, branches, group):
    """f32[B,G,S]: the product over the targets of each branch, 0 where there are none.

    branches: (S, tokens of one); they stand at the end of a row.
    """
    of_branch = lambda x: x[:, -math.prod(branches) :].reshape(-1, *branches).sum(axis=-1)  # noqa: E731
    found = jnp.where(of_branch(target) > 0, jnp.exp(of_branch(logprob)), 0.0)
    return found.reshape(-1, group, branches[0])
