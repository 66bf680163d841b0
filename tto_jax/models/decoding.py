"""Cached decoding: the decoder's layers for a few new tokens a row, over weights laid out for a loop over tokens.

The same functions as `decoder.Decoder`, which tests hold it to, in another arrangement: activations are [features,
columns] and weights [out, in], so that a product reads the weights as they lie (as the left operand no compiler packs
them anew for every token), and every layer has arrays of its own (none is sliced out of a stack at every token).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tto_jax import sharding
from tto_jax.core.types import Array, pytree
from tto_jax.kernels import branch_decode
from tto_jax.kernels.branch_decode import CachePart, Interval
from tto_jax.models import decoder
from tto_jax.models.cache import Cache, Context
from tto_jax.models.config import ModelConfig
from tto_jax.models.rope import Rotation, rotary, rotation


@pytree
class Weights:
    """Parameters in the compute dtype; `arrange` makes them."""

    embed: Array  # [V', M]: the vocabulary, padded where a mesh asks for it
    position_embed: Array | None  # [positions, M]
    layers: tuple[dict[str, Any], ...]  # as the decoder's, without the stack; kernels are [out, in]
    norm: Array  # [M]
    head: Array | None  # [V', M]; None: the embedding


def arrange(config: ModelConfig, params: decoder.Params | Weights) -> Weights:
    """The decoder's parameters as `decode` reads them; what is arranged already is returned as it is."""
    if isinstance(params, Weights):
        return params
    params = jax.tree.map(lambda x: x.astype(config.dtype), decoder.pad_vocabulary(params))
    return _arranged(config, params, lambda x, layer: x[layer], lambda x: x.T)


def shardings(mesh: Mesh, config: ModelConfig) -> Weights:
    """NamedShardings of `arrange`d parameters: by `sharding.TABLE`, without `fsdp`. The mesh must be the context's."""
    like = jax.eval_shape(lambda: decoder.pad_vocabulary(decoder.init_params(config, 0)))
    specs = jax.tree.map(
        lambda found, x: (*found.spec, *[None] * (x.ndim - len(found.spec))),
        sharding.shardings(mesh, like, config.num_kv_heads, without=("fsdp",)),
        like,
    )
    found = _arranged(config, specs, lambda spec, _: spec[1:], lambda spec: spec[::-1])
    return jax.tree.map(lambda spec: NamedSharding(mesh, P(*spec)), found, is_leaf=_is_spec)


def _is_spec(x):
    """A PartitionSpec as a tuple; the layers are a tuple, too, of dicts."""
    return type(x) is tuple and all(axis is None or isinstance(axis, str) for axis in x)


def _arranged(config, tree, of_layer: Callable, turned: Callable) -> Weights:
    def layer(number):
        one = lambda path, x: (turned if path[-1].key == "kernel" else lambda y: y)(of_layer(x, number))  # noqa: E731
        return jax.tree_util.tree_map_with_path(one, tree["layers"], is_leaf=_is_spec)

    return Weights(
        embed=tree["embed"]["embedding"],
        position_embed=tree["position_embed"]["embedding"] if config.learned_positions else None,
        layers=tuple(layer(number) for number in range(config.num_layers)),
        norm=tree["norm"]["scale"],
        head=None if config.tie_embeddings else turned(tree["lm_head"]["kernel"]),
    )


