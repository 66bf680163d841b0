"""Rotary frequencies against loops written from the equations, what a rotation must keep, and what is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tto_jax.models import rope
from tto_jax.models.config import ModelConfig, RopeScaling

SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_size": 8,
    "max_position": 131_072,
}
PLAIN = ModelConfig(**SIZES, head_dim=64, rope_theta=500_000.0)
LLAMA3 = RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling("yarn", 4.0, 32_768)
CASES = {
    "none": PLAIN,
    "llama3": dataclasses.replace(PLAIN, rope_scaling=LLAMA3),
    "llama3-narrow": dataclasses.replace(
        PLAIN, head_dim=10, rope_scaling=RopeScaling("llama3", 8.0, 100, low_freq_factor=2.0, high_freq_factor=3.0)
    ),
    "yarn": dataclasses.replace(PLAIN, head_dim=128, rope_theta=1e6, rope_scaling=YARN),
    "yarn-short": dataclasses.replace(PLAIN, rope_theta=10_000.0, rope_scaling=RopeScaling("yarn", 8.0, 16)),
    "yarn-betas": dataclasses.replace(
        PLAIN, rope_scaling=RopeScaling("yarn", 2.5, 4096, beta_fast=20.0, beta_slow=3.0, truncate=False)
    ),
}


def literal_frequencies(config):
    """float64: one dimension pair at a time."""
    scaling, pairs = config.rope_scaling, config.head_dim // 2
    found = []
    for i in range(pairs):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        if scaling is not None:
            turns = scaling.original_max_position * frequency / (2 * math.pi)
            keep = keep_llama3(scaling, turns) if scaling.kind == "llama3" else keep_yarn(config, i)
            frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
        found.append(frequency)
    return found


def keep_llama3(scaling, turns):
    if turns >= scaling.high_freq_factor:
        return 1.0
    if turns <= scaling.low_freq_factor:
        return 0.0
    return (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)


def keep_yarn(config, i):
    """The bounds solve original * theta^(-2d/D) / (2 pi) = beta for the pair d."""
    scaling = config.rope_scaling
    ends = []
    for beta in (scaling.beta_fast, scaling.beta_slow):
        wavelength = scaling.original_max_position / beta
        ends.append(config.head_dim / 2 * math.log(wavelength / (2 * math.pi), config.rope_theta))
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.truncate else ends
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if i <= low:
        return 1.0
    return 0.0 if i >= high else 1 - (i - low) / (high - low)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_the_equations(name):
    config = CASES[name]
    found, expected = rope.inverse_frequencies(config), literal_frequencies(config)
    assert found.dtype == np.float32 and found.shape == (config.head_dim // 2,)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    if config.rope_scaling is not None:
        plain = rope.inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
        ratio = plain / found
        assert ratio[-1] == pytest.approx(config.rope_scaling.factor) and ratio[0] == pytest.approx(1.0)
        assert (np.diff(ratio) > -1e-5).all(), "slower dimensions are stretched more"


def test_yarn_stretches_the_slowest_dimensions_and_scales_attention():
    factor = lambda **options: rope.attention_factor(  # noqa: E731
        dataclasses.replace(PLAIN, rope_scaling=dataclasses.replace(YARN, **options))
    )
    assert factor() == pytest.approx(0.1 * math.log(4.0) + 1)
    assert factor(attention_factor=0.5) == 0.5
    assert factor(mscale=0.7) == factor(), "it counts together with mscale_all_dim only"
    expected = (0.07 * math.log(4.0) + 1) / (0.13 * math.log(4.0) + 1)
    assert factor(mscale=0.7, mscale_all_dim=1.3) == pytest.approx(expected)
    assert factor(factor=1.0) == 1.0
    assert rope.attention_factor(CASES["llama3"]) == rope.attention_factor(PLAIN) == 1.0


@pytest.mark.parametrize("name", ["none", "llama3-narrow", "yarn-short"])
def test_products_depend_on_the_distance_only(name):
    """And lengths grow by the attention factor."""
    config = CASES[name]
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, config.head_dim)).astype(np.float32)
    turn = jax.jit(lambda x, position: rope.rotary(x, rope.rotation(position, config)))
    at = lambda x, t: np.asarray(turn(x, np.full((1, 1), t, np.int32)))[0, 0, 0]  # noqa: E731
    near, far, other = (float(at(q, t + 7) @ at(k, t)) for t in (3, 400, 401))
    assert near == pytest.approx(far, abs=2e-3) and far == pytest.approx(other, abs=2e-3)
    assert abs(near - float(at(q, 3) @ at(k, 3))) > 0.1, "the distance counts"
    factor = rope.attention_factor(config)
    assert np.linalg.norm(at(q, 50)) == pytest.approx(factor * np.linalg.norm(q), rel=1e-5)
    np.testing.assert_allclose(at(q, 0), factor * q[0, 0, 0], rtol=1e-6)


def test_a_configuration_section_becomes_the_frozen_options():
    section = ConfigDict(SIZES | {"head_dim": 64, "rope_scaling": {"kind": "yarn", "factor": 4.0}})
    section.rope_scaling.original_max_position = 32_768
    config = ModelConfig(**section.to_dict())
    assert config.rope_scaling == YARN
    assert hash(config) == hash(dataclasses.replace(config, rope_scaling=YARN)), "static arguments must hash"
    assert ModelConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "linear"}, r"kind='linear' is unknown: choose one of \('llama3', 'yarn'\)"),
        ({"beta_fast": 8.0}, r"beta_fast=8.0 says nothing to 'llama3'"),
        ({"kind": "yarn", "low_freq_factor": 2.0}, r"low_freq_factor=2.0 says nothing to 'yarn'"),
        ({"factor": 0.5}, r"factor=0\.5"),
        ({"original_max_position": 0}, r"original_max_position=0"),
        ({"low_freq_factor": 4.0}, r"low_freq_factor=4\.0, high_freq_factor=4\.0"),
        ({"low_freq_factor": 0.0}, r"low_freq_factor=0\.0"),
        ({"kind": "yarn", "beta_fast": 1.0}, r"beta_slow=1\.0, beta_fast=1\.0"),
        ({"kind": "yarn", "attention_factor": 0.0}, r"attention_factor=0\.0: it must be positive"),
        ({"kind": "yarn", "mscale": -1.0}, r"mscale=-1\.0"),
        ({"mystery": 1}, r"'mystery': 1.*must be given, of \('kind', 'factor', 'original_max_position', 'low"),
    ],
)
def test_options_that_cannot_work_are_refused(options, says):
    given = {"kind": "llama3", "factor": 8.0, "original_max_position": 8192} | options
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(PLAIN, rope_scaling=given)


def test_what_scaling_needs():
    with pytest.raises(ValueError, match=r"\('kind', 'factor', 'original_max_position'\) must be given"):
        dataclasses.replace(PLAIN, rope_scaling={})
    with pytest.raises(ValueError, match=r"model\.rope_theta=1\.0: with rope_scaling"):
        dataclasses.replace(PLAIN, rope_theta=1.0, rope_scaling=YARN)
