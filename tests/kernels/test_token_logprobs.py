"""Log-probs and entropies without logits: values and gradients against a dense softmax in float64, compiled memory."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from tto_jax import compile_tpu
from tto_jax.kernels.token_logprobs import IMPLEMENTATIONS, choose, chunked, token_logprobs

D = 8
TEMPERATURE = 0.7


def random_arguments(tokens, columns=30, vocabulary=None, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, D)).astype(np.float32)
    head = rng.normal(size=(D, columns)).astype(np.float32)
    return hidden, head, rng.integers(vocabulary or columns, size=tokens).astype(np.int32)


def oracle(hidden, head, target, temperature=1.0, vocabulary=None):
    """Softmax token by token in float64."""
    logprobs, entropies = [], []
    for state, token in zip(np.asarray(hidden, np.float64), target):
        scores = state @ np.asarray(head, np.float64)[:, :vocabulary] / temperature
        scores -= scores.max()
        p = np.exp(scores) / np.exp(scores).sum()
        logprobs.append(np.log(p[token]))
        entropies.append(-np.sum(p[p > 0] * np.log(p[p > 0])))
    return np.asarray(logprobs), np.asarray(entropies)


def oracle_gradients(hidden, head, target, weights, temperature=TEMPERATURE, vocabulary=None):
    """d sum(weights[0] logprob + weights[1] entropy) / d (hidden, head), differentiated by jax, dense, in float64."""
    with jax.enable_x64(True):
        double = lambda x: jnp.asarray(np.asarray(x, np.float64))  # noqa: E731

        def value(hidden, head):
            logits = hidden @ head[:, :vocabulary] / temperature
            logprobs = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=1, keepdims=True))
            chosen = logprobs[np.arange(len(target)), target]
            return double(weights[0]) @ chosen - double(weights[1]) @ jnp.sum(jnp.exp(logprobs) * logprobs, axis=1)

        return jax.tree.map(np.asarray, jax.jit(jax.grad(value, (0, 1)))(double(hidden), double(head)))


def weighted(function, weights, hidden, head, target):
    """Log-prob and entropy weighted at random, so that no term of the gradient hides."""
    logprob, entropy = function(hidden, head, target)
    return jnp.vdot(weights[0], logprob) + jnp.vdot(weights[1], entropy), (logprob, entropy)


def random_weights(tokens):
    return np.random.default_rng(7).normal(size=(2, tokens)).astype(np.float32)


def differentiated(function, weights):
    return jax.jit(jax.value_and_grad(functools.partial(weighted, function, weights), (0, 1), has_aux=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("vocabulary", "temperature"), [(None, 1.0), (30, 0.6), (19, 2.5), (1, 1.0)])
def test_equals_the_oracle(implementation, vocabulary, temperature):
    arguments = random_arguments(11, vocabulary=vocabulary)
    options = {"temperature": temperature, "implementation": implementation, "vocabulary": vocabulary}
    logprob, entropy = jax.jit(functools.partial(token_logprobs, **options))(*arguments)
    expected, expected_entropy = oracle(*arguments, temperature, vocabulary)
    assert logprob.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logprob, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-4, atol=1e-5)


def implemented(name):
    """A tile, or the name of an implementation."""
    if isinstance(name, tuple):
        return functools.partial(chunked.token_logprobs, temperature=TEMPERATURE, tile=name)
    return functools.partial(token_logprobs, temperature=TEMPERATURE, implementation=name)


@pytest.mark.parametrize(
    ("name", "tokens", "vocabulary"),
    [
        ("reference", 49, 200),
        ("chunked", 49, None),
        ((16, 128), 49, 129),
        ((16, 128), 15, 5),
        ((24, 7), 49, 200),
    ],
    ids=str,
)
def test_values_and_gradients(name, tokens, vocabulary):
    """Whole tiles, one token too many, fewer than a tile; a last block of columns that begins in the one before, and
    blocks that are padding in part or altogether.
    """
    arguments = random_arguments(tokens, 300, vocabulary, seed=tokens)
    weights = random_weights(tokens)
    step = differentiated(functools.partial(implemented(name), vocabulary=vocabulary), weights)
    (_, values), gradients = step(*arguments)
    for a, b in zip(values, oracle(*arguments, TEMPERATURE, vocabulary)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    for a, b in zip(gradients, oracle_gradients(*arguments, weights, vocabulary=vocabulary)):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)
    assert vocabulary is None or not np.asarray(gradients[1])[:, vocabulary:].any(), "padding has no gradient"


def test_sharp_distributions_are_finite():
    """Logits of thousands, and equal ones: no overflow, no entropy below zero beyond rounding."""
    hidden, head, target = random_arguments(9, 40)
    step = differentiated(functools.partial(chunked.token_logprobs, temperature=1.0, tile=(4, 16)), random_weights(9))
    (_, (logprob, entropy)), gradients = step(3000 * hidden, head, target)
    assert np.isfinite(logprob).all() and (np.abs(entropy) < 1e-4).all()
    assert all(np.isfinite(x).all() for x in gradients)
    (_, (logprob, entropy)), _ = step(0 * hidden, head, target)
    np.testing.assert_allclose(logprob, -np.log(40), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.log(40), rtol=1e-6)


@pytest.mark.parametrize(("name", "vocabulary"), [("reference", 140), ("chunked", None), ((16, 128), 140)], ids=str)
def test_parts_of_the_vocabulary_on_devices(name, vocabulary):
    """2 x 2 devices, rows by vocabulary: values and the sums of both gradients. With 140 of 300 one part is padding."""
    tokens = 36
    mesh = jax.make_mesh((2, 2), ("rows", "words"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    arguments, weights = random_arguments(tokens, 300, vocabulary, seed=3), random_weights(tokens)
    local = functools.partial(implemented(name), vocabulary_axis="words", vocabulary=vocabulary)
    rows = P("rows")
    split = jax.shard_map(local, mesh=mesh, in_specs=(rows, P(None, "words"), rows), out_specs=(rows, rows))
    (_, values), gradients = differentiated(split, weights)(*arguments)
    for a, b in zip(values, oracle(*arguments, TEMPERATURE, vocabulary)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    for a, b in zip(gradients, oracle_gradients(*arguments, weights, vocabulary=vocabulary)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("head_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_accumulates_in_float32(head_dtype):
    """Over 256 chunks. Sums in bf16 would lose 1.7% of the head's gradient; rounding the operands alone loses .3%."""
    hidden, head, target = random_arguments(1024)
    low, low_head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    weights = random_weights(1024)
    function = functools.partial(chunked.token_logprobs, temperature=TEMPERATURE, tile=(4, 16))
    (_, values), gradients = differentiated(function, weights)(low, low_head.astype(head_dtype), target)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == head_dtype
    for a, b in zip(values, oracle(low, low_head, target, TEMPERATURE)):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(gradients, oracle_gradients(low, low_head, target, weights)):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < 0.006 * np.linalg.norm(b)


