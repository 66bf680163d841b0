"""The least that a piece of work takes: its FLOPs and bytes, counted by hand, over what the device can do.

The counts are those of the work, not of an implementation: matrix products of the tokens that are needed (2 FLOPs a
multiply-add; element-wise work is free), pairs of a query and a key that it sees, and every array that must come from
or go to memory once. Recomputation, padding and masked pairs are not counted: an implementation that has them has a
smaller share of the limit.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tto_jax import throughput, tpu_chips
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig

MEASURED = {"cpu": (1024, 2**26), "other": (8192, 2**32)}  # platform: side of the matrices, bytes that are read
VECTOR = 4096  # numbers
FLOAT32 = 4  # bytes
ADAMW_PASSES = 10  # over the parameters: read in forward, backward and update; gradient and two moments read and
# written; parameters written


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one call."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a device can do a second, and how that is known."""

    flops: float
    bandwidth: float  # bytes
    source: str

    def bounds(self, work: Work) -> dict[str, float]:
        """Seconds that the work takes at least, by what limits it."""
        return {"compute": work.flops / self.flops, "memory": work.bytes / self.bandwidth}

    def share(self, work: Work, seconds: float) -> tuple[float, str]:
        """Share of the limit that was reached, and which limit it is."""
        bounds = self.bounds(work)
        by = max(bounds, key=bounds.get)
        return bounds[by] / seconds, by


def of_device(dtype: str, peak_flops: float | None = None, peak_bandwidth: float | None = None) -> Limits:
    """Limits of the first device: as given; of a known chip; else measured now by products.

    Args:
      dtype: of the products that are measured. A TPU multiplies float32 as bfloat16 unless told otherwise.
      peak_flops: a second. peak_bandwidth: bytes a second. None: not given.
    """
    for name, value in (("peak_flops", peak_flops), ("peak_bandwidth", peak_bandwidth)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name}={value}: it must be positive and finite, such as 197e12 and 819e9")
    if peak_flops and peak_bandwidth:
        return Limits(peak_flops, peak_bandwidth, "given")
    device = jax.local_devices()[0]
    if device.device_kind in throughput.KINDS:
        chip = tpu_chips.CHIPS[throughput.KINDS[device.device_kind]]
        found = Limits(chip.flops, chip.hbm_bandwidth, f"known, {chip.name}")
    else:
        found = measured(dtype, *MEASURED.get(device.platform, MEASURED["other"]))
    given = "given, the other " if peak_flops or peak_bandwidth else ""
    return Limits(peak_flops or found.flops, peak_bandwidth or found.bandwidth, given + found.source)


