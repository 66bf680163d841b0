"""Attention of new tokens over a cache in parts, where many queries share a part (a prompt, a trace)."""

from tto_jax.kernels.branch_decode.api import IMPLEMENTATIONS, branch_decode, choose, lay_out, tile
from tto_jax.kernels.branch_decode.parts import CachePart, Interval

__all__ = ["IMPLEMENTATIONS", "CachePart", "Interval", "branch_decode", "choose", "lay_out", "tile"]
