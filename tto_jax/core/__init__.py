"""The pure core: scores of forced answers at forks of a thinking trace become per-block credit. jax, numpy, chex only."""
