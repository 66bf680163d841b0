"""Scores that are reshaped before credit: length penalties, the baselines that budgets are compared with."""

import chex
import jax
import jax.numpy as jnp

from tto_jax.core.types import Array


def length_penalty(correct: Array, length: Array, budget: Array | int, coefficient: float) -> jax.Array:
    """correct * (1 - coefficient |z| / b_S): a right answer is worth less after a long trace, a wrong one stays 0.

    correct f32[B,G,S,A]; length i32[B,G], tokens of the trace; budget: b_S in tokens -> f32[B,G,S,A].
    Raises ValueError for a coefficient outside [0, 1], where a right answer could be worth less than a wrong one.
    """
    if not 0 <= coefficient <= 1:
        raise ValueError(
            f"length_penalty={coefficient}: the coefficient lies in [0, 1]; choose 0.2 as in the literature"
        )
    chex.assert_rank([correct, length], [4, 2])
    return correct * (1.0 - coefficient * jnp.asarray(length, jnp.float32) / budget)[:, :, None, None]
