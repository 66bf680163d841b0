"""Target `update`: one optimizer step on packed rows.

Of full trees it is measured beside the same branches flattened into rows; where traces end anywhere, of rows in
buckets of lengths beside all rows at the longest.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import learner
from tto_jax.bench import limits, models, trees
from tto_jax.bench.limits import Work
from tto_jax.bench.models import Loaded
from tto_jax.bench.options import Options, chosen
from tto_jax.bench.peer import Peer
from tto_jax.bench.timing import Result, Side, measure, ratios_to
from tto_jax.bench.trees import Sizes
from tto_jax.core import token_tree
from tto_jax.core.types import TokenTree
from tto_jax.kernels import tree_attention
from tto_jax.learner import LossConfig, OptimizerConfig
from tto_jax.models.config import ModelConfig

TAKES = ("hf", "attention", "logprobs", "peer", "only")
PEERS = ("tunix", "trl")
OURS, FLATTENED, ONE_BUCKET = "tto_jax", "flattened", "one bucket"
# So small a rate that the parameters stay what they are up to rounding: the flattened side takes a step for every
# length, and the objectives of both sides must agree.
OPTIMIZER = OptimizerConfig(learning_rate=1e-12, weight_decay=0.01)
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the objective, as a share of the sum of |advantage| / constant


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of `update`: `rows` of a prompt and a trace of `new` tokens, with A answers at each of S forks, or none."""

    model: str
    rows: int
    prompt: int
    new: int
    dtype: str
    repeat: int
    micro_tokens: int  # whose gradient is computed at a time, at most (but at least a row's)
    remat: str = "none"
    forks: int = 0  # S, at equal distances up to the trace's end; 0: plain rows, as of GRPO
    answers: int = 0  # A
    forced: int = 0  # inserted tokens of an answer
    cap: int = 0  # sampled ones
    group: int = 1  # traces of a prompt, which changes nothing here but the advantages
    buckets: int = 0  # row lengths of trees whose traces end anywhere, uniformly; 0: all are full

    @property
    def sizes(self) -> Sizes:
        """As trees."""
        forks = tuple(self.new * (s + 1) // max(self.forks, 1) for s in range(max(self.forks, 1)))
        return Sizes(self.rows, self.prompt, forks, self.answers, self.forced, self.cap)


SHAPES = {
    "tiny": Shape("tiny", 16, 128, 256, "float32", 5, 768),
    "small": Shape("small", 16, 128, 256, "float32", 3, 1536),
    "trunk": Shape("tiny", 4, 128, 1024, "float32", 3, 2048, forks=4, answers=4, forced=8, cap=24),
    "paper": Shape("1.5b", 8, 1024, 8000, "bfloat16", 3, 12_288, "full", 4, 4, forced=8, cap=118),
    "lengths": Shape("tiny", 16, 128, 1024, "float32", 3, 2048, "none", 4, 4, forced=8, cap=24, buckets=3),
    "paper_lengths": Shape("1.5b", 16, 1024, 8000, "bfloat16", 3, 12_288, "full", 4, 4, forced=8, cap=118, buckets=3),
    "ci": Shape("ci", 4, 8, 16, "float32", 2, 64),
    "ci_trunk": Shape("ci", 2, 8, 16, "float32", 2, 128, forks=2, answers=1, forced=3, cap=4),  # as in `iteration`
    "ci_lengths": Shape("ci", 4, 8, 24, "float32", 2, 64, forks=2, answers=1, forced=3, cap=4, buckets=3),
}


Batches = list[tuple[LossConfig, TokenTree]]  # one an optimizer step


class Learner:
    """A training state that both sides use, so that it is there once; it is donated to every step."""

    def __init__(self, model: ModelConfig, params):
        self._model, self._state = model, learner.init_state(params, OPTIMIZER)
        self.last: dict[str, float] = {}  # of its last optimizer step: `loss` and `grad_norm`, before the clip

    def update(self, batches: Batches) -> float:
        """An optimizer step a batch; the sum of their losses, once all is done."""
        losses = []
        for config, rows in batches:
            self._state, metrics = learner.train_step(self._model, config, OPTIMIZER, self._state, rows)
            losses.append(metrics["loss/total"])
        jax.block_until_ready(self._state)
        self.last = {"loss": float(losses[-1]), "grad_norm": float(metrics["update/grad_norm"])}
        return float(sum(losses))

    def score(self, batches: Batches) -> list[jax.Array]:
        """Log-probs f32[N,L] of each batch."""
        scored = [learner.score_logprobs(self._model, config, self._state.params, rows)[0] for config, rows in batches]
        return jax.block_until_ready(scored)


def run(shape: Shape, options: Options) -> Result:
    """A step with log-probs, clipped objective, gradient, clip by norm and AdamW. Tokens are the trained ones.

    The flattened side has the same trained tokens: S A rows of prompt, trace up to the fork and one answer, those of
    one length together, without padding; it takes S + 1 optimizer steps, which is its only disadvantage beside the
    repeated trunks. The objectives of both sides are compared. A peer takes a GRPO step on plain rows with the same
    weights; its log-probs, its loss and the norm of its gradient are compared with ours.
    """
    check(shape, options)
    loaded = models.find(shape.model, shape.dtype, shape.remat, options.hf)
    model, sizes = loaded.config, shape.sizes
    if shape.buckets:
        rows, batches, work, sized = in_buckets(shape, model, options)
    else:
        rows = tree_rows(sizes, model, shape.group) if shape.forks else plain_rows(sizes, model)
        batches = both(sizes, rows, shape.micro_tokens, options)
        work, sized = works(model, sizes, limits.update), notes(model, sizes)
    with peer_of(loaded, rows, shape, options) as peer:
        trained, state = int(rows.loss_mask.sum()), Learner(model, loaded.params())
        sides = [
            Side(name, functools.partial(state.update, part), work[name], trained) for name, part in batches.items()
        ]
        if peer is not None:
            sides.append(Side(options.peer, peer.work, work[OURS], trained, peer.clock, peer))
        wanted = chosen(sides, options)
        found = measure(wanted, shape.repeat)
        scale = float(jnp.abs(jnp.where(rows.loss_mask, rows.advantage, 0)).sum()) / constant(sizes)
        difference = 0.0
        if peer is not None:
            difference = max(
                peer_difference(peer, rows, state.score(batches[OURS])[0], sizes),
                step_difference(peer.last, state.last, scale),
            )
    ours = [side for side in wanted if side.name in batches]
    objectives = [side.call() for side in ours] if len(ours) > 1 else [0.0]
    difference = max(difference, (max(objectives) - min(objectives)) / scale)
    slower = (ONE_BUCKET if shape.buckets else FLATTENED, *PEERS)
    sized |= {"peer": peer.versions} if peer else {}
    return Result(found, ratios_to(found, dict.fromkeys(slower, OURS)), difference, TOLERANCE[shape.dtype], sized)


def check(shape: Shape, options: Options) -> None:
    """Raises ValueError for a peer that is not known, or that does not know trees."""
    if options.peer is not None and (options.peer not in PEERS or shape.forks):
        raise ValueError(f"--peer={options.peer!r}: choose one of {PEERS}, with a shape without forks such as tiny")


@contextlib.contextmanager
def peer_of(loaded: Loaded, rows: TokenTree, shape: Shape, options: Options) -> Iterator[Peer | None]:
    """The peer's process with the same weights and rows, if one was asked for."""
    if options.peer is None:
        yield None
        return
    new = shape.sizes.trace
    arrays = {"tokens": rows.tokens, "advantage": rows.advantage[:, -1], "old_logprob": rows.old_logprob[:, -new:]}
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    given = {"dtype": shape.dtype, "remat": shape.remat}
    if options.peer == "trl":  # Tunix's step takes all rows at once
        given["micro_rows"] = micro_rows(shape)
    with (
        models.exported(loaded, loaded.params()) as directory,
        Peer(options.peer, arrays, jax.default_backend(), model=directory, **given) as peer,
    ):
        yield peer


def micro_rows(shape: Shape) -> int:
    """Rows whose gradient a peer computes at a time: no more than `micro_tokens` allows, in parts of one size."""
    return math.gcd(shape.rows, max(shape.micro_tokens // shape.sizes.length, 1))


def peer_difference(peer: Peer, rows: TokenTree, ours: jax.Array, sizes: Sizes) -> float:
    """Largest difference of our log-probs of trained tokens from the peer's; `ours` is f32[N,L]."""
    return float(np.abs(peer.logprobs(np.asarray(rows.tokens)) - np.asarray(ours)[:, -sizes.trace :]).max())


def step_difference(theirs: dict[str, float], ours: dict[str, float], scale: float) -> float:
    """Largest difference of a step's loss, as a share of `scale`, and of its gradient's norm, as a share of ours.

    0 if not both were measured.
    """
    if not (theirs and ours):
        return 0.0
    apart = {name: abs(theirs[name] - ours[name]) for name in ("loss", "grad_norm")}
    return max(apart["loss"] / scale, apart["grad_norm"] / ours["grad_norm"])


def notes(model: ModelConfig, sizes: Sizes) -> dict:
    """Sizes that are not flags."""
    packed = sizes.rows * sizes.length
    found = {"parameters": limits.parameters(model), "tokens of a packed row": sizes.length}
    if sizes.answers:
        flat = sum(group.rows(sizes) * group.length(sizes) for group in trees.groups(sizes))
        found |= {"tokens flattened": flat, "times fewer": flat / packed}
    return found


def both(sizes: Sizes, rows: TokenTree, micro_tokens: int, options: Options) -> dict[str, Batches]:
    """Packed rows and, if there are answers, their flattened branches, one batch a length."""
    packed = [(loss_config(sizes, micro_tokens, rows, sizes.trained, options), rows)]
    if not sizes.answers:
        return {OURS: packed}
    flat = [
        (loss_config(sizes, micro_tokens, part, group.trained(sizes), options), part)
        for group, part in zip(trees.groups(sizes), trees.flattened(sizes, rows))
    ]
    return {OURS: packed, FLATTENED: flat}


def in_buckets(shape: Shape, model: ModelConfig, options: Options) -> tuple[TokenTree, dict[str, Batches], dict, dict]:
    """Trees whose traces end anywhere; the batches and the work of both sides, which is the same; notes."""
    sizes = shape.sizes
    if not shape.forks:
        raise ValueError(f"--buckets={shape.buckets}: rows of several lengths are trees: choose --shape=lengths")
    made = trees.made(sizes, model.vocab_size, shape.group, full=False)
    rows = trees.packed(sizes, *made, trees.credit_of(sizes, shape.group))
    config = loss_config(sizes, shape.micro_tokens, rows, sizes.trained, options)
    number, pairs = int((rows.tree >= 0).sum()), trees.pairs(sizes, made[1].length, made[3])
    work = limits.update(model, number, pairs, int(rows.loss_mask.sum()))
    sides = {OURS: dataclasses.replace(config, buckets=shape.buckets), ONE_BUCKET: config}
    batches = {name: [(config, rows)] for name, config in sides.items()}
    sized = {"parameters": limits.parameters(model), "row lengths": list(sides[OURS].lengths)}
    return rows, batches, dict.fromkeys(sides, work), sized


def constant(sizes: Sizes) -> float:
    """The divisor of the summed objective, the same on both sides."""
    return float(sizes.rows * sizes.trained)


def loss_config(sizes: Sizes, micro_tokens: int, rows: TokenTree, trained: int, options: Options) -> LossConfig:
    """Options of the loss on rows, each of which trains so many tokens."""
    attention = options.attention or tree_attention.choose(jax.default_backend())
    kernels = {"attention": attention, "logprobs": options.logprobs}
    return LossConfig(
        num_targets=trained,
        num_states=rows.tokens.shape[1],
        constant=constant(sizes),
        micro_tokens=micro_tokens,
        **{key: value for key, value in kernels.items() if value},
    )


def plain_rows(sizes: Sizes, model: ModelConfig) -> TokenTree:
    """Prompts and traces alone."""
    rng, (number, length) = np.random.default_rng(0), (sizes.rows, sizes.prompt + sizes.trace)
    mask = np.arange(length) >= sizes.prompt
    tokens = rng.integers(0, model.vocab_size, (number, length), dtype=np.int32)
    rows = token_tree.sequences(tokens, np.full(number, length), np.broadcast_to(mask, tokens.shape))
    advantage = np.where(mask, rng.choice(np.float32([-1, -0.5, 0.5, 1]), (number, 1)), 0)
    return dataclasses.replace(rows, advantage=jnp.asarray(advantage), old_logprob=old_logprob(rows, model))


def tree_rows(sizes: Sizes, model: ModelConfig, group: int) -> TokenTree:
    """Packed trees with random tokens and advantages."""
    made = trees.made(sizes, model.vocab_size, group)
    return trees.packed(sizes, *made, trees.credit_of(sizes, group))


def old_logprob(rows: TokenTree, model: ModelConfig) -> jax.Array:
    """Near the log-probs of a random model."""
    return jnp.where(rows.loss_mask, -np.float32(np.log(model.vocab_size)), 0.0)


def works(model: ModelConfig, sizes: Sizes, count: Callable[..., Work]) -> dict[str, Work]:
    """Of packed rows and of flattened ones, by `limits.update` or `limits.scoring`."""
    packed = count(model, sizes.rows * sizes.length, sizes.rows * sizes.pairs, sizes.rows * sizes.trained)
    flat = Work()
    for group in trees.groups(sizes):
        rows, length = group.rows(sizes), group.length(sizes)
        flat += count(model, rows * length, rows * limits.causal_pairs(1, length), rows * group.trained(sizes))
    return {OURS: packed, FLATTENED: flat}
