"""The KV cache: an explicit pytree, an argument and a result, never a mutated attribute."""

import jax
import jax.numpy as jnp

from tto_jax import sharding
from tto_jax.core.types import Array, pytree
from tto_jax.kernels.branch_decode import CachePart, Interval, lay_out
from tto_jax.models.config import ModelConfig


@pytree
class Cache:
    """Keys and values of R rows with capacity C: an array a layer, so that each is read where it lies.

    Loops over tokens only read the long one, which gets a block at a time, and write to a short one of their own: in
    place, as they write a token before they read.
    """

    k: tuple[Array, ...]  # of each layer [R, K, D, C], or in tiles of T slots: [R, K, C / T, D, T]
    v: tuple[Array, ...]  # of each layer [R, K, C, D]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, capacity: int, tile: int = 0) -> "Cache":
        """Zeros in the compute dtype. tile: T, slots of a tile of keys, which divides the capacity; 0: no tiles."""
        lead, width = (rows, config.num_kv_heads * config.kv_copies), config.head_dim
        zeros = lambda *tail: tuple(jnp.zeros(lead + tail, config.dtype) for _ in range(config.num_layers))  # noqa: E731
        keys = zeros(capacity // tile, width, tile) if tile else zeros(width, capacity)
        return sharding.constrain(cls(k=keys, v=zeros(capacity, width)), sharding.ROWS, "tensor")

    @property
    def rows(self) -> int:
        """R."""
        return self.k[0].shape[0]

    @property
    def capacity(self) -> int:
        """C, in tokens."""
        return self.v[0].shape[2]

    def write(self, slot: Array, new: "Cache") -> "Cache":
        """Store `new`, of R rows and capacity T, at slots [slot, slot + T) of every row. slot: i32[].

        In tiles, `new` is one of them.
        """
        layers = (self.write_layer(layer, slot, k, v) for layer, (k, v) in enumerate(zip(new.k, new.v)))
        keys, values = zip(*layers)
        return Cache(k=keys, v=values)

    def write_layer(self, layer: int, slot: Array, k: Array, v: Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer with k [R,K,D,T] and v [R,K,T,D] at slots [slot, slot + T) of every row."""
        at, long = jax.lax.dynamic_update_slice_in_dim, self.k[layer]
        tiles = long.ndim == 5
        keys = at(long, k[:, :, None], slot // k.shape[3], axis=2) if tiles else at(long, k, slot, axis=3)
        return keys, at(self.v[layer], v, slot, axis=2)

    def write_blocks(self, block: Array, new: "Cache") -> "Cache":
        """Store `new`, of R rows and capacity T, at slots [block T, block T + T) of each row. block: i32[R].

        Where it is no block of this cache (such as -1) nothing is stored. T divides the capacity; tiles have T slots.
        """
        size = new.capacity
        here = jnp.arange(self.capacity // size) == block[:, None]  # [R, blocks]

        def keys(long, new):
            if long.ndim == 5:  # [R,K,blocks,D,T]
                return jnp.where(here[:, None, :, None, None], new[:, :, None], long)
            blocks = long.reshape(*long.shape[:3], -1, size)
            return jnp.where(here[:, None, None, :, None], new[:, :, :, None, :], blocks).reshape(long.shape)

        def values(long, new):  # [R,K,C,D]
            blocks = long.reshape(*long.shape[:2], -1, size, long.shape[3])
            return jnp.where(here[:, None, :, None, None], new[:, :, None], blocks).reshape(long.shape)

        return Cache(k=tuple(map(keys, self.k, new.k)), v=tuple(map(values, self.v, new.v)))

    def first(self, capacity: int) -> "Cache":
        """The first slots alone; of tiles, whole ones."""
        if capacity >= self.capacity:
            return self
        keys = tuple(k[..., :capacity] if k.ndim == 4 else k[:, :, : capacity // k.shape[4]] for k in self.k)
        return Cache(k=keys, v=tuple(v[:, :, :capacity] for v in self.v))

    def part(self, layer: int, visible: Array | Interval) -> CachePart:
        """One layer, with who sees what: visible bool[R, queries a row, C] or an interval of slots."""
        return CachePart(k=self.k[layer], v=self.v[layer], visible=visible)


@pytree
class Context:
    """A finished part of the cache that new tokens attend to."""

    cache: Cache
    visible: Array | Interval  # bool[R, queries a row, C], or slots

    def for_loop(self, config: ModelConfig, rows: int) -> "Context":
        """The same, laid out for a loop that decodes a token for each of `rows` rows at a time."""
        queries = rows // self.cache.rows * config.group
        keys = tuple(lay_out(config.branch_decode, k, queries) for k in self.cache.k)
        return Context(cache=Cache(k=keys, v=self.cache.v), visible=self.visible)
