"""Hidden states and the LM head to the log-prob of the target and the entropy, without a [tokens, vocabulary] array."""

from tto_jax.kernels.token_logprobs.api import IMPLEMENTATIONS, choose, token_logprobs

__all__ = ["IMPLEMENTATIONS", "choose", "token_logprobs"]
