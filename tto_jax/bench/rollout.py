"""Target `rollout`: traces of a fixed length with their log-probs, beside `generate` of transformers."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from tto_jax import rollout
from tto_jax.bench import limits, models, trees
from tto_jax.bench.models import Loaded
from tto_jax.bench.options import Options, chosen
from tto_jax.bench.peer import Peer
from tto_jax.bench.timing import Result, Side, measure, ratios_to
from tto_jax.core.sampling import SampleConfig
from tto_jax.core.types import Prompts
from tto_jax.rollout import RolloutConfig

TAKES = ("hf", "peer", "only")
OURS, PEERS = "tto_jax", ("transformers",)
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}  # of the log-probs of the same tokens, in nats
CHECKED = 2  # traces whose log-probs the peer computes
NEVER = -1  # a token that no model samples: traces do not stop early


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of `rollout`: `rows` traces of `new` tokens, `group` of each prompt; temperature 1, no early stop."""

    model: str
    rows: int
    group: int
    prompt: int
    new: int
    dtype: str
    repeat: int
    segment: int = 256  # tokens a jitted segment


SHAPES = {
    "tiny": Shape("tiny", 64, 8, 128, 256, "float32", 5),
    "small": Shape("small", 64, 8, 128, 256, "float32", 3),
    "paper": Shape("1.5b", 64, 8, 1024, 1024, "bfloat16", 3),
    "ci": Shape("ci", 4, 2, 8, 8, "float32", 2, segment=4),
}


def run(shape: Shape, options: Options) -> Result:
    """Sampled tokens with their log-probs; a peer samples from the same weights and prompts, without log-probs.

    The peer computes the log-probs of some of our tokens, too: they must agree.
    """
    check(shape, options)
    loaded = models.find(shape.model, shape.dtype, hf=options.hf)
    model, config, prompts = loaded.config, engine(shape), prompts_of(loaded, shape)
    params = loaded.params()
    with peer_of(loaded, params, prompts, shape, options) as peer:
        weights = jax.block_until_ready(rollout.weights(model, params))
        del params
        placed, key = jax.device_put(prompts), jax.random.key(0)

        def ours():
            return rollout.sample_traces(model, config, weights, placed, key)[0]

        tokens = shape.rows * shape.new
        work = limits.thinking(model, shape.rows // shape.group, shape.group, shape.prompt, shape.new)
        sides = [Side(OURS, ours, work, tokens)]
        if peer is not None:
            sides.append(Side(options.peer, peer.work, work, tokens, peer.clock, peer))
        rows = measure(chosen(sides, options), shape.repeat)
        difference = peer_difference(peer, prompts, shape, ours()) if peer is not None else 0.0
    notes = {"parameters": limits.parameters(model)} | ({"peer": peer.versions} if peer else {})
    return Result(rows, ratios_to(rows, dict.fromkeys(PEERS, OURS)), difference, TOLERANCE[shape.dtype], notes)


def check(shape: Shape, options: Options) -> None:
    """Raises ValueError for a shape that cannot work or a peer that is not known."""
    if shape.rows % shape.group:
        raise ValueError(f"--rows={shape.rows}: it must be a multiple of --group={shape.group}")
    if options.peer is not None and options.peer not in PEERS:
        raise ValueError(f"--peer={options.peer!r} is unknown: choose one of {PEERS}")


def engine(shape: Shape) -> RolloutConfig:
    """The rollout's options; nothing is forced here, but an answer must have a size."""
    return RolloutConfig(
        group_size=shape.group,
        trace_pad=shape.new,
        answers=1,
        answer_cap=1,
        think_end=NEVER,
        eos=NEVER,
        elicit_ended=(0,),
        elicit_cut=(0,),
        sample=SampleConfig(temperature=1.0),
        segment=shape.segment,
    )


def prompts_of(loaded: Loaded, shape: Shape) -> Prompts:
    """Random full prompts, on the host."""
    number = shape.rows // shape.group
    tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (number, shape.prompt), dtype=np.int32)
    return trees.prompts_of(tokens)


@contextlib.contextmanager
def peer_of(loaded: Loaded, params, prompts: Prompts, shape: Shape, options: Options) -> Iterator[Peer | None]:
    """The peer's process with the same weights and prompts, if one was asked for."""
    if options.peer is None:
        yield None
        return
    repeated = {"prompts": np.repeat(prompts.tokens, shape.group, axis=0)}
    with (
        models.exported(loaded, params) as directory,
        Peer(options.peer, repeated, jax.default_backend(), model=directory, new=shape.new, dtype=shape.dtype) as peer,
    ):
        yield peer


def peer_difference(peer: Peer, prompts: Prompts, shape: Shape, traces) -> float:
    """Largest difference of our log-probs of some sampled tokens from the peer's."""
    few = min(CHECKED, shape.rows)
    tokens, logprob = (np.asarray(x[:few]) for x in (traces.tokens, traces.logprob))
    whole = np.concatenate([np.repeat(prompts.tokens, shape.group, axis=0)[:few], tokens], axis=1)
    return float(np.abs(peer.logprobs(whole) - logprob).max())
