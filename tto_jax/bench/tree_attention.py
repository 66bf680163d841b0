"""Target `tree_attention`: attention of packed trees, beside the same branches flattened into rows of their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tto_jax.bench import limits, models, trees
from tto_jax.bench.options import Options, chosen, implementations
from tto_jax.bench.timing import Result, Side, largest_difference, measure, ratios_to
from tto_jax.bench.trees import Sizes
from tto_jax.kernels.tree_attention import api, tree_attention

TAKES = ("implementation", "only")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of `tree_attention`: trees a row, and the heads of a model."""

    model: str
    rows: int  # N
    prompt: int
    forks: tuple[int, ...]
    answers: int
    answer: int  # tokens of an answer, inserted ones included
    dtype: str
    repeat: int
    reference: bool = True  # whether the specification fits, with its mask of all pairs
    flattened: bool = True  # whether the flattened rows fit

    @property
    def sizes(self) -> Sizes:
        """As trees."""
        return Sizes(self.rows, self.prompt, self.forks, self.answers, 0, self.answer)


SHAPES = {
    "tiny": Shape("tiny", 1, 128, (256, 512, 768, 1024), 4, 32, "float32", 5),
    "small": Shape("small", 1, 128, (512, 1024, 1536, 2048), 4, 64, "float32", 5),
    "tree8k": Shape("tiny", 1, 256, (2000, 4000, 6000, 8000), 4, 128, "float32", 3, reference=False),
    "paper": Shape("1.5b", 4, 1024, (2000, 4000, 6000, 8000), 4, 128, "bfloat16", 9, reference=False),
    "ci": Shape("ci", 2, 8, (8, 16), 2, 4, "float32", 3),
}


def run(shape: Shape, options: Options) -> Result:
    """Each implementation forward, and forward with backward; the first of them on the flattened branches, too.

    Flattened rows of one length are a call; their log-probs are compared by the target `update`.
    """
    names = implementations(api, options, shape.reference)
    model, sizes = models.find(shape.model, shape.dtype).config, shape.sizes
    rows = tree_rows(sizes)
    flat = trees.flattened(sizes, rows)
    sides, tokens = [], rows.tokens.size  # of the trees, on both sides
    for what, function in WHAT.items():
        for name in names:
            call = functools.partial(jax.jit(functools.partial(function, name)), *inputs(model, rows), plan(rows, name))
            sides.append(Side(f"{name} {what}", call, work(model, sizes, what), tokens))
        if shape.flattened:
            call = _all(function, names[0], model, flat)
            sides.append(Side(f"flattened {what}", call, flat_work(model, sizes, what), tokens))
    wanted = chosen(sides, options)
    found = measure(wanted, shape.repeat)
    trees_only = [side for side in wanted if not side.name.startswith("flattened")]
    difference = max(
        largest_difference([side.call() for side in trees_only if side.name.endswith(what)]) for what in WHAT
    )
    ratios = ratios_to(
        found,
        {f"{other} {what}": f"{names[0]} {what}" for other in ("flattened", "reference") for what in WHAT},
    )
    ratios |= {
        "times fewer pairs than all": sizes.length**2 / sizes.pairs,
        "times fewer tokens than flattened": sum(x.tokens.size for x in flat) / rows.tokens.size,
    }
    return Result(found, ratios, difference, TOLERANCE[shape.dtype])


def tree_rows(sizes: Sizes):
    """Packed rows; of their tokens only the place counts."""
    made = trees.made(sizes, 2, group=1)
    return trees.packed(sizes, *made, trees.credit_of(sizes, 1))


def inputs(model, rows) -> tuple[jax.Array, ...]:
    """q [N,L,H,D], k and v [N,L,K,D], random."""
    keys, (number, length) = jax.random.split(jax.random.key(0), 3), rows.tokens.shape
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    return tuple(
        jax.random.normal(key, (number, length, count, model.head_dim), model.dtype) for key, count in zip(keys, heads)
    )


def plan(rows, name):
    """What the implementation reads of rows: made once for all layers of a model, so it is not timed."""
    return jax.block_until_ready(jax.jit(api.plan, static_argnums=1)(rows, name))


def attend(name, q, k, v, rows) -> jax.Array:
    """The op."""
    return tree_attention(q, k, v, rows, implementation=name)


def gradient(name, q, k, v, rows) -> tuple[jax.Array, ...]:
    """Gradients of q, k, v of the sum of squares of the result."""

    def total(*arrays):
        return jnp.sum(attend(name, *arrays, rows).astype(jnp.float32) ** 2)

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


WHAT = {"forward": attend, "gradient": gradient}


def _all(function, name, model, parts):
    """A call of every part in turn."""
    jitted = jax.jit(functools.partial(function, name))
    calls = [functools.partial(jitted, *inputs(model, part), plan(part, name)) for part in parts]
    return lambda: [jax.block_until_ready(call()) for call in calls]


def work(model, sizes: Sizes, what: str) -> limits.Work:
    """Of packed rows."""
    return _work(model, what, sizes.rows * sizes.length, sizes.rows * sizes.pairs)


def flat_work(model, sizes: Sizes, what: str) -> limits.Work:
    """Of the flattened branches."""
    parts = [(group.rows(sizes), group.length(sizes)) for group in trees.groups(sizes)]
    tokens, pairs = sum(n * x for n, x in parts), sum(n * limits.causal_pairs(1, x) for n, x in parts)
    return _work(model, what, tokens, pairs)


def _work(model, what, tokens, pairs):
    count = limits.attention if what == "forward" else limits.attention_gradient
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    return count(tokens, tokens, *heads, pairs, limits.itemsize(model))