def temporaries(implementation, device, dtype, tokens, vocabulary, width, head_dtype=None):
    """Bytes of temporaries of the compiled value and gradient, for a device that need not be there."""

    def function(hidden, head, target):
        logprob, entropy = token_logprobs(hidden, head, target, 0.9, implementation)
        return logprob.sum() + 0.1 * entropy.sum()

    shapes = [((tokens, width), dtype), ((width, vocabulary), head_dtype or dtype), ((tokens,), jnp.int32)]
    place = SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


LARGE = {"tokens": 16_384, "vocabulary": 151_936, "width": 1536}


def test_temporaries_are_a_hundredth_of_the_logits():
    logits = 4 * LARGE["tokens"] * LARGE["vocabulary"]
    used = temporaries("chunked", jax.devices("cpu")[0], jnp.float32, **LARGE)
    assert used < 0.01 * logits
    small = {"tokens": 512, "vocabulary": 20_000, "width": 64}
    dense = temporaries("reference", jax.devices("cpu")[0], jnp.float32, **small)
    assert dense > 4 * 512 * 20_000, "the measure can't tell: logits should show"


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'tto-jax[tpu]'")
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize(
    ("head_dtype", "share"), [(jnp.bfloat16, 0.01), pytest.param(jnp.float32, 0.1, marks=pytest.mark.slow)]
)
def test_temporaries_on_a_tpu(head_dtype, share):
    """Of the logits' bytes in bf16. Of a float32 head XLA keeps one in bf16."""
    device = compile_tpu.describe("v5e:2x2", 1, (4, 1, 1)).mesh.devices.flat[0]
    used = temporaries("chunked", device, jnp.bfloat16, **LARGE, head_dtype=head_dtype)
    assert used < share * 2 * LARGE["tokens"] * LARGE["vocabulary"]


def test_a_platform_has_a_default():
    assert {choose(platform) for platform in ("cpu", "tpu", "gpu", "cuda")} <= set(IMPLEMENTATIONS)
    with pytest.raises(ValueError, match="platform='abacus'"):
        choose("abacus")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"implementation": "dense"}, "'dense' is unknown: choose one of"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"hidden": np.zeros((2, 3, D), np.float32)}, r"\(2, 3, 8\)"),
        ({"head": np.zeros((30, D), np.float32)}, r"\(30, 8\)"),
        ({"target": np.zeros(5, np.int32)}, r"target \(5,\)"),
        ({"target": np.zeros((6, 1), np.int32)}, r"target \(6, 1\)"),
        ({"vocabulary": 0}, "vocabulary=0: it must be from 1 to 30"),
        ({"vocabulary": 31}, "vocabulary=31"),
    ],
    ids=str,
)
def test_misuse_is_refused(change, says):
    arguments = dict(zip(("hidden", "head", "target"), random_arguments(6))) | change
    with pytest.raises(ValueError, match=says):
        token_logprobs(**arguments)
