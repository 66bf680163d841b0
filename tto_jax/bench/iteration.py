"""Target `iteration`: a whole BRPO iteration with shared trunks, beside one whose branches are flattened.

Phases are timed by themselves, each on the same traces: think; answer from the cached traces, or with every branch a
request of its own whose prefix is prefilled again; log-probs and update of packed trees, or of flattened rows.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import rollout
from tto_jax.bench import limits, models, trees, update
from tto_jax.bench.models import Loaded
from tto_jax.bench.options import Options, chosen
from tto_jax.bench.rollout import NEVER
from tto_jax.bench.timing import Result, Row, Side, measure, watch_compilation
from tto_jax.bench.trees import Sizes
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.sampling import SampleConfig
from tto_jax.core.types import Prompts
from tto_jax.rollout import RolloutConfig

TAKES = ("hf", "attention", "logprobs", "only")
SHARED, FLATTENED = "shared", "flattened"
PHASES = ("answer", "score", "update")  # that both ways have; thinking is the same in both
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}  # of the trainer's log-probs from the sampler's, in nats


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of `iteration`: `rows` traces of `new` tokens, S forks at equal distances, A answers at each."""

    model: str
    rows: int
    group: int
    prompt: int
    new: int
    forks: int
    answers: int
    forced: int  # inserted tokens
    cap: int  # sampled tokens of an answer
    dtype: str
    repeat: int
    micro_tokens: int
    remat: str = "none"
    requests: int = 16  # flattened branches that are prefilled and decoded at a time
    segment: int = 256

    @property
    def sizes(self) -> Sizes:
        """As trees."""
        forks = tuple(self.new * (s + 1) // self.forks for s in range(self.forks))
        return Sizes(self.rows, self.prompt, forks, self.answers, self.forced, self.cap)


SHAPES = {
    "trunk": Shape("tiny", 4, 4, 128, 1024, 4, 4, 8, 24, "float32", 3, 2048),
    "trunk64": Shape("tiny", 64, 8, 128, 1024, 4, 4, 8, 24, "float32", 3, 2048),
    "small": Shape("small", 4, 4, 128, 1024, 4, 4, 8, 24, "float32", 3, 2048),
    "paper": Shape("1.5b", 8, 8, 1024, 8000, 4, 4, 8, 118, "bfloat16", 3, 12_288, "full"),
    "ci": Shape("ci", 2, 2, 8, 16, 2, 1, 3, 4, "float32", 2, 128, requests=2, segment=16),
}


class Rollout:
    """The phases that sample. Traces never stop early, so forks are the budgets and all answers are full."""

    def __init__(self, loaded: Loaded, shape: Shape):
        self._shape, self._sizes, self._model = shape, shape.sizes, loaded.config
        self._key = jax.random.key(0)
        number = shape.rows // shape.group
        draw = np.random.default_rng(0).integers(0, self._model.vocab_size, (number, shape.prompt), dtype=np.int32)
        self.prompts = jax.device_put(trees.prompts_of(draw))
        self._forced = tuple(1 + i for i in range(shape.forced))
        self._weights = jax.block_until_ready(rollout.weights(self._model, loaded.params()))
        self._schedule = jax.device_put(BudgetSchedule.from_prior(self._sizes.forks))
        self._config = self._engine(shape.group, shape.new)

    def _engine(self, group, new):
        return RolloutConfig(
            group_size=group,
            trace_pad=new,
            answers=self._shape.answers,
            answer_cap=self._shape.cap,
            think_end=NEVER,
            eos=NEVER,
            elicit_ended=self._forced,
            elicit_cut=self._forced,
            sample=SampleConfig(temperature=1.0),
            segment=self._shape.segment,
        )

    def think(self):
        """Traces and what the answers hang on."""
        return rollout.sample_traces(self._model, self._config, self._weights, self.prompts, self._key)

    def answer(self, traces, trunk):
        """(answers, forks) from the cached traces."""
        forks = rollout.cut(traces.length, self._schedule)
        return rollout.sample_answers(self._model, self._config, self._weights, trunk, traces, forks, self._key), forks

    def answer_flattened(self, traces) -> list:
        """Every branch a prompt of its own, `requests` of one length at a time: what they sample, N S A in all."""
        heads = np.repeat(np.asarray(self.prompts.tokens), self._shape.group, axis=0)
        bodies = np.asarray(traces.tokens)
        ends = np.broadcast_to(np.int32(self._forced), (len(heads), self._shape.forced))
        config, found = self._engine(1, self._shape.cap), []
        for fork in self._sizes.forks:
            prefix = np.concatenate([heads, bodies[:, :fork], ends], axis=1)
            branches = np.repeat(prefix, self._shape.answers, axis=0)
            for begin in range(0, len(branches), self._shape.requests):
                prompts = trees.prompts_of(branches[begin : begin + self._shape.requests])
                found.append(self._request(config, prompts))
        return found

    def _request(self, config, prompts: Prompts):
        done, _ = rollout.sample_traces(self._model, config, self._weights, jax.device_put(prompts), self._key)
        return jax.block_until_ready(done)


def run(shape: Shape, options: Options) -> Result:
    """Seconds of each phase, shared and flattened.

    Compared are the trainer's log-probs with the sampler's, of packed trees and of flattened rows: the tokens of both
    ways are of the same distribution only if they agree.
    """
    branches = shape.rows * shape.answers
    if shape.rows % shape.group or branches % shape.requests:
        raise ValueError(
            f"--rows={shape.rows}: it must be a multiple of --group={shape.group}, and the {branches} branches of a "
            f"fork of {shape.requests}, so many are sampled at a time"
        )
    loaded = models.find(shape.model, shape.dtype, shape.remat, options.hf)
    model, sizes, sampler = loaded.config, shape.sizes, Rollout(loaded, shape)
    with watch_compilation() as thinking:
        traces, trunk = jax.block_until_ready(sampler.think())
    with watch_compilation() as answering:
        answers, forks = jax.block_until_ready(sampler.answer(traces, trunk))
    rows = trees.packed(sizes, sampler.prompts, traces, answers, forks, trees.credit_of(sizes, shape.group))
    batches = update.both(sizes, rows, shape.micro_tokens, options)
    state = update.Learner(model, loaded.params())
    calls = {
        "think": lambda: sampler.think()[0],
        f"{SHARED} answer": lambda: sampler.answer(traces, trunk),
        f"{FLATTENED} answer": lambda: sampler.answer_flattened(traces),
    }
    for phase, function in (("score", state.score), ("update", state.update)):
        for way, part in zip((SHARED, FLATTENED), batches.values()):
            calls[f"{way} {phase}"] = functools.partial(function, part)
    work, tokens = works(model, shape), sizes.rows * sizes.trained
    sampled = {"think": sizes.rows * sizes.trace, "answer": sizes.rows * sizes.branches * sizes.cap}
    sides = [Side(name, call, work[name], sampled.get(name.split()[-1], tokens)) for name, call in calls.items()]
    wanted = chosen(sides, options)
    before = {"think": thinking.seconds, f"{SHARED} answer": answering.seconds}  # compiled for the inputs of the others
    found = measure(wanted, shape.repeat)
    found = [dataclasses.replace(row, compile_s=row.compile_s + before.get(row.name, 0.0)) for row in found]
    flattened = any(side.name.startswith(FLATTENED) for side in wanted)
    difference = max(sampler_gap(state, part) for part in list(batches.values())[: 1 + flattened])
    return Result(tuple(found), ratios(found), difference, TOLERANCE[shape.dtype], update.notes(model, sizes))


def sampler_gap(state: update.Learner, batches: update.Batches) -> float:
    """Largest difference of the trainer's log-probs of trained tokens from the sampler's, in nats."""
    scored = zip(state.score(batches), (rows for _, rows in batches))
    return max(float(jnp.abs(jnp.where(rows.loss_mask, x - rows.sampler_logprob, 0)).max()) for x, rows in scored)


def works(model, shape: Shape) -> dict[str, limits.Work]:
    """Of each phase."""
    sizes, problems = shape.sizes, shape.rows // shape.group
    common = (shape.answers, shape.prompt, sizes.forks, shape.forced, shape.cap)
    found = {
        "think": limits.thinking(model, problems, shape.group, shape.prompt, shape.new),
        f"{SHARED} answer": limits.answering(model, shape.rows, shape.group, *common),
        f"{FLATTENED} answer": limits.prefilled_answers(model, shape.rows, *common),
    }
    for phase, count in (("score", limits.scoring), ("update", limits.update)):
        of_both = update.works(model, sizes, count).values()
        found |= {f"{way} {phase}": work for way, work in zip((SHARED, FLATTENED), of_both)}
    return found


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """How many times faster a phase is with shared trunks, and the whole iteration, where both ways were measured."""
    median = {row.name: row.timing.median for row in rows}
    ways = {way: [f"{way} {phase}" for phase in PHASES] for way in (SHARED, FLATTENED)}
    pairs = [pair for pair in zip(*ways.values()) if set(pair) <= set(median)]
    found = {f"times faster in {fast.split()[-1]}": median[slow] / median[fast] for fast, slow in pairs}
    if len(pairs) == len(PHASES) and "think" in median:
        whole = {way: median["think"] + sum(median[name] for name in names) for way, names in ways.items()}
        found["times faster in the iteration"] = whole[FLATTENED] / whole[SHARED]
    return found
