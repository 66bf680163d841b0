"""Target `branch_decode`: a query for every branch over its shared trunk and its own cache, beside a trunk a branch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tto_jax.bench import limits, models
from tto_jax.bench.options import Options, chosen, implementations
from tto_jax.bench.timing import Result, Side, largest_difference, measure, ratios_to
from tto_jax.kernels.branch_decode import CachePart, Interval, api, branch_decode

TAKES = ("implementation", "only")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
FLATTENED = "flattened"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of `branch_decode`: one layer, one step."""

    model: str
    rows: int  # N, traces
    forks: tuple[int, ...]  # tokens of the trunk that a branch sees
    answers: int  # branches a fork
    own: int  # tokens of a branch so far
    dtype: str
    repeat: int
    flattened: bool = True  # whether a trunk for every branch fits

    @property
    def branches(self) -> int:
        """Of a trace."""
        return len(self.forks) * self.answers


SHAPES = {
    "tiny": Shape("tiny", 16, (256, 512, 768, 1024), 4, 32, "float32", 15),
    "small": Shape("small", 16, (512, 1024, 1536, 2048), 4, 64, "float32", 9),
    "paper": Shape("1.5b", 64, (2000, 4000, 6000, 8000), 4, 128, "bfloat16", 15),
    "ci": Shape("ci", 2, (8, 16), 2, 4, "float32", 3),
}


def run(shape: Shape, options: Options) -> Result:
    """Each implementation with shared trunks; the first of them with a trunk a branch, too."""
    names = implementations(api, options, reference=True)
    model = models.find(shape.model, shape.dtype).config
    query, trunk, own = inputs(model, shape)
    queries = shape.rows * shape.branches
    jitted = {name: jax.jit(functools.partial(branch_decode, implementation=name)) for name in names}
    shared = work(model, shape, trunks=shape.rows)
    sides = [Side(name, functools.partial(call, query, (trunk, own)), shared, queries) for name, call in jitted.items()]
    calls = [side.call for side in sides]
    if shape.flattened and (not options.only or FLATTENED in options.only):
        alone = functools.partial(jitted[names[0]], query, (repeated(trunk, shape.branches), own))
        calls.append(alone)
        sides.append(Side(FLATTENED, alone, work(model, shape, trunks=queries), queries))
    rows = measure(chosen(sides, options), shape.repeat)
    difference = largest_difference([call() for call in calls])
    ratios = ratios_to(rows, {FLATTENED: names[0], "reference": names[0]})
    return Result(rows, ratios, difference, TOLERANCE[shape.dtype])


def inputs(model, shape: Shape) -> tuple[jax.Array, CachePart, CachePart]:
    """Queries [N*S*A,H,D], the trunks (a row a trace) and the branches' own caches (a row a branch)."""
    keys, queries = jax.random.split(jax.random.key(0), 3), shape.rows * shape.branches
    query = jax.random.normal(keys[0], (queries, model.num_heads, model.head_dim), model.dtype)
    forks = jnp.tile(jnp.repeat(jnp.asarray(shape.forks, jnp.int32), shape.answers), (shape.rows, 1))
    trunk = _part(model, keys[1], shape.forks[-1], forks)
    return query, trunk, _part(model, keys[2], shape.own, jnp.full((queries, 1), shape.own, jnp.int32))


def _part(model, key, capacity, end):
    """A cache whose rows serve queries that see the slots before `end` i32[R, queries a row]."""
    rows, (one, two) = end.shape[0], jax.random.split(key)
    draw = functools.partial(jax.random.normal, dtype=model.dtype)
    lead, width = (rows, model.num_kv_heads), model.head_dim
    seen = Interval(begin=jnp.zeros_like(end), end=end)
    return CachePart(k=draw(one, (*lead, width, capacity)), v=draw(two, (*lead, capacity, width)), visible=seen)


def repeated(trunk: CachePart, number: int) -> CachePart:
    """A copy of the trunk for each of its `number` branches."""
    k, v = (jnp.repeat(x, number, axis=0) for x in (trunk.k, trunk.v))
    return CachePart(k=k, v=v, visible=jax.tree.map(lambda x: x.reshape(-1, 1), trunk.visible))


def work(model, shape: Shape, trunks: int) -> limits.Work:
    """Of one step with so many trunks: each is read up to the last fork of its branches."""
    queries = shape.rows * shape.branches
    pairs = shape.rows * shape.answers * sum(fork + shape.own for fork in shape.forks)
    of_trunks = trunks * shape.forks[-1] if trunks == shape.rows else shape.rows * shape.answers * sum(shape.forks)
    keys = of_trunks + queries * shape.own
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    return limits.attention(queries, keys, *heads, pairs, limits.itemsize(model))
