"""Target `token_logprobs`: hidden states to log-probs of targets and entropy, and the gradient of both inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tto_jax.bench import limits
from tto_jax.bench.options import Options, chosen, implementations
from tto_jax.bench.timing import Result, Side, largest_difference, measure, ratios_to
from tto_jax.kernels.token_logprobs import api, token_logprobs

TAKES = ("implementation", "only")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the largest number: products are summed in another order


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of `token_logprobs`: `rows` tokens."""

    rows: int  # M
    hidden: int
    vocabulary: int
    dtype: str  # of the hidden states; the head is float32, as in the update
    repeat: int
    reference: bool = True  # whether the specification fits, with its [M,V] array


SHAPES = {
    "tiny": Shape(4096, 256, 2048, "float32", 9),
    "small": Shape(2048, 384, 32_768, "float32", 5),
    "paper": Shape(16_384, 1536, 151_936, "bfloat16", 5, reference=False),
    "ci": Shape(64, 32, 512, "float32", 3),
}


def run(shape: Shape, options: Options) -> Result:
    """Each implementation forward, and forward with backward."""
    names = implementations(api, options, shape.reference)
    arrays = inputs(shape)
    work = functools.partial(
        limits.logprobs, shape.rows, shape.hidden, shape.vocabulary, jnp.dtype(shape.dtype).itemsize
    )
    sides = []
    for name in names:
        for what, function in WHAT.items():
            call = functools.partial(jax.jit(function(name)), *arrays)
            sides.append(Side(f"{name} {what}", call, work(gradient=what == "gradient"), shape.rows))
    wanted = chosen(sides, options)
    rows = measure(wanted, shape.repeat)
    difference = max(largest_difference([x.call() for x in wanted if x.name.endswith(what)]) for what in WHAT)
    found = ratios_to(rows, {f"reference {what}": f"{names[0]} {what}" for what in WHAT})
    return Result(rows, found, difference, TOLERANCE[shape.dtype])


def inputs(shape: Shape) -> tuple[jax.Array, ...]:
    """hidden [M,D], head f32[D,V], target i32[M]."""
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (shape.rows, shape.hidden), shape.dtype),
        jax.random.normal(keys[1], (shape.hidden, shape.vocabulary)) * shape.hidden**-0.5,
        jax.random.randint(keys[2], (shape.rows,), 0, shape.vocabulary),
    )


def forward(name: str):
    """(hidden, head, target) -> (log-prob, entropy)."""
    return lambda *arrays: token_logprobs(*arrays, implementation=name)


def gradient(name: str):
    """(hidden, head, target) -> gradients of the sum of log-probs, as of an update (the entropy is not trained)."""

    def total(hidden, head, target):
        return token_logprobs(hidden, head, target, implementation=name)[0].sum()

    return jax.grad(total, argnums=(0, 1))


WHAT = {"forward": forward, "gradient": gradient}
