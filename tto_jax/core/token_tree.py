"""Pack prompts, traces and answer branches into rows whose trunk is computed once.

Padded layout of one tree: prompt [P], trace [C], then S*A branches of E tokens, each segment right-padded. Masks come
from lengths; a padding token has tree = -1, and whatever a pad grows to changes no value (tested).
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from tto_jax.core import budgets
from tto_jax.core.types import Answers, Array, Credit, Prompts, TokenTree, Traces


def visible(query: TokenTree, key: TokenTree) -> jax.Array:
    """bool[Q,K] of one row: which tokens a token attends to.

    The same tree, not later in position, and either of the own branch or of the trunk before the fork. Only tree,
    position, branch and fork are read, so any object that has these four int vectors will do.
    """
    q = {name: getattr(query, name)[:, None] for name in ("tree", "position", "branch", "fork")}
    own = key.branch[None, :] == q["branch"]
    trunk = (key.branch[None, :] == 0) & (key.position[None, :] < q["fork"])
    return (key.tree[None, :] == q["tree"]) & (key.position[None, :] <= q["position"]) & (own | trunk)


def pack(prompts: Prompts, traces: Traces, answers: Answers, forks: Array, credit: Credit, answer_weight: Array):
    """One tree a row.

    Args:
      prompts: of B problems. traces, answers: of N = B*G rows.
      forks: i32[N,S], tokens of the trace before each cut.
      credit: of [B,G].
      answer_weight: f32[S], what each answer of a column counts: P_j / A (paper, eq. 10) or 1 (released code).

    Returns:
      TokenTree of rows f32/i32[N, P + C + S*A*E]; old and reference log-probs are the sampler's until they are scored.
    """
    rows, size, number, _ = answers.tokens.shape
    chex.assert_shape(forks, (rows, size))
    chex.assert_shape(answer_weight, (size,))
    group = rows // prompts.tokens.shape[0]
    repeat = lambda x: jnp.repeat(jnp.asarray(x), group, axis=0)  # noqa: E731
    trace_advantage = jnp.where(credit.block_mask, credit.trace_advantage, 0.0).reshape(rows, size)
    answer_advantage = (credit.answer_advantage * answer_weight[:, None]).reshape(rows, size, number)
    return jax.vmap(_pack_one)(
        repeat(prompts.tokens), repeat(prompts.length), traces, answers, forks, trace_advantage, answer_advantage
    )


def _pack_one(prompt, prompt_length, trace, answer, forks, trace_advantage, answer_advantage):
    """One row: prompt i32[P], trace [C], answer [S,A,E], forks i32[S], advantages f32[S] and f32[S,A] -> TokenTree [L]."""
    (pad_p,), (pad_c,) = prompt.shape, trace.tokens.shape
    size, number, pad_e = answer.tokens.shape
    p, c, e = jnp.arange(pad_p), jnp.arange(pad_c), jnp.arange(pad_e)
    shape = (size, number, pad_e)
    fork = jnp.broadcast_to(forks[:, None, None], shape)
    begin = pad_p + pad_c + jnp.arange(size * number).reshape(size, number, 1) * pad_e
    # The token before the fork, as an index in the row: the prompt's last where the fork is at the trace's start.
    before_fork = jnp.where(fork > 0, pad_p + fork - 1, prompt_length - 1)
    in_answer = e < answer.length[..., None]
    sampled = in_answer & (e >= answer.forced[:, None, None])
    branch = 1 + jnp.broadcast_to(jnp.arange(size * number).reshape(size, number, 1), shape)
    join = lambda *parts: jnp.concatenate([jnp.ravel(part) for part in parts])  # noqa: E731
    zero_p, zero_c = jnp.zeros(pad_p, jnp.int32), jnp.zeros(pad_c, jnp.int32)
    present = join(p < prompt_length, c < trace.length, in_answer)
    logprob = join(jnp.zeros(pad_p), trace.logprob, jnp.where(sampled, answer.logprob, 0.0))
    return TokenTree(
        tokens=join(prompt, trace.tokens, answer.tokens),
        position=join(p, prompt_length + c, prompt_length + fork + e),
        tree=jnp.where(present, 0, -1),
        branch=join(zero_p, zero_c, branch),
        fork=join(zero_p, zero_c, prompt_length + fork),
        source=join(
            jnp.maximum(p - 1, 0),
            jnp.where(c > 0, pad_p + c - 1, prompt_length - 1),
            jnp.where(e > 0, begin + e - 1, before_fork),
        ),
        loss_mask=join(jnp.zeros(pad_p, bool), c < trace.length, sampled),
        advantage=join(
            jnp.zeros(pad_p),
            budgets.block_to_tokens(trace_advantage, forks, pad_c),
            jnp.where(sampled, answer_advantage[..., None], 0.0),
        ),
        sampler_logprob=logprob,
        old_logprob=logprob,
        ref_logprob=logprob,
    )


def join_trees(tree: TokenTree, trees_per_row: int) -> TokenTree:
    """Lay `trees_per_row` consecutive trees side by side: [N, L] -> [N / trees_per_row, trees_per_row * L]."""
    rows, length = tree.tokens.shape
    if rows % trees_per_row:
        raise ValueError(f"trees_per_row={trees_per_row} does not divide the {rows} trees: choose a divisor")
    index = (jnp.arange(rows) % trees_per_row)[:, None]
    tree = dataclasses.replace(tree, tree=jnp.where(tree.tree < 0, -1, index), source=tree.source + index * length)
    return jax.tree.map(lambda x: x.reshape(rows // trees_per_row, trees_per_row * length), tree)


def sequences(tokens: Array, length: Array, target_mask: Array) -> TokenTree:
    """Plain sequences as rows of one trunk each, for supervised training. tokens i32[N,L], length i32[N], mask bool[N,L]."""
    chex.assert_equal_shape([tokens, target_mask])
    tokens = jnp.asarray(tokens)
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    zeros = jnp.zeros(tokens.shape)
    return TokenTree(
        tokens=tokens,
        position=index,
        tree=jnp.where(index < jnp.asarray(length)[:, None], 0, -1),
        branch=jnp.zeros_like(tokens),
        fork=jnp.zeros_like(tokens),
        source=jnp.maximum(index - 1, 0),
        loss_mask=jnp.asarray(target_mask),
        advantage=zeros,
        sampler_logprob=zeros,
        old_logprob=zeros,
        ref_logprob=zeros,
    )
