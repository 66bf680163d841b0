"""Attention under `core.token_tree.visible`."""

from tto_jax.kernels.tree_attention.api import IMPLEMENTATIONS, choose, plan, tree_attention

__all__ = ["IMPLEMENTATIONS", "choose", "plan", "tree_attention"]