@pytree
class Open:
    """A short cache of R rows that is being filled: every row sees its slots before `slot`, and its new token there."""

    cache: Cache
    slot: Array  # i32[]
    turns: Rotation  # of the positions of its slots, [R,T,1,D/2]

    @property
    def turn(self) -> Rotation:
        """Of the new tokens' positions."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, self.slot, 1, axis=1), self.turns)


def decode(
    config: ModelConfig,
    weights: Weights,
    tokens: Array,
    position: Array,
    context: Sequence[Context] = (),
    own: Open | None = None,
) -> tuple[jax.Array, Cache]:
    """Hidden states of T new tokens for each of R rows, which see the context and the new tokens before them.

    Args:
      tokens, position: i32[R,T]; T is 1 where there is `own`.
      context: caches that are seen; their rows may be fewer: consecutive rows share one.
      own: is seen, too, and the new token is stored there, before it is read: else XLA's CPU backend copies the cache
        for every token.

    Returns:
      hidden [R,T,M], and keys and values of the new tokens: R rows of capacity T; or `own`'s cache with them.
    """
    x = decoder.lookup(weights.embed, tokens)
    if weights.position_embed is not None:
        x = x + jnp.take(weights.position_embed, position, axis=0)
    turn = rotation(position, config) if own is None else own.turn
    x, keys, values = _columns(x), [], []
    for number, layer in enumerate(weights.layers):
        mixed, k, v = _attention(config, layer, number, x, turn, context, own)
        keys.append(k), values.append(v)
        x = x + mixed
        y = _norm(config, x, layer["mlp_norm"]["scale"])
        x = x + _linear(layer["down"], jax.nn.silu(_linear(layer["gate"], y)) * _linear(layer["up"], y))
        x = sharding.constrain(x, None, sharding.ROWS)
    hidden = _norm(config, x, weights.norm).T.reshape(*tokens.shape, -1)
    new = sharding.constrain(Cache(k=tuple(keys), v=tuple(values)), sharding.ROWS, "tensor")
    return sharding.constrain(hidden, sharding.ROWS), new


def logits(config: ModelConfig, weights: Weights, hidden: Array) -> jax.Array:
    """hidden [R,M] -> f32[V,R].

    On a mesh they are made in parts of the vocabulary, then every device gathers those of its rows: of the two, the
    head and the logits, they are smaller by far.
    """
    head = weights.embed if weights.head is None else weights.head
    found = jnp.matmul(head, hidden.T, preferred_element_type=jnp.float32)
    found = sharding.constrain(sharding.constrain(found, "tensor", sharding.ROWS), None, sharding.ROWS)
    return found[: config.vocab_size]


def _columns(x):
    """[R,T,M] -> [M, R*T]."""
    return sharding.constrain(x.reshape(-1, x.shape[-1]).T, None, sharding.ROWS)


def _linear(weights, x):
    y = jnp.matmul(weights["kernel"], x)
    return y + weights["bias"][:, None] if "bias" in weights else y


def _norm(config, x, scale, axis=0):
    """RMSNorm over the features, in float32."""
    wide = x.astype(jnp.float32)
    scale = scale.reshape(-1, *[1] * (x.ndim - 1)) if axis == 0 else scale
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=axis, keepdims=True) + config.norm_eps)
    return (wide * (factor * scale)).astype(config.dtype)


def _attention(config, layer, number, x, turn, context, own):
    """Columns [M, R*T] -> the same, and keys [R,K,D,T] and values [R,K,T,D], or all that are in `own` now."""
    weights, (rows, new) = layer["attention"], turn.cos.shape[:2]
    x = _norm(config, x, layer["attention_norm"]["scale"])
    heads = lambda y: y.T.reshape(rows, new, -1, config.head_dim)  # noqa: E731
    q, k, v = (heads(_linear(weights[name], x)) for name in "qkv")
    if config.qk_norm:
        q, k = (_norm(config, y, weights[f"{name}_norm"]["scale"], axis=-1) for name, y in (("q", q), ("k", k)))
    q, k = rotary(q, turn), rotary(k, turn)
    if config.kv_copies > 1:
        k, v = (jnp.repeat(y, config.kv_copies, axis=2) for y in (k, v))
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    if own is None:
        visible = jnp.broadcast_to(jnp.tri(new, dtype=bool), (rows, new, new))
    else:
        k, v = own.cache.write_layer(number, own.slot, k, v)
        visible = Interval(begin=jnp.zeros((rows, 1), jnp.int32), end=jnp.full((rows, 1), own.slot + 1))
    parts = [part.cache.part(number, part.visible) for part in context] + [CachePart(k=k, v=v, visible=visible)]
    split, per_row = P(sharding.ROWS, "tensor"), P(sharding.ROWS)
    specs = [CachePart(k=split, v=split, visible=per_row) for _ in parts]
    local = lambda arrays, _axis: branch_decode.branch_decode(*arrays, config.branch_decode)  # noqa: E731
    out = sharding.split(local, (q.reshape(-1, *q.shape[2:]), parts), (split, specs), split)
    return _linear(weights["out"], out.reshape(out.shape[0], -1).T), k, v
