"""Random keys by identity: of a row from (step, problem id, trace), of an answer from its column and number too."""

import jax
import jax.numpy as jnp

from tto_jax.core.types import Array, Prompts, pytree

THINKING, ANSWERING = 0, 1  # phases have keys of their own


@pytree
class RowKeys:
    """Keys of the N rows by identity: folded from (step, problem id, trace)."""

    thinking: Array  # key[N]
    answering: Array  # key[N]


def row_keys(key: Array, prompts: Prompts, group_size: int, first_trace: Array) -> RowKeys:
    """Keys for B problems x G traces, numbered from `first_trace`; `key` already holds the seed and the step."""

    def one(problem, trace):
        row = jax.random.fold_in(jax.random.fold_in(key, problem), trace)
        return RowKeys(thinking=jax.random.fold_in(row, THINKING), answering=jax.random.fold_in(row, ANSWERING))

    keys = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.asarray(prompts.id), first_trace + jnp.arange(group_size))
    return jax.tree.map(lambda x: x.reshape(-1), keys)


def answer_keys(keys: Array, columns: int, answers: int) -> Array:
    """key[N] -> key[N*S*A], folded with column and answer."""
    fold = lambda key, column, answer: jax.random.fold_in(jax.random.fold_in(key, column), answer)  # noqa: E731
    fold = jax.vmap(jax.vmap(jax.vmap(fold, (None, None, 0)), (None, 0, None)), (0, None, None))
    return fold(keys, jnp.arange(columns), jnp.arange(answers)).reshape(-1)


def uniforms(keys: Array, begin: Array, number: int) -> jax.Array:
    """One uniform a row and token, f32[number,R]: the row's key folded with the token's position begin + 0, 1, ..."""
    one = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))  # noqa: E731
    return jax.vmap(jax.vmap(one), (None, 0))(keys, begin + jnp.arange(number)[:, None])
