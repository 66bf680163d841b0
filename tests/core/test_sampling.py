"""One token from one uniform: frequencies over a fine grid of uniforms are the probabilities."""

import functools

import jax
import numpy as np
import oracles
import pytest

from tto_jax.core.sampling import sample

GRID = 4000
LAST = np.nextafter(np.float32(1), np.float32(0))  # the largest uniform there is


def grid(count=GRID):
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


@functools.cache
def sampler(**options):
    return jax.jit(jax.vmap(functools.partial(sample, **options), (None, 0)))


def assert_matches(logits, probabilities, tokens, logprob, count=GRID):
    """Each token owns one interval of uniforms, so a grid miscounts it by at most one point at each end."""
    tokens, logprob = np.asarray(tokens), np.asarray(logprob)
    frequency = np.bincount(tokens, minlength=len(logits)) / count
    np.testing.assert_allclose(frequency, probabilities, atol=2.0 / count + 2e-6)
    assert (np.asarray(probabilities)[tokens] > 0).all()
    np.testing.assert_allclose(logprob, np.log(np.asarray(probabilities)[tokens]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("V", [1, 7, 128, 513])
def test_frequencies_and_logprob(V):
    logits = (2.0 * np.random.default_rng(V).normal(size=V)).astype(np.float32)
    tokens, logprob = sampler()(logits, grid())
    assert tokens.dtype == np.int32 and logprob.dtype == np.float32
    assert_matches(logits, oracles.token_probabilities(logits), tokens, logprob)
    np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[tokens], atol=1e-5)


OPTIONS = [
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 37},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"temperature": 0.7, "top_k": 10},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filtered_frequencies_and_logprob(options):
    for seed in range(2):
        logits = (1.5 * np.random.default_rng(seed).normal(size=37)).astype(np.float32)
        tokens, logprob = sampler(**options)(logits, grid())
        assert_matches(logits, oracles.token_probabilities(logits, **options), tokens, logprob)


def test_masked_tokens_are_never_drawn():
    logits = np.random.default_rng(0).normal(size=29).astype(np.float32)
    logits[[0, 1, 7, 8, 20, 27, 28]] = -np.inf  # both ends and inside
    uniforms = np.concatenate([grid(), [0.0, LAST]]).astype(np.float32)
    for options in ({}, {"temperature": 0.5}, {"top_k": 10}, {"top_k": 25}, {"top_p": 0.95}):
        tokens, logprob = sampler(**options)(logits, uniforms)
        assert np.isfinite(logits[np.asarray(tokens)]).all()
        assert np.isfinite(logprob).all()
        probabilities = oracles.token_probabilities(logits, **options)
        assert_matches(logits, probabilities, tokens[:GRID], logprob[:GRID])


def test_one_token_left():
    logits = np.full(50, -np.inf, np.float32)
    logits[33] = -4.0
    tokens, logprob = sampler()(logits, np.asarray([0.0, 0.5, LAST], np.float32))
    np.testing.assert_array_equal(tokens, 33)
    np.testing.assert_allclose(logprob, 0.0, atol=1e-6)


