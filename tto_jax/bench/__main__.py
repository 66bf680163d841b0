"""python -m tto_jax.bench."""

from tto_jax.bench import main

main()
