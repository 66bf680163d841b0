"""MRT's three forms of RL (arXiv 2503.07572) for one context c: samples that continue from it beside ones that end.

G samples think on and have an outcome R; A0 terminate at once, and their mean score is J_c. One advantage a sample.
"""

import chex
import jax
import jax.numpy as jnp

from tto_jax.core import advantages
from tto_jax.core.types import Array


def termination(outcome: Array, initial: Array) -> jax.Array:
    """R - J_c: the baseline is what ending at once would have earned. outcome f32[G], initial f32[] -> f32[G]."""
    chex.assert_rank([outcome, initial], [1, 0])
    return outcome - initial


def joint(outcome: Array, start: Array) -> tuple[jax.Array, jax.Array]:
    """(r - mean) / std over both kinds as one group: of those that continue f32[G], of those that end f32[A0]."""
    chex.assert_rank([outcome, start], 1)
    normalised = advantages.grpo(jnp.concatenate([outcome, start]), std=True)
    return normalised[: outcome.shape[0]], normalised[outcome.shape[0] :]


def explicit(outcome: Array, first: Array, initial: Array, alpha: float, leave_one_out: bool = False) -> jax.Array:
    """R + alpha (J after the first new episode - J_c), normalised over the group by mean and deviation.

    outcome, first f32[G], initial f32[] -> f32[G].
    """
    chex.assert_rank([outcome, first, initial], [1, 1, 0])
    return advantages.grpo(outcome + alpha * (first - initial), leave_one_out, std=True)
