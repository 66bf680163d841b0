"""The KV cache: an explicit pytree, an argument and a result, never a mutated attribute."""

import dataclasses

import jax
import jax.numpy as jnp

from tto_jax import sharding
from tto_jax.core.types import Array, pytree
from tto_jax.kernels.branch_decode import CachePart
from tto_jax.models.config import ModelConfig


@pytree
class Cache:
    """Keys and values of R rows with capacity C, all layers stacked."""

    k: Array  # [layers, R, K, D, C]
    v: Array  # [layers, R, K, C, D]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, capacity: int) -> "Cache":
        """Zeros in the compute dtype."""
        lead, width = (config.num_layers, rows, config.num_kv_heads * config.kv_copies), config.head_dim
        zeros = lambda *tail: jnp.zeros(lead + tail, config.dtype)  # noqa: E731
        return sharding.constrain(
            cls(k=zeros(width, capacity), v=zeros(capacity, width)), None, sharding.ROWS, "tensor"
        )

    @property
    def rows(self) -> int:
        """R."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """C, in tokens."""
        return self.v.shape[3]

    def write(self, layer: Array, slot: Array, k: Array, v: Array) -> "Cache":
        """Store T new tokens of every row at slots [slot, slot + T). k and v: [R,T,K,D]."""
        k = k.transpose(0, 2, 3, 1)[None].astype(self.k.dtype)
        v = v.transpose(0, 2, 1, 3)[None].astype(self.v.dtype)
        return dataclasses.replace(
            self,
            k=jax.lax.dynamic_update_slice(self.k, k, (layer, 0, 0, 0, slot)),
            v=jax.lax.dynamic_update_slice(self.v, v, (layer, 0, 0, slot, 0)),
        )

    def part(self, layer: Array, visible: Array) -> CachePart:
        """One layer, with who sees what: visible bool[R, queries a row, C]."""
        at = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)  # noqa: E731
        return CachePart(k=at(self.k), v=at(self.v), visible=visible)


@pytree
class Context:
    """A finished part of the cache that new tokens attend to."""

    cache: Cache
    visible: Array  # bool[R, queries a row, C]
