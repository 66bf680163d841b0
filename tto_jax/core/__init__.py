"""The pure core: scores of forced answers at forks of a thinking trace become credit. jax, numpy, chex only."""
