"""A Flax NNX decoder: RMSNorm, rotary positions, grouped KV heads, SwiGLU; layers stacked and scanned.

The attention of a call is a function `attend(layer, state, q, k, v) -> (out, state)`; packed rows are `forward_rows`,
cached decoding is `models.decoding`. Everything outside works on pure parameter dicts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from tto_jax import sharding
from tto_jax.core.types import Array, TokenTree
from tto_jax.kernels import tree_attention
from tto_jax.models.config import ModelConfig
from tto_jax.models.rope import Rotation, rotary, rotation

Params = dict[str, Any]
Attend = Callable[[Array, Any, Array, Array, Array], tuple[Array, Any]]

_KERNEL_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


class Linear(nnx.Linear):
    """On tokens in one dimension: gradients of weights are then one product, without the transposed copies that XLA's
    CPU backend makes of sums over two dimensions.
    """

    def __call__(self, x: Array) -> Array:
        """x [..., M] -> [..., F]."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Attention(nnx.Module):
    """Projections around an attention function."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        linear = functools.partial(Linear, dtype=config.dtype, kernel_init=_KERNEL_INIT, rngs=rngs)
        self.q = linear(config.hidden_size, heads * width, use_bias=config.attention_bias)
        self.k = linear(config.hidden_size, kv_heads * width, use_bias=config.attention_bias)
        self.v = linear(config.hidden_size, kv_heads * width, use_bias=config.attention_bias)
        self.out = linear(heads * width, config.hidden_size, use_bias=False)
        if config.qk_norm:
            norm = functools.partial(nnx.RMSNorm, width, epsilon=config.norm_eps, dtype=config.dtype, rngs=rngs)
            self.q_norm, self.k_norm = norm(), norm()

    def __call__(self, x: Array, turn: Rotation, attend: Callable) -> tuple[Array, Any]:
        """x [R,T,M], turn of its positions, attend(q, k, v) -> (out, state); returns ([R,T,M], state)."""
        config = self.config
        split = lambda y, heads: y.reshape(*x.shape[:2], heads, config.head_dim)  # noqa: E731
        q, k = split(self.q(x), config.num_heads), split(self.k(x), config.num_kv_heads)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(q, turn), rotary(k, turn)
        v = split(self.v(x), config.num_kv_heads)
        if config.kv_copies > 1:
            k, v = (jnp.repeat(y, config.kv_copies, axis=2) for y in (k, v))
        out, state = attend(q, k, v)
        return self.out(out.reshape(*x.shape[:2], -1)), state


class Layer(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        norm = functools.partial(
            nnx.RMSNorm, config.hidden_size, epsilon=config.norm_eps, dtype=config.dtype, rngs=rngs
        )
        linear = functools.partial(Linear, use_bias=False, dtype=config.dtype, kernel_init=_KERNEL_INIT, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(config, rngs)
        self.gate = linear(config.hidden_size, config.mlp_size)
        self.up = linear(config.hidden_size, config.mlp_size)
        self.down = linear(config.mlp_size, config.hidden_size)

    def __call__(self, x: Array, turn: Rotation, attend: Callable) -> tuple[Array, Any]:
        """x [R,T,M] -> ([R,T,M], state)."""
        with jax.named_scope("attention"):
            mixed, state = self.attention(self.attention_norm(x), turn, attend)
            x = x + mixed
        with jax.named_scope("mlp"):
            y = self.mlp_norm(x)
            return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), state


class Decoder(nnx.Module):
    """Tokens to final hidden states; the head is separate, so that only the positions that are needed are projected."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        # Tied logits start at unit scale. Small models learn much faster than from the 0.02 of large checkpoints.
        embed_init = nnx.initializers.normal(config.hidden_size**-0.5)
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=config.dtype, embedding_init=embed_init, rngs=rngs
        )
        if config.learned_positions:
            self.position_embed = nnx.Embed(
                config.max_position, config.hidden_size, dtype=config.dtype, embedding_init=embed_init, rngs=rngs
            )
        make_layers = nnx.vmap(functools.partial(Layer, config), in_axes=0, out_axes=0)
        self.layers = make_layers(rngs.split(config.num_layers))
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, dtype=config.dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.lm_head = Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                kernel_init=embed_init,
                rngs=rngs,
            )

    def __call__(self, tokens: Array, position: Array, attend: Attend, state: Any) -> tuple[Array, Any]:
        """tokens, position i32[R,T] -> (hidden [R,T,M], state after all layers)."""
        graph, stacked = nnx.split(self.layers)
        turn = rotation(position, self.config)

        def layer_step(carry, xs):
            x, state = carry
            index, params = xs
            x, state = nnx.merge(graph, params)(x, turn, functools.partial(attend, index, state))
            return (sharding.constrain(x, sharding.ROWS), state), None

        body = _remat(layer_step, self.config.remat)
        indices = jnp.arange(self.config.num_layers)
        x = lookup(self.embed.embedding[...], tokens).astype(self.config.dtype)
        if self.config.learned_positions:
            x = x + self.position_embed(position)
        x = sharding.constrain(x, sharding.ROWS)
        (x, state), _ = jax.lax.scan(body, (x, state), (indices, stacked))
        return self.norm(x), state

    def head(self) -> Array:
        """[M,V] in the parameters' dtype."""
        return self.embed.embedding[...].T if self.config.tie_embeddings else self.lm_head.kernel[...]


