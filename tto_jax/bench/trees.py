"""Batches of trees to measure, and the same trees flattened: every branch a row of its own.

Prompts, traces and answers are full: lengths are those of the shape, forks are the budgets, so that both sides have
the same tokens to train and neither has padding. Only where it is asked for, traces end anywhere.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core import token_tree
from tto_jax.core.types import Answers, Credit, Prompts, TokenTree, Traces


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the trees of N rows: a prompt, a trace with S forks, A answers at each."""

    rows: int  # N
    prompt: int
    forks: tuple[int, ...]  # the last one is the trace's length
    answers: int  # A
    forced: int  # inserted tokens of an answer
    cap: int  # sampled ones

    @property
    def trace(self) -> int:
        """Tokens of a trace."""
        return self.forks[-1]

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return self.forced + self.cap

    @property
    def branches(self) -> int:
        """S A."""
        return len(self.forks) * self.answers

    @property
    def trained(self) -> int:
        """Trained tokens of a row."""
        return self.trace + self.branches * self.cap

    @property
    def length(self) -> int:
        """Tokens of a packed row."""
        return self.prompt + self.trace + self.branches * self.answer

    @property
    def pairs(self) -> int:
        """Pairs of a row that see each other."""
        trunk = self.prompt + self.trace
        of_branches = sum(_triangle(self.prompt + fork, self.answer) for fork in self.forks)
        return _triangle(0, trunk) + self.answers * of_branches


def _triangle(before, number):
    """Pairs of `number` consecutive tokens that see `before` others."""
    return number * before + number * (number + 1) // 2


@dataclasses.dataclass(frozen=True)
class Group:
    """Flattened branches of one length: the answers of `columns` (a slice) at one fork."""

    fork: int  # index
    columns: slice
    has_trace: bool  # its rows train the trace's tokens, too

    def rows(self, sizes: Sizes) -> int:
        """How many."""
        return sizes.rows * len(range(sizes.answers)[self.columns])

    def length(self, sizes: Sizes) -> int:
        """Tokens of each."""
        return sizes.prompt + sizes.forks[self.fork] + sizes.answer

    def trained(self, sizes: Sizes) -> int:
        """Trained tokens of each."""
        return sizes.cap + (sizes.trace if self.has_trace else 0)


def groups(sizes: Sizes) -> tuple[Group, ...]:
    """All S A branches of a tree; one of those at the last fork stands for the trace, which is trained once."""
    last = len(sizes.forks) - 1
    found = [Group(s, slice(0, sizes.answers), False) for s in range(last)]
    found += [Group(last, slice(1, sizes.answers), False)] if sizes.answers > 1 else []
    return (*found, Group(last, slice(0, 1), True))


def made(
    sizes: Sizes, vocabulary: int, group: int, seed: int = 0, full: bool = True
) -> tuple[Prompts, Traces, Answers, np.ndarray]:
    """Random prompts (N / group), traces, answers and forks, on the host; traces of 1 .. C tokens if not `full`."""
    rng = np.random.default_rng(seed)
    lead = (sizes.rows, len(sizes.forks), sizes.answers)
    draw = lambda *shape: rng.integers(0, vocabulary, shape, dtype=np.int32)  # noqa: E731
    prompts = prompts_of(draw(sizes.rows // group, sizes.prompt))
    length = np.full(sizes.rows, sizes.trace, np.int32)
    if not full:
        length = rng.integers(1, sizes.trace + 1, sizes.rows, dtype=np.int32)
    flags = np.zeros(sizes.rows, bool)
    likely = lambda *shape: np.full(shape, -np.log(vocabulary), np.float32)  # noqa: E731
    traces = Traces(draw(sizes.rows, sizes.trace), likely(sizes.rows, sizes.trace), length, flags, flags)
    answers = Answers(
        tokens=draw(*lead, sizes.answer),
        logprob=likely(*lead, sizes.answer),
        length=np.full(lead, sizes.answer, np.int32),
        forced=np.full(lead[:2], sizes.forced, np.int32),
        ended=np.zeros(lead, bool),
    )
    return prompts, traces, answers, np.minimum(np.asarray(sizes.forks, np.int32), length[:, None])


def pairs(sizes: Sizes, length: np.ndarray, forks: np.ndarray) -> int:
    """Pairs that see each other, of traces of i32[N] tokens and answers at forks i32[N,S]."""
    of_branches = _triangle(sizes.prompt + forks.astype(np.int64), sizes.answer).sum()
    return int(_triangle(0, sizes.prompt + length.astype(np.int64)).sum() + sizes.answers * of_branches)


def prompts_of(tokens: np.ndarray) -> Prompts:
    """Full prompts i32[B,P], each a problem of its own."""
    number, pad = tokens.shape
    return Prompts(tokens, np.full(number, pad, np.int32), np.arange(number, dtype=np.uint32))


def credit_of(sizes: Sizes, group: int, seed: int = 1) -> Credit:
    """Random advantages, none of them 0."""
    rng = np.random.default_rng(seed)
    lead = (sizes.rows // group, group, len(sizes.forks))
    draw = lambda *shape: rng.choice(np.float32([-1.0, -0.5, 0.5, 1.0]), shape)  # noqa: E731
    return Credit(draw(*lead), draw(*lead, sizes.answers), np.ones(lead, bool))


def packed(sizes: Sizes, prompts: Prompts, traces: Traces, answers: Answers, forks, credit: Credit) -> TokenTree:
    """One row a tree, as the training page packs them."""
    return jax.jit(token_tree.pack)(prompts, traces, answers, forks, credit, jnp.ones(len(sizes.forks)))


def flattened(sizes: Sizes, rows: TokenTree) -> tuple[TokenTree, ...]:
    """The branches of packed rows as plain sequences, one batch of equal lengths for each of `groups`."""
    return tuple(_gather(sizes, group, rows) for group in groups(sizes))


def _gather(sizes, group, rows):
    """Rows of prompt, trace to the fork and an answer, each number where the packed row has it."""
    begin = sizes.prompt + sizes.trace
    branches = [group.fork * sizes.answers + a for a in range(sizes.answers)[group.columns]]
    trunk = np.arange(sizes.prompt + sizes.forks[group.fork])
    index = np.stack([np.concatenate([trunk, begin + b * sizes.answer + np.arange(sizes.answer)]) for b in branches])
    return _take(rows, index, 0 if group.has_trace else trunk.size)


@functools.partial(jax.jit, static_argnums=2)
def _take(rows, index, untrained):
    """Sequences of the tokens at index i32[branches, length] of every row; the first ones are not trained."""
    taken = jax.tree.map(lambda x: x[:, index].reshape(-1, index.shape[1]), rows)
    trained = taken.loss_mask.at[:, :untrained].set(False)
    plain = token_tree.sequences(taken.tokens, jnp.full(len(taken.tokens), index.shape[1]), trained)
    kept = ("advantage", "sampler_logprob", "old_logprob", "ref_logprob")
    return dataclasses.replace(plain, **{name: jnp.where(trained, getattr(taken, name), 0.0) for name in kept})
