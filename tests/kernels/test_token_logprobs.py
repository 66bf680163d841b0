"""Log-probs and entropies without logits: values against loops, gradients against the reference, compiled memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax.kernels.token_logprobs import IMPLEMENTATIONS, chunked, reference, token_logprobs

D, V = 8, 30


def random_arguments(tokens, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    return hidden, head, rng.integers(V, size=tokens).astype(np.int32)


def oracle(hidden, head, target, temperature):
    logprobs, entropies = [], []
    for state, token in zip(hidden.astype(np.float64), target):
        scores = [float(state @ head[:, word]) / temperature for word in range(V)]
        total = sum(np.exp(score) for score in scores)
        p = [np.exp(score) / total for score in scores]
        logprobs.append(np.log(p[token]))
        entropies.append(-sum(x * np.log(x) for x in p))
    return np.asarray(logprobs), np.asarray(entropies)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_equals_the_oracle(implementation, temperature):
    hidden, head, target = random_arguments(11)
    logprob, entropy = token_logprobs(hidden, head, target, temperature, implementation)
    expected, expected_entropy = oracle(hidden, head, target, temperature)
    assert logprob.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logprob, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "chunk"), [(16, 16), (32, 16), (33, 16), (47, 16), (15, 16), (5, 1)])
def test_chunked_equals_reference_in_values_and_gradients(tokens, chunk):
    """Whole chunks, one token too many, one too few; log-prob and entropy weighted at random, so that no term hides."""
    arguments = random_arguments(tokens, seed=tokens)
    weights = np.random.default_rng(7).normal(size=(2, tokens)).astype(np.float32)

    def weighted(function, hidden, head):
        logprob, entropy = function(hidden, head, arguments[2], 0.7)
        return jnp.vdot(weights[0], logprob) + jnp.vdot(weights[1], entropy), (logprob, entropy)

    def everything(function):
        step = jax.jit(jax.value_and_grad(functools.partial(weighted, function), (0, 1), has_aux=True))
        return jax.tree.leaves(step(*arguments[:2]))

    actual = everything(functools.partial(chunked.token_logprobs, chunk=chunk))
    expected = everything(reference.token_logprobs)
    for a, b in zip(actual, expected):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_the_default_chunk_leaves_no_token_out(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 1)
    tokens = 2 * chunked.LEAST_CHUNK + 1
    hidden, head, target = random_arguments(tokens)
    for a, b in zip(token_logprobs(hidden, head, target), token_logprobs(hidden, head, target, 1.0, "reference")):
        assert a.shape == (tokens,)
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_gradient_of_a_float32_head_does_not_decay_over_chunks():
    """Hidden states in bf16: a sum over 256 chunks in bf16 would lose 1.7%, the products alone lose .2%."""
    hidden, head, target = random_arguments(1024)
    low = jnp.asarray(hidden, jnp.bfloat16)

    def gradient(hidden, head, chunk):
        value = lambda head: chunked.token_logprobs(hidden, head, target, 1.0, chunk=chunk)[0].sum()  # noqa: E731
        return jax.grad(value)(head)

    expected = gradient(low.astype(jnp.float32), jnp.asarray(head, jnp.bfloat16).astype(jnp.float32), None)
    actual = gradient(low, jnp.asarray(head), 4)
    assert actual.dtype == jnp.float32
    assert np.linalg.norm(actual - expected) < 0.006 * np.linalg.norm(expected)


def temporaries(implementation, tokens, vocabulary, width=64):
    """Bytes of temporaries of the compiled value and gradient."""

    def function(hidden, head, target):
        logprob, entropy = token_logprobs(hidden, head, target, 0.9, implementation)
        return logprob.sum() + 0.1 * entropy.sum()

    shapes = [((tokens, width), jnp.float32), ((width, vocabulary), jnp.float32), ((tokens,), jnp.int32)]
    step = jax.jit(jax.value_and_grad(function, (0, 1)))
    compiled = step.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_no_array_of_tokens_by_vocabulary():
    """Temporaries are a few chunks of logits, however many tokens there are: forward and backward."""
    tokens, vocabulary = 16_384, 20_000
    logits = 4 * tokens * vocabulary
    used = temporaries("chunked", tokens, vocabulary)
    assert used < 0.5 * logits
    assert used < 4 * (4 * chunked.chunk_tokens(vocabulary) * vocabulary)
    more = temporaries("chunked", 2 * tokens, vocabulary) - used
    assert more < 0.02 * logits
    assert temporaries("reference", tokens, vocabulary) > logits, "the measure can't tell: logits should show"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"implementation": "dense"}, "'dense' is unknown: choose one of"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"hidden": np.zeros((2, 3, D), np.float32)}, r"\(2, 3, 8\)"),
        ({"head": np.zeros((V, D), np.float32)}, r"\(30, 8\)"),
        ({"target": np.zeros(5, np.int32)}, r"target \(5,\)"),
        ({"target": np.zeros((6, 1), np.int32)}, r"target \(6, 1\)"),
    ],
    ids=str,
)
def test_misuse_is_refused(change, says):
    arguments = dict(zip(("hidden", "head", "target"), random_arguments(6))) | change
    with pytest.raises(ValueError, match=says):
        token_logprobs(**arguments)