@pytest.mark.parametrize("V", [1, 5, 1000, 4097, 70_001])
def test_extreme_uniforms_are_safe(V):
    """The ends of the unit interval, where a rounded cumulative sum can end below the uniform."""
    for logits in (np.zeros(V, np.float32), np.random.default_rng(V).normal(size=V).astype(np.float32) * 5):
        logits[: V // 3] = -np.inf
        logits[V - V // 4 :] = -np.inf
        tokens, logprob = sampler()(logits, np.asarray([0.0, 1e-38, LAST], np.float32))
        assert (np.asarray(tokens) >= 0).all() and (np.asarray(tokens) < V).all()
        assert np.isfinite(logits[np.asarray(tokens)]).all() and np.isfinite(logprob).all()


@pytest.mark.parametrize("V", [700, 1537])
def test_draw_follows_the_cumulative_distribution(V):
    """Uniforms on the steps themselves, and a few float32 units beside them, where rounding decides."""
    rng = np.random.default_rng(V)
    logits = (2.0 * rng.normal(size=V)).astype(np.float32)
    logits[rng.random(V) < 0.3] = -np.inf
    above = np.cumsum(np.asarray(oracles.token_probabilities(logits)))
    steps = above.astype(np.float32)[:-1]
    uniforms = np.concatenate([steps + k * np.spacing(steps) for k in range(-4, 5)])
    uniforms = np.append(np.clip(uniforms, 0.0, LAST), [0.0, LAST]).astype(np.float32)
    tokens = np.asarray(
        jax.jit(lambda x, u: jax.lax.map(lambda one: sample(x, one), u, batch_size=512))(logits, uniforms)[0]
    )
    below = np.concatenate([[0.0], above])[:-1]
    assert np.isfinite(logits[tokens]).all()
    assert (below[tokens] <= uniforms + 2e-6).all() and (uniforms <= above[tokens] + 2e-6).all()


def test_large_vocabulary():
    """A few heavy tokens among 70,001: each keeps its share of the uniforms, and the log-prob its precision."""
    V, count = 70_001, 400
    rng = np.random.default_rng(1)
    logits = rng.normal(size=V).astype(np.float32)
    heavy = np.asarray([0, 511, 512, 30_000, 65_535, 70_000])
    logits[heavy] = np.log(np.exp(logits).sum()) + rng.normal(size=6)
    exact = np.exp(logits.astype(np.float64) - logits.max())
    exact /= exact.sum()
    tokens, logprob = jax.jit(lambda x, u: jax.lax.map(lambda one: sample(x, one), u, batch_size=50))(
        logits, grid(count)
    )
    frequency = np.bincount(np.asarray(tokens), minlength=V) / count
    np.testing.assert_allclose(frequency[heavy], exact[heavy], atol=2.0 / count + 1e-4)
    np.testing.assert_allclose(logprob, np.log(exact[np.asarray(tokens)]), atol=3e-5)


def test_flat_large_vocabulary_covers_the_whole_range():
    """70,001 equal tokens: the draw follows the uniform without the drift of a long float32 sum."""
    V = 70_001
    uniforms = grid(200)
    tokens, logprob = sampler()(np.zeros(V, np.float32), uniforms)
    np.testing.assert_allclose(np.sort(np.asarray(tokens)) / V, uniforms, atol=2e-4)
    np.testing.assert_allclose(logprob, -np.log(V), atol=3e-5)


def test_greedy():
    logits = np.asarray([0.1, 3.0, -np.inf, 2.9], np.float32)
    tokens, logprob = sampler(temperature=0.0)(logits, np.asarray([0.0, 0.3, LAST], np.float32))
    np.testing.assert_array_equal(tokens, 1)
    np.testing.assert_array_equal(logprob, 0.0)


def test_large_and_shifted_logits():
    """Only differences of logits matter, and large ones do not overflow."""
    logits = (40.0 * np.random.default_rng(2).normal(size=64)).astype(np.float32)
    plain, logprob = sampler()(logits, grid(500))
    moved, _ = sampler()(logits + np.float32(128.0), grid(500))
    assert np.isfinite(logprob).all()
    assert (np.asarray(plain) == np.asarray(moved)).mean() > 0.99


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7, "temperature": 0.8}], ids=str)
def test_logprob_of_the_whole_vocabulary(options):
    """renormalise=False: the same tokens, with the log-prob that they have without a filter at this temperature."""
    logits = np.random.default_rng(4).normal(size=300).astype(np.float32)
    tokens, kept = sampler(**options)(logits, grid(400))
    same, whole = sampler(**options, renormalise=False)(logits, grid(400))
    np.testing.assert_array_equal(tokens, same)
    expected = np.asarray(jax.nn.log_softmax(logits / options.get("temperature", 1.0)))[np.asarray(tokens)]
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    assert (np.asarray(kept) > np.asarray(whole) + 0.1).all()


def test_the_vocabulary_comes_first_then_any_batch():
    """Columns at once are columns one by one; sizes with and without a divisor near their root."""
    for size in (50, 1021, 2048):
        rng = np.random.default_rng(size)
        logits, uniforms = rng.normal(size=(size, 2, 3)).astype(np.float32), rng.random((2, 3)).astype(np.float32)
        tokens, logprob = jax.jit(sample)(logits, uniforms)
        assert tokens.shape == logprob.shape == (2, 3)
        for at in np.ndindex(2, 3):
            token, one = sample(logits[:, *at], uniforms[at])
            assert int(token) == int(tokens[at])
            np.testing.assert_allclose(one, logprob[at], atol=1e-6)


def test_rows_of_a_batch_are_independent():
    rng = np.random.default_rng(3)
    logits, uniforms = rng.normal(size=(6, 50)).astype(np.float32), rng.random(6).astype(np.float32)
    batch_tokens, batch_logprob = jax.jit(jax.vmap(sample))(logits, uniforms)
    one = jax.jit(sample)
    for row in range(6):
        token, logprob = one(logits[row], uniforms[row])
        assert int(token) == int(batch_tokens[row])
        np.testing.assert_allclose(logprob, batch_logprob[row], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "value"),
    [({"temperature": -0.5}, "-0.5"), ({"top_k": -3}, "-3"), ({"top_p": 0.0}, "0.0"), ({"top_p": 1.5}, "1.5")],
    ids=str,
)
def test_refused_options(options, value):
    with pytest.raises(ValueError) as error:
        sample(np.zeros(4, np.float32), np.float32(0.5), **options)
    assert value in str(error.value) and next(iter(options)) in str(error.value)