def lookup(table, tokens):
    """table [V,M], tokens i32[R,T] -> [R,T,M]; each device looks its rows' tokens up in its part of the vocabulary.

    A vocabulary that the devices do not divide is padded: no token stands beyond its end.
    """

    def local(arrays, axis):
        table, tokens = arrays
        if axis is None:
            return jnp.take(table, tokens, axis=0)
        index = tokens - jax.lax.axis_index(axis) * table.shape[0]
        found = jnp.take(table, jnp.clip(index, 0, table.shape[0] - 1), axis=0)
        return jax.lax.psum(jnp.where(((index >= 0) & (index < table.shape[0]))[..., None], found, 0), axis)

    rows = P(sharding.ROWS)
    return sharding.split(local, (sharding.pad(table, "tensor"), tokens), (P("tensor"), rows), rows)


def _remat(function, policy: str):
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    saved = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names("tree_attention"),
        "full": None,
    }
    return jax.checkpoint(function, policy=saved[policy])


@functools.lru_cache(maxsize=16)
def _abstract(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random float32 parameters as a pure nested dict; layers are stacked along the first axis."""
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(seed)), nnx.Param)))()


def _merge(config: ModelConfig, params: Params) -> Decoder:
    graph, abstract = _abstract(config)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def head(config: ModelConfig, params: Params) -> Array:
    """The LM head [M,V] in the parameters' dtype, without what `pad_vocabulary` added."""
    return _merge(config, params).head()[:, : config.vocab_size]


def pad_vocabulary(params: Params) -> Params:
    """Embedding and head with zeros added where the context's `tensor` axis does not divide the vocabulary.

    The results are those of `params`. What loops over tokens does this once, else every lookup does it.
    """
    padded = params | {"embed": {"embedding": sharding.pad(params["embed"]["embedding"], "tensor", "fsdp")}}
    if "lm_head" in params:
        padded["lm_head"] = {"kernel": sharding.pad(params["lm_head"]["kernel"], "fsdp", "tensor")}
    return padded


def logits(config: ModelConfig, params: Params, hidden: Array) -> jax.Array:
    """hidden [..., M] -> f32[..., V]."""
    weights = head(config, params).astype(hidden.dtype)
    return jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)


def forward_rows(
    config: ModelConfig, params: Params, rows: TokenTree, attention_implementation: str = "reference"
) -> jax.Array:
    """Hidden states [N,L,M] of packed rows (tokens, position, tree, branch, fork are read)."""
    make = lambda rows, _axis: tree_attention.plan(rows, attention_implementation)  # noqa: E731
    plan = sharding.split(make, rows, P(sharding.ROWS), P(sharding.ROWS))  # once for all layers

    def local(arrays, _axis):
        return tree_attention.tree_attention(*arrays, implementation=attention_implementation)

    def attend(_layer, _state, q, k, v):
        heads = P(sharding.ROWS, None, "tensor")
        return sharding.split(local, (q, k, v, plan), (heads, heads, heads, P(sharding.ROWS)), heads), ()

    return _merge(config, params)(rows.tokens, rows.position, attend, ())[0]
