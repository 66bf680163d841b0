"""The specification: a dense mask from the four int vectors of every row."""

import jax
import jax.numpy as jnp

from tto_jax.core import token_tree
from tto_jax.core.types import Array, TokenTree
from tto_jax.kernels.tree_attention import blocks

plan = blocks.vectors


def tree_attention(q: Array, k: Array, v: Array, rows: TokenTree | blocks.Vectors) -> jax.Array:
    """q [N,L,H,D], k and v [N,L,K,D] -> [N,L,H,D]; softmax in float32."""
    n, length, heads, width = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(n, length, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("nqkgd,nskd->nkgqs", q, k, preferred_element_type=jnp.float32) * width**-0.5
    mask = jax.vmap(token_tree.visible)(rows, rows)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf), axis=-1)
    out = jnp.einsum("nkgqs,nskd->nqkgd", weights.astype(v.dtype), v)
    return out.reshape(n, length, heads, width)
