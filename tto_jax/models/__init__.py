"""The policy: a causal decoder and its explicit cache."""
