"""Which sampled traces are learned (STaR, arXiv 2203.14465; MRT-STaR, arXiv 2503.07572), and how far."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from tto_jax.core import advantages
from tto_jax.core.types import Array, pytree

CRITERIA = ("final", "best", "total")
TIES = ("all", "shortest")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Static options. With J[s] the mean score of all answers forced at fork s, J[-1] that before any thinking:

    `final`: STaR. Every trace with a right answer at its end.
    `best`: the progress of a trace is max_s J[s] - J[-1], that of its best prefix, the shortest one where several are.
    `total`: it is J[S-1] - J[-1], the sum over all blocks.

    With `best` and `total` the traces of a problem are kept whose progress is the largest of those that can be kept: a
    right answer was sampled where the kept part ends, and it is a prefix (`cut`), a trace that has ended thinking by
    itself, or any trace (`unfinished`). J[-1] is the problem's: it changes no choice.
    """

    criterion: str = "best"
    cut: bool = True  # kept is the best prefix of a trace, not all of it
    ties: str = "all"  # `shortest`: of traces that are alike the one whose kept part is shortest, then the first
    unfinished: bool = False  # whole traces that were stopped at the last budget may be kept, too

    def __post_init__(self):
        for name, choices in (("criterion", CRITERIA), ("ties", TIES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {choices}")
        if self.cut and self.criterion == "final":
            raise ValueError("cut=True with criterion='final': STaR keeps whole traces; choose cut=False, or 'best'")


@pytree
class Selection:
    """Of each trace: whether it is kept, up to where, and with which answer."""

    kept: Array  # bool[B,G]
    column: Array  # i32[B,G], the kept part ends at this fork
    answer: Array  # i32[B,G], the first right answer at that fork: column A + number, in the order of [S,A]
    progress: Array  # f32[B,G], of the kept part: J[column] - J[-1]


def select(correct: Array, forks: Array, start: Array, ended: Array, rule: Rule) -> Selection:
    """The traces to learn. Where `kept` is False the other fields are those of a trace that is not learned.

    Args:
      correct: f32[B,G,S,A], 0 or 1, of answers at the forks. forks: i32[B,G,S], tokens, ascending along S.
      start: f32[B,A0], 0 or 1, of answers before any thinking. ended: bool[B,G], the trace ended thinking by itself.
    """
    chex.assert_rank([correct, forks, start, ended], [4, 3, 2, 2])
    chex.assert_equal_shape_prefix([correct, forks], 3)
    chex.assert_equal_shape_prefix([forks, ended], 2)
    args = jnp.asarray(correct, jnp.float32), jnp.asarray(forks), jnp.asarray(start, jnp.float32), jnp.asarray(ended)
    return jax.vmap(lambda *of_problem: _select(*of_problem, rule))(*args)


def _select(correct, forks, start, ended, rule) -> Selection:
    """One problem: correct f32[G,S,A], forks i32[G,S], start f32[A0], ended bool[G]."""
    group, size, number = correct.shape
    # Whole numbers over whole numbers: equal rates are equal floats, whatever the number of columns that share a fork.
    hits = advantages.pool(correct.sum(axis=-1), forks, jnp.ones(forks.shape, bool))
    last = jnp.full(group, size - 1)
    best = jnp.argmax(hits, axis=-1)
    column = best if rule.cut else last
    at = lambda x, index: jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]  # noqa: E731
    value = {"final": jnp.ones(group), "best": at(hits, best), "total": at(hits, last)}[rule.criterion]
    allowed = (at(hits, column) > 0) & (ended | (rule.cut or rule.unfinished))
    kept = allowed & (value == jnp.max(value, initial=0.0, where=allowed))
    if rule.ties == "shortest":
        length = jnp.where(kept, at(forks, column), jnp.iinfo(forks.dtype).max)
        kept &= jnp.arange(group) == jnp.argmin(length)
    shared = forks == at(forks, column)[:, None]
    right = (shared[..., None] & (correct > 0)).reshape(group, size * number)
    return Selection(
        kept=kept,
        column=column.astype(jnp.int32),
        answer=jnp.argmax(right, axis=-1).astype(jnp.int32),
        progress=at(hits, column) / number - start.mean(),
    )
