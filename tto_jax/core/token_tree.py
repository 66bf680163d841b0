"""Pack prompts, traces and answer branches into rows whose trunk is computed once.

Padded layout of one tree: prompt [P], trace [C], then S*A branches of E tokens, each segment right-padded. Masks come
from lengths; a padding token has tree = -1, and whatever a pad grows to changes no value (tested).
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

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


def pack(
    prompts: Prompts,
    traces: Traces,
    answers: Answers,
    forks: Array,
    credit: Credit,
    answer_weight: Array,
    one_token_answers: bool = False,
) -> TokenTree:
    """One tree a row.

    Args:
      prompts: of B problems. traces, answers: of N = B*G rows.
      forks: i32[N,S], tokens of the trace before each cut.
      credit: of [B,G].
      answer_weight: f32[S], what each answer of a column counts: P_j / A (paper, eq. 10) or 1 (released code).
      one_token_answers: every answer is one sampled token. Then the A answers of a column are targets of one state, the
        last inserted token: the insertion is stored once a column, the answers follow behind all states (`num_states`).

    Returns:
      TokenTree of rows [N, P + C + S*A*E], or [N, P + C + S*(E-1) + S*A] with one-token answers; old and reference
      log-probs are the sampler's until they are scored.
    """
    rows, size, number, _ = answers.tokens.shape
    chex.assert_shape(forks, (rows, size))
    chex.assert_shape(answer_weight, (size,))
    group = rows // prompts.tokens.shape[0]
    trace_advantage = jnp.where(credit.block_mask, credit.trace_advantage, 0.0).reshape(rows, size)
    answer_advantage = (credit.answer_advantage * answer_weight[:, None]).reshape(rows, size, number)

    def one(prompt, prompt_length, trace, answer, forks, trace_advantage, answer_advantage):
        trunk = _trunk(prompt, prompt_length, trace, forks, trace_advantage)
        branches = _one_token_branches if one_token_answers else _branches
        rest = branches(prompt.size, prompt_length, trace.tokens.size, answer, forks, answer_advantage)
        return _lone_padding(_concatenate(trunk, *rest))

    repeated = [jnp.repeat(jnp.asarray(x), group, axis=0) for x in (prompts.tokens, prompts.length)]
    return jax.vmap(one)(*repeated, traces, answers, forks, trace_advantage, answer_advantage)


def num_states(
    prompt_pad: int, trace_pad: int, size: int, number: int, answer_pad: int, one_token_answers: bool
) -> int:
    """How many leading tokens of a packed row are computed: all, or all but the one-token answers."""
    branches = size * (answer_pad - 1) if one_token_answers else size * number * answer_pad
    return prompt_pad + trace_pad + branches


def _segment(
    present, *, tokens, position, branch, fork, source, sequence=0, loss_mask=False, advantage=0.0, logprob=0.0
):
    """A flat piece of a row; scalars are broadcast to the shape of `present`."""
    flat = lambda x, dtype: jnp.broadcast_to(x, present.shape).astype(dtype).ravel()  # noqa: E731
    return TokenTree(
        tokens=flat(tokens, jnp.int32),
        position=flat(position, jnp.int32),
        tree=flat(jnp.where(present, 0, -1), jnp.int32),
        branch=flat(branch, jnp.int32),
        fork=flat(fork, jnp.int32),
        source=flat(source, jnp.int32),
        sequence=flat(sequence, jnp.int32),
        loss_mask=flat(loss_mask, bool),
        advantage=flat(advantage, jnp.float32),
        sampler_logprob=flat(logprob, jnp.float32),
        old_logprob=flat(logprob, jnp.float32),
        ref_logprob=flat(logprob, jnp.float32),
    )


def _concatenate(*segments):
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *segments)


def _lone_padding(row: TokenTree) -> TokenTree:
    """Each padding token on a branch of its own: it sees itself alone, and attention has nothing to compute for it."""
    padding = row.tree < 0
    return dataclasses.replace(
        row,
        branch=jnp.where(padding, -1 - jnp.arange(row.tree.shape[-1]), row.branch),
        fork=jnp.where(padding, 0, row.fork),
    )


def compact(rows: TokenTree, num_states: int) -> tuple[TokenTree, jax.Array]:
    """The present tokens of the first `num_states` moved to the front of each row, in their order, padding behind.

    The row's meaning stays: a row with n present tokens can be computed at any length from n on, as no source lies
    beyond them. Tokens behind the first `num_states`, targets only, stay where they are. Returns the rows and
    i32[N,L], where each token was.
    """
    length = rows.tree.shape[-1]
    behind = jnp.arange(length) >= num_states
    order = jnp.argsort(jnp.where(behind, 2, rows.tree < 0), axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)  # where each token goes
    source = jnp.take_along_axis(place, jnp.asarray(rows.source), axis=-1).astype(jnp.int32)
    rows = dataclasses.replace(rows, source=jnp.where(rows.tree < 0, 0, source))
    rows = jax.tree.map(lambda x: jnp.take_along_axis(jnp.asarray(x), order, axis=-1), rows)
    return _lone_padding(rows), order.astype(jnp.int32)


def empty_rows(rows: TokenTree, where: Array) -> TokenTree:
    """Rows [N,L] of which those of `where` (bool[N]) are padding alone."""
    where = where[:, None]
    emptied = dataclasses.replace(
        rows, tree=jnp.where(where, -1, rows.tree), loss_mask=jnp.where(where, False, rows.loss_mask)
    )
    return _lone_padding(emptied)


def _trunk(prompt, prompt_length, trace, forks, advantage):
    """Prompt i32[P] and trace [C]."""
    (pad_p,), (pad_c,) = prompt.shape, trace.tokens.shape
    p, c = jnp.arange(pad_p), jnp.arange(pad_c)
    return _concatenate(
        _segment(p < prompt_length, tokens=prompt, position=p, branch=0, fork=0, source=jnp.maximum(p - 1, 0)),
        _segment(
            c < trace.length,
            tokens=trace.tokens,
            position=prompt_length + c,
            branch=0,
            fork=0,
            source=jnp.where(c > 0, pad_p + c - 1, prompt_length - 1),
            sequence=jnp.minimum(budgets.block_of_token(forks, pad_c), forks.size - 1),
            loss_mask=c < trace.length,
            advantage=budgets.block_to_tokens(advantage, forks, pad_c),
            logprob=trace.logprob,
        ),
    )


def _before_fork(pad_p, prompt_length, fork):
    """Index in the row of the trunk token before the fork: the prompt's last where the fork is at the trace's start."""
    return jnp.where(fork > 0, pad_p + fork - 1, prompt_length - 1)


def _branches(pad_p, prompt_length, pad_c, answer, forks, advantage):
    """S*A branches of E tokens: inserted, then sampled."""
    size, number, pad_e = answer.tokens.shape
    e, fork = jnp.arange(pad_e), forks[:, None, None]
    index = jnp.arange(size * number).reshape(size, number, 1)
    in_answer = e < answer.length[..., None]
    sampled = in_answer & (e >= answer.forced[:, None, None])
    before = pad_p + pad_c + index * pad_e + e - 1
    segment = _segment(
        in_answer,
        tokens=answer.tokens,
        position=prompt_length + fork + e,
        branch=1 + index,
        fork=prompt_length + fork,
        source=jnp.where(e > 0, before, _before_fork(pad_p, prompt_length, fork)),
        sequence=size + index,
        loss_mask=sampled,
        advantage=jnp.where(sampled, advantage[..., None], 0.0),
        logprob=jnp.where(sampled, answer.logprob, 0.0),
    )
    return (segment,)


def _one_token_branches(pad_p, prompt_length, pad_c, answer, forks, advantage):
    """S insertions of E - 1 tokens; then the S*A sampled tokens, each predicted by its column's last inserted token."""
    size, number, pad_e = answer.tokens.shape
    e, fork, forced = jnp.arange(pad_e - 1), forks[:, None], answer.forced[:, None]
    column = jnp.arange(size)[:, None]
    begin = pad_p + pad_c + column * (pad_e - 1)
    before_fork = _before_fork(pad_p, prompt_length, fork)
    inserted = _segment(
        e < forced,
        tokens=answer.tokens[:, 0, :-1],
        position=prompt_length + fork + e,
        branch=1 + column,
        fork=prompt_length + fork,
        source=jnp.where(e > 0, begin + e - 1, before_fork),
    )
    at_forced = lambda x: jnp.take_along_axis(x, forced[..., None], axis=-1)[..., 0]  # noqa: E731
    targets = _segment(
        answer.length > forced,
        tokens=at_forced(answer.tokens),
        position=prompt_length + fork + forced,
        branch=1 + size + jnp.arange(size * number).reshape(size, number),
        fork=prompt_length + fork,
        source=jnp.where(forced > 0, begin + forced - 1, before_fork),
        sequence=size + jnp.arange(size * number).reshape(size, number),
        loss_mask=answer.length > forced,
        advantage=advantage,
        logprob=at_forced(answer.logprob),
    )
    return inserted, targets


