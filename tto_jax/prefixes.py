"""Prefixes of MRT's RL (arXiv 2503.07572): some episodes of a trace of an earlier policy follow a problem's prompt.

The prefix is context: it is not trained, and all traces of the problem think on from it. An answer that is forced
before any new thinking is then a sample that ends at the prefix.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from tto_jax import data, rollout, sharding, throughput
from tto_jax.core.types import Array, Prompts
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params
from tto_jax.settings import Settings

STREAM = 0x57A1  # keeps the keys of the earlier policy's traces, and of what is drawn of them, apart from others


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Of B problems of this process, on the host."""

    prompts: Prompts  # with the prefixes; padded to `Settings.context_pad`
    length: np.ndarray  # i32[B], tokens of each prefix
    episodes: np.ndarray  # i32[B], how many it has
    sampled: np.ndarray  # i32[B], tokens of the earlier policy's traces
    seconds: float  # that all this took

    @property
    def prefixes(self) -> list[list[int]]:
        """Token ids."""
        ends = zip(self.prompts.tokens, self.prompts.length, self.length)
        return [row[end - n : end].tolist() for row, end, n in ends]

    def flops(self, model: ModelConfig) -> float:
        """Of the earlier policy's thinking, see `throughput`."""
        return throughput.think_flops(model, self.prompts.length - self.length, self.sampled)

    def metrics(self) -> dict[str, float]:
        """Means over the problems of all processes, and the tokens that the earlier policy sampled."""
        length, episodes, sampled = sharding.gather((self.length, self.episodes, self.sampled))
        found = {"prefix/length": float(length.mean()), "prefix/episodes": float(episodes.mean())}
        return found | {"prefix/sampled": int(sampled.sum())}


_key = jax.jit(lambda key: jax.random.fold_in(key, STREAM))


def draw(
    plan: Settings,
    params: Params,
    prompts: Prompts,
    key: Array,
    step: int,
    compile_first: bool = False,
    poll: Callable[[], None] = lambda: None,
) -> Drawn:
    """Prompts that go on with prefixes. The same for any number of processes, and on every mesh.

    Args:
      plan: with a `prefix`. params: of the earlier policy, which thinks one trace a problem.
      prompts: B rows of this process, on the host.
      key: of the step, as of its rollout.
      compile_first: longer traces of later steps compile nothing then.
      poll: called between segments; what it raises ends the rollout.
    """
    begin = time.perf_counter()
    config, on_device, key = plan.prefix.rollout(plan.rollout), sharding.put_rows(prompts), _key(key)
    # Awaited: another program in flight beside its gathers could meet them in another order elsewhere.
    weights = jax.block_until_ready(rollout.weights(plan.model, params))
    if compile_first:
        rollout.compile_traces(plan.model, config, weights, on_device, key)
    traces, _ = rollout.sample_traces(plan.model, config, weights, on_device, key, poll=poll)
    tokens, length = sharding.local_rows((traces.tokens, traces.length))
    ends = whole_episodes(plan.prefix.forks(tokens, length), length, plan.prefix.tokens)
    number = numbers(plan.seed, step, prompts.id, [len(found) - 1 for found in ends])
    taken = np.array([found[n] for found, n in zip(ends, number)], np.int32)
    return Drawn(
        prompts=extended(prompts, tokens, taken, plan.context_pad, plan.tokenizer.pad_id),
        length=taken,
        episodes=number,
        sampled=length,
        seconds=time.perf_counter() - begin,
    )


def whole_episodes(forks: np.ndarray, length: np.ndarray, most: int) -> list[np.ndarray]:
    """Of each trace where a prefix may end, ascending: at 0, and after episodes that lie wholly before the trace's end.

    forks: i32[N,S], ends of episodes; length: i32[N]; most: tokens of a prefix. What ended a trace, such as `</think>`,
    is its last token: no prefix has it.
    """
    return [np.unique([0, *row[(row < n) & (row <= most)]]) for row, n in zip(forks, length)]


def numbers(seed: int, step: int, ids: Sequence[int], most: Sequence[int]) -> np.ndarray:
    """How many episodes, i32[B]: each number from 0 to `most` is equally likely; by seed, step and problem alone."""
    streams = [np.random.default_rng([STREAM, seed, step, int(problem)]) for problem in ids]
    return np.array([rng.integers(n + 1) for rng, n in zip(streams, most)], np.int32)


def extended(prompts: Prompts, tokens: np.ndarray, taken: np.ndarray, pad: int, pad_id: int) -> Prompts:
    """Prompts followed by the first `taken` i32[B] of tokens i32[B,C], padded to `pad`; the problems stay the same."""
    rows = [
        prompt[:n].tolist() + trace[:number].tolist()
        for prompt, n, trace, number in zip(prompts.tokens, prompts.length, tokens, taken)
    ]
    found, length = data.pad_right(rows, pad, pad_id, "prompt_pad", np.int32)
    return Prompts(tokens=found, length=length, id=prompts.id)