@functools.lru_cache
def measured(dtype: str, side: int, read: int) -> Limits:
    """Of the first device, by the best of a few products of square matrices, and of a long matrix with a vector.

    Bytes are read, not copied: what a copy writes may be memory that the system has yet to provide, which is slower by
    far (7 times on the CPUs of the README).
    """
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x))
    long = jnp.ones((read // FLOAT32 // VECTOR, VECTOR), jnp.float32)
    of_vector = jax.jit(lambda x: jnp.matmul(x, x[0]))
    flops, moved = 2 * side**3 / _best(product, matrix), long.nbytes / _best(of_vector, long)
    source = f"measured: {side} x {side} {dtype} product, {read / 1e6:.0f} MB read by a product with a vector"
    return Limits(flops, moved, source)


def _best(function, argument, calls=7, together=3):
    """Seconds of one call; several are queued, so that the host's part is hidden where there is a device."""
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        jax.block_until_ready([function(argument) for _ in range(together)])
        seconds.append((time.perf_counter() - begin) / together)
    return statistics.median(sorted(seconds)[: calls // 2 + 1])


# The model's work ----------------------------------------------------------------------------------------------------


@functools.lru_cache
def parameters(model: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(lambda: decoder.init_params(model, 0))))


def weights_bytes(model: ModelConfig) -> float:
    """Bytes of the weights that a token of a rollout reads: all, but of an untied embedding only a row."""
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    return (parameters(model) - looked_up) * itemsize(model)


def itemsize(model: ModelConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return jnp.dtype(model.dtype).itemsize


def kv_bytes(model: ModelConfig) -> int:
    """Bytes of keys and values of one token, all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize(model)


def forward_flops(model: ModelConfig, tokens: float, pairs: float, projected: float) -> float:
    """FLOPs of a forward pass.

    Args:
      tokens: that go through the layers. pairs: of a query and a key it sees, once, not a layer or head.
      projected: hidden states that are multiplied by the LM head.
    """
    products = tokens * throughput.per_token(model) + pairs * throughput.per_pair(model)
    return products + projected * throughput.per_logits(model)


def causal_pairs(first: float, number: float) -> float:
    """Pairs of `number` consecutive tokens, the first of which sees `first` keys, the next one more, and so on."""
    return number * first + number * (number - 1) / 2


def scoring(model: ModelConfig, tokens: float, pairs: float, projected: float) -> Work:
    """A forward pass with log-probs; float32 parameters are read once."""
    return Work(forward_flops(model, tokens, pairs, projected), FLOAT32 * parameters(model))


def update(model: ModelConfig, tokens: float, pairs: float, projected: float) -> Work:
    """Forward, backward (twice the forward's products) and AdamW in float32; activations' traffic is not counted."""
    flops = 3 * forward_flops(model, tokens, pairs, projected)
    return Work(flops, ADAMW_PASSES * FLOAT32 * parameters(model))


def thinking(model: ModelConfig, problems: int, group: int, prompt: int, new: int) -> Work:
    """Traces of `new` tokens: prompts prefilled once, then a token a step, the last of which is not fed.

    A step reads the weights once, every prompt's KV once and every trace's own.
    """
    rows, fed = problems * group, new - 1
    tokens = problems * prompt + rows * fed
    pairs = problems * causal_pairs(1, prompt) + rows * causal_pairs(prompt + 1, fed)
    held = fed * problems * prompt + rows * causal_pairs(1, fed)
    flops = forward_flops(model, tokens, pairs, projected=problems + rows * fed)
    return Work(flops, new * weights_bytes(model) + held * kv_bytes(model))


def answering(
    model: ModelConfig, rows: int, group: int, answers: int, prompt: int, forks: Sequence[int], forced: int, cap: int
) -> Work:
    """Answers of `cap` tokens at each fork of `rows` cached traces, all decoded together.

    `forced` inserted tokens a fork are fed once for its `answers`. A step reads the weights once, the trunk (a group's
    prompt, a trace up to its last fork) once for all branches, a fork's inserted tokens once for its answers.
    """
    fed, columns = cap - 1, rows * len(forks)
    tokens = columns * (forced + answers * fed)
    pairs = rows * sum(
        causal_pairs(prompt + fork + 1, forced) + answers * causal_pairs(prompt + fork + forced + 1, fed)
        for fork in forks
    )
    trunk = rows // group * prompt + rows * max(forks) + columns * forced
    held = cap * trunk + columns * answers * causal_pairs(1, fed)
    flops = forward_flops(model, tokens, pairs, projected=columns * (1 + answers * fed))
    return Work(flops, cap * weights_bytes(model) + held * kv_bytes(model))


def prefilled_answers(
    model: ModelConfig, rows: int, answers: int, prompt: int, forks: Sequence[int], forced: int, cap: int
) -> Work:
    """The same with every branch a request of its own: its prefix is prefilled and its KV read at every step."""
    works = [thinking(model, rows * answers, 1, prompt + fork + forced, cap) for fork in forks]
    return functools.reduce(Work.__add__, works)


# The kernels' work ---------------------------------------------------------------------------------------------------


def attention(queries: int, keys: int, heads: int, kv_heads: int, width: int, pairs: float, size: int) -> Work:
    """Attention of `queries` over `keys` (both over all rows), of `pairs` that see each other; `size` bytes a number.

    Queries, keys, values are read and the result written once.
    """
    moved = (2 * queries * heads + 2 * keys * kv_heads) * width * size
    return Work(4 * heads * width * pairs, moved)


def attention_gradient(queries: int, keys: int, heads: int, kv_heads: int, width: int, pairs: float, size: int) -> Work:
    """Forward and backward: the backward has twice the products, reads all again and writes three gradients."""
    forward = attention(queries, keys, heads, kv_heads, width, pairs, size)
    gradients = (3 * queries * heads + 4 * keys * kv_heads) * width * size  # q, result's, k, v in; three out
    return Work(3 * forward.flops, forward.bytes + gradients)


def logprobs(tokens: int, hidden: int, vocabulary: int, size: int, gradient: bool) -> Work:
    """Log-prob and entropy of `tokens`; with `gradient` of hidden states and, in float32, of the head."""
    inputs = tokens * hidden * size + vocabulary * hidden * FLOAT32
    product = 2 * tokens * hidden * vocabulary
    return Work(3 * product, 3 * inputs) if gradient else Work(product, inputs)