def num_sequences(size: int, number: int) -> int:
    """Sequences of a tree of S forks with A answers each: S thinking blocks, then S*A answers."""
    return size * (1 + number)


def join_trees(tree: TokenTree, trees_per_row: int, sequences: int) -> TokenTree:
    """Lay `trees_per_row` consecutive trees of so many `sequences` side by side: [N, L] -> [N / each, each * L]."""
    rows, length = tree.tokens.shape
    if rows % trees_per_row:
        raise ValueError(f"trees_per_row={trees_per_row} does not divide the {rows} trees: choose a divisor")
    index = (jnp.arange(rows) % trees_per_row)[:, None]
    tree = dataclasses.replace(
        tree,
        tree=jnp.where(tree.tree < 0, -1, index),
        source=tree.source + index * length,
        sequence=tree.sequence + index * sequences,
    )
    return _lone_padding(jax.tree.map(lambda x: x.reshape(rows // trees_per_row, trees_per_row * length), tree))


def packed(tokens: Array, tree: Array, position: Array, target_mask: Array) -> TokenTree:
    """Plain sequences, several a row: trees of one trunk each, for supervised training, as numpy or jax arrays.

    tokens i32[N,L]; tree i32[N,L], which sequence of its row a token is of, from 0, -1 for padding; position i32[N,L],
    from the start of the sequence; target_mask bool[N,L], never at position 0, which nothing predicts.
    """
    chex.assert_equal_shape([tokens, tree, position, target_mask])
    kind = np if isinstance(tokens, np.ndarray) else jnp
    index = kind.broadcast_to(kind.arange(tokens.shape[1]), tokens.shape)
    integer = lambda x: kind.asarray(x, kind.int32)  # noqa: E731
    zeros = kind.zeros(tokens.shape, kind.float32)
    return TokenTree(
        tokens=integer(tokens),
        position=integer(position),
        tree=integer(tree),
        branch=integer(kind.where(kind.asarray(tree) < 0, -1 - index, 0)),  # padding sees itself alone
        fork=integer(kind.zeros_like(index)),
        source=integer(kind.maximum(index - 1, 0)),
        sequence=integer(kind.maximum(tree, 0)),
        loss_mask=kind.asarray(target_mask, bool),
        advantage=zeros,
        sampler_logprob=zeros,
        old_logprob=zeros,
        ref_logprob=zeros,
    )


def sequences(tokens: Array, length: Array, target_mask: Array) -> TokenTree:
    """Plain sequences as rows of one trunk each. tokens i32[N,L], length i32[N], target_mask bool[N,L]."""
    tokens = jnp.asarray(tokens)
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return packed(tokens, jnp.where(index < jnp.asarray(length)[:, None], 0, -1), index, jnp.asarray(target_mask))
