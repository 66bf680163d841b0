"""Per-token objectives against scalar loops, and the sums that turn them into one number."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from tto_jax.core import losses


def random_tokens(seed, shape=(4, 9)):
    rng = np.random.default_rng(seed)
    logprob = -rng.exponential(size=shape)
    old = logprob + rng.choice([0.0, 0.1, 0.5, 3.0], size=shape) * rng.normal(size=shape)
    advantage = rng.normal(size=shape) * (rng.random(shape) < 0.8)
    return [array.astype(np.float32) for array in (logprob, old, advantage)]


@pytest.mark.parametrize("clip", [{}, {"clip_high": 0.28}, {"clip_low": 0.05, "clip_high": 1.0}], ids=str)
def test_clipped_objective_equals_oracle(clip):
    for seed in range(5):
        logprob, old, advantage = random_tokens(seed)
        actual = losses.clipped_objective(logprob, old, advantage, **clip)
        expected = np.vectorize(oracles.clipped_objective)(logprob, old, advantage, **clip)
        assert actual.dtype == np.float32 and actual.shape == logprob.shape
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


def test_clipped_objective_by_hand():
    ratio = np.asarray([1.5, 1.5, 0.5, 0.5, 1.1], np.float32)
    advantage = np.asarray([1.0, -1.0, 1.0, -1.0, 2.0], np.float32)
    actual = losses.clipped_objective(np.log(ratio), np.zeros(5, np.float32), advantage)
    np.testing.assert_allclose(actual, [1.2, -1.5, 0.5, -0.8, 2.2], rtol=1e-6)


def test_clipped_tokens_have_no_gradient():
    """Past the clip on the side the advantage pushes to, and only there."""
    log_ratio = jnp.log(jnp.asarray([1.5, 1.5, 0.5, 0.5, 1.1]))
    advantage = jnp.asarray([1.0, -1.0, 1.0, -1.0, 2.0])
    slope = jax.grad(lambda x: losses.clipped_objective(x, jnp.zeros(5), advantage).sum())(log_ratio)
    np.testing.assert_allclose(slope, [0.0, -1.5, 0.5, 0.0, 2.2], atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimate_equals_oracle(kind):
    for seed in range(3):
        logprob, reference, _ = random_tokens(seed)
        actual = losses.kl_estimate(logprob, reference, kind)
        expected = np.vectorize(oracles.kl_estimate)(logprob.astype(float), reference.astype(float), kind)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(losses.kl_estimate(logprob, logprob, kind), 0.0, atol=1e-7)


def test_kl_signs_and_means():
    """k1 and k3 are unbiased for KL(policy, reference) under the policy; k2 and k3 are never negative."""
    rng = np.random.default_rng(0)
    policy, reference = (np.asarray(jax.nn.log_softmax(x)) for x in 0.5 * rng.normal(size=(2, 11)).astype(np.float32))
    exact = float((np.exp(policy) * (policy - reference)).sum())
    for kind in ("k1", "k3"):
        assert abs(float((np.exp(policy) * losses.kl_estimate(policy, reference, kind)).sum()) - exact) < 1e-5
    for kind in ("k2", "k3"):
        assert float(losses.kl_estimate(policy, reference, kind).min()) >= -1e-7


def test_k3_keeps_its_precision_near_zero():
    """exp(d) - 1 - d cancels: for d = 1e-3 the value 5e-7 must survive float32."""
    logprob = np.zeros(1, np.float32)
    value = float(losses.kl_estimate(logprob, logprob + np.float32(1e-3), "k3")[0])
    assert abs(value - 5.0017e-7) < 2e-9


def test_unknown_kl_kind():
    with pytest.raises(ValueError, match="k4") as error:
        losses.kl_estimate(np.zeros(2, np.float32), np.zeros(2, np.float32), "k4")
    assert all(kind in str(error.value) for kind in ("k1", "k2", "k3"))


def test_aggregate_equals_oracle():
    rng = np.random.default_rng(1)
    values, mask = rng.normal(size=(5, 8)).astype(np.float32), rng.random((5, 8)) < 0.6
    for constant in (1.0, 40.0, losses.released_constant(5, 8)):
        actual = losses.aggregate(values, mask, constant)
        assert actual.shape == ()
        np.testing.assert_allclose(actual, oracles.aggregate(values, mask, constant), rtol=1e-5, atol=1e-6)
    assert float(losses.aggregate(values, np.zeros_like(mask), 40.0)) == 0.0


def test_released_constant():
    assert losses.released_constant(32, 8192) == 32 * 8192


def test_aggregate_does_not_know_the_padding():
    """The constant is the caller's: padding added on the right changes neither value nor gradient."""
    rng = np.random.default_rng(2)
    values, mask = rng.normal(size=(3, 5)).astype(np.float32), rng.random((3, 5)) < 0.7
    pad = ((0, 0), (0, 4))
    grown = np.pad(values, pad, constant_values=7.0), np.pad(mask, pad)
    np.testing.assert_allclose(losses.aggregate(*grown, 15.0), losses.aggregate(values, mask, 15.0), rtol=1e-6)
    slope = jax.grad(losses.aggregate)(grown[0], grown[1], 15.0)
    np.testing.assert_allclose(slope, grown[1] / 15.0, rtol=1e-6)


def test_aggregate_ignores_what_is_not_a_number_outside_the_mask():
    values = np.asarray([[1.0, np.nan, np.inf]], np.float32)
    mask = np.asarray([[True, False, False]])
    assert float(losses.aggregate(values, mask, 2.0)) == 0.5


