"""Frozen pytrees that flow through one training step, in the order in which they are made.

Letters: B problems, G traces per problem, N = B*G rows, S budgets (blocks), A answers per fork, P prompt pad, C trace
pad, E forced tokens + answer pad, L tokens per packed row.
"""

import dataclasses
from typing import TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray


def pytree(cls: type) -> type:
    """A frozen dataclass whose fields are all leaves or subtrees."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class Prompts:
    """A batch of problems as token ids."""

    tokens: Array  # i32[B, P], right-padded
    length: Array  # i32[B], 1 <= length <= P
    id: Array  # u32[B], stable identity of the problem: random keys are folded from it


@pytree
class Traces:
    """Thinking traces; row n belongs to problem n // G. The stop token (`</think>` or EOS) is kept and counted."""

    tokens: Array  # i32[N, C], right-padded
    logprob: Array  # f32[N, C], of the distribution that was sampled from; 0 beyond length
    length: Array  # i32[N]
    ended: Array  # bool[N], ended with `</think>`
    eos: Array  # bool[N], ended with EOS, without `</think>`


@pytree
class Answers:
    """Answers forced at the forks of each trace: `forced` inserted tokens, then the sampled ones."""

    tokens: Array  # i32[N, S, A, E], right-padded
    logprob: Array  # f32[N, S, A, E], of sampled tokens; 0 elsewhere
    length: Array  # i32[N, S, A], inserted + sampled tokens, a sampled EOS included
    forced: Array  # i32[N, S], how many of them were inserted
    ended: Array  # bool[N, S, A], ended with EOS (False: hit the cap)


@pytree
class Scores:
    """What the verifier says of every answer."""

    correct: Array  # f32[B, G, S, A], 1 if right and well-formed
    formatted: Array  # bool[B, G, S, A], well-formed, right or not


@pytree
class Credit:
    """Per-block and per-answer advantages."""

    trace_advantage: Array  # f32[B, G, S]
    answer_advantage: Array  # f32[B, G, S, A]
    block_mask: Array  # bool[B, G, S], False where the block has no tokens
    start_advantage: Array | None = None  # f32[B, A0], of answers before any thinking


@pytree
class TokenTree:
    """Packed rows: every tree is a prompt, its trace and all answer branches; a row holds one tree or several.

    Visibility is decided by four int vectors (`token_tree.visible`); padding has tree = -1.
    """

    tokens: Array  # i32[N, L]
    position: Array  # i32[N, L], from the start of the prompt; a branch restarts at its fork
    tree: Array  # i32[N, L], -1 = padding
    branch: Array  # i32[N, L], 0 = prompt and trace; each padding token has one of its own, below 0
    fork: Array  # i32[N, L], absolute: prompt length + the trace's fork
    source: Array  # i32[N, L], index in the row of the hidden state that predicts this token
    sequence: Array  # i32[N, L], from 0 in a row: which thinking block, or which answer, a sampled token belongs to
    loss_mask: Array  # bool[N, L], sampled tokens only
    advantage: Array  # f32[N, L], answer weight included
    sampler_logprob: Array  # f32[N, L]
    old_logprob: Array  # f32[N, L]
    ref_logprob: Array  # f32[N, L]
