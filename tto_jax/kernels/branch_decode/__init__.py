"""Attention of new tokens over a cache in parts, where many queries share a part (a prompt, a trace)."""

from tto_jax.kernels.branch_decode.api import IMPLEMENTATIONS, CachePart, branch_decode

__all__ = ["IMPLEMENTATIONS", "CachePart", "branch_decode"]