# ---------------------------------------------------------------- modern objectives


def random_sequences(seed, shape=(3, 12), count=4):
    """Tokens of up to `count` sequences a row, in any order, some of them not trained."""
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.7, rng.integers(0, count, shape).astype(np.int32), count


def test_dual_clip_equals_oracle():
    """min, then at least c A where A < 0."""
    for seed in range(5):
        logprob, old, advantage = random_tokens(seed)
        actual = losses.clipped_objective(logprob, old, advantage, 0.2, 0.28, dual_clip=3.0)
        for index in np.ndindex(logprob.shape):
            a, plain = (
                advantage[index],
                oracles.clipped_objective(*(x[index] for x in (logprob, old, advantage)), 0.2, 0.28),
            )
            expected = max(plain, 3.0 * a) if a < 0 else plain
            assert abs(actual[index] - expected) < 1e-4 * max(1.0, abs(expected))
    assert float(losses.clipped_objective(jnp.log(9.0), jnp.zeros(()), -jnp.ones(()), dual_clip=3.0)) == -3.0
    with pytest.raises(ValueError, match="above 1"):
        losses.clipped_objective(logprob, old, advantage, dual_clip=0.5)


def test_cispo_equals_oracle():
    """The value, and a gradient of clip(ratio) A at every token, also where PPO has none."""
    logprob, old, advantage = random_tokens(3)
    slope = jax.grad(lambda x: losses.cispo_objective(x, old, advantage, 0.9, 0.3).sum())(logprob)
    actual = losses.cispo_objective(logprob, old, advantage, 0.9, 0.3)
    for index in np.ndindex(logprob.shape):
        ratio = min(max(np.exp(float(logprob[index]) - float(old[index])), 0.1), 1.3)
        assert abs(slope[index] - ratio * advantage[index]) < 1e-5
        assert abs(actual[index] - ratio * advantage[index] * logprob[index]) < 1e-4


def test_sequence_ratio_equals_oracle():
    """GSPO: the ratio of every token is the geometric mean over the tokens of its sequence, and so is the gradient."""
    logprob, old, _ = random_tokens(4, (3, 12))
    mask, sequence, count = random_sequences(4)
    actual = losses.sequence_logprob(logprob, old, mask, sequence, count)
    for n, t in zip(*np.nonzero(mask)):
        own = [u for u in range(12) if mask[n, u] and sequence[n, u] == sequence[n, t]]
        mean = sum(float(logprob[n, u]) - float(old[n, u]) for u in own) / len(own)
        assert abs(actual[n, t] - (old[n, t] + mean)) < 1e-5

    def objective(x):
        return (losses.sequence_logprob(x, old, mask, sequence, count) - old)[mask].sum()

    np.testing.assert_allclose(jax.grad(objective)(logprob), mask, atol=1e-6)


def test_gspo_with_one_token_sequences_is_ppo():
    logprob, old, advantage = random_tokens(5, (3, 12))
    mask, sequence = np.ones((3, 12), bool), np.broadcast_to(np.arange(12, dtype=np.int32), (3, 12))
    stands = losses.sequence_logprob(logprob, old, mask, sequence, 12)
    actual, expected = (losses.clipped_objective(x, old, advantage) for x in (stands, logprob))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", losses.IMPORTANCE)
def test_importance_weights_equal_oracle(kind):
    old, sampler, _ = random_tokens(6, (3, 12))
    mask, sequence, count = random_sequences(6)
    actual = losses.importance_weights(old, sampler, mask, sequence, count, kind, 2.0)
    for n, t in zip(*np.nonzero(mask)):
        own = {"none": [], "token": [t]}.get(
            kind, [u for u in range(12) if mask[n, u] and sequence[n, u] == sequence[n, t]]
        )
        gap = sum(float(old[n, u]) - float(sampler[n, u]) for u in own)
        assert abs(actual[n, t] - min(np.exp(gap), 2.0)) < 1e-4
    slope = jax.grad(lambda x: losses.importance_weights(x, sampler, mask, sequence, count, kind, 2.0).sum())(old)
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("kind", losses.AGGREGATES)
def test_token_weights_equal_oracle(kind):
    mask, sequence, count = random_sequences(7)
    actual = losses.token_weights(mask, sequence, count, kind, 50.0)
    lengths = {}
    for n, t in zip(*np.nonzero(mask)):
        lengths[n, sequence[n, t]] = lengths.get((n, sequence[n, t]), 0) + 1
    for n, t in np.ndindex(mask.shape):
        expected = {
            "constant": 1 / 50.0,
            "token_mean": 1 / mask.sum(),
            "sequence_mean": 1 / (lengths.get((n, sequence[n, t]), 1) * len(lengths)),
        }[kind]
        assert abs(actual[n, t] - (expected if mask[n, t] else 0.0)) < 1e-6
    assert float(losses.token_weights(np.zeros_like(mask), sequence, count, kind, 50.0).sum()) == 0.0


def test_unknown_names_are_refused():
    mask, sequence, count = random_sequences(8)
    with pytest.raises(ValueError, match="token_mean"):
        losses.token_weights(mask, sequence, count, "mean", 1.0)
    with pytest.raises(ValueError, match="sequence"):
        losses.importance_weights(mask, mask, mask, sequence, count, "rows", 2.0)
    with pytest.raises(ValueError, match="positive"):
        losses.importance_weights(mask, mask, mask, sequence, count, "token", 0.0)
