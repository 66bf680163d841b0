"""Rotary positions: the frequencies of plain, llama3 and yarn scaling, and the rotation.

Dimension pair i of D/2 turns by f_i = theta^(-2i/D) a token. Frequencies are NumPy float32, made once at trace time in
the order of operations of transformers 5 (`modeling_rope_utils`): at long positions a last bit of them can be seen.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax.core.types import Array, pytree
from tto_jax.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a token of each pair of dimensions, f32[D/2], scaled as `config.rope_scaling` says."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    # NumPy's float32 power is off by up to 2 last bits, PyTorch's hardly ever: round the float64 one.
    wide = (config.rope_theta ** exponent.astype(np.float64)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / wide
    return _llama3(scaling, wide) if scaling.kind == "llama3" else _yarn(scaling, wide, config.rope_theta)


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by: 1 but for yarn, 0.1 ln(factor) + 1 there (arXiv 2309.00071, section 3.4).

    With mscale and mscale_all_dim it is (0.1 m ln(factor) + 1) of the one over that of the other, as DeepSeek has it.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    at = lambda m: 0.1 * m * math.log(scaling.factor) + 1.0  # noqa: E731
    if scaling.mscale and scaling.mscale_all_dim:
        return at(scaling.mscale) / at(scaling.mscale_all_dim)
    return at(1.0)


@pytree
class Rotation:
    """How far each position turns each pair of dimensions."""

    cos: Array  # f32[R,T,1,D/2], times the attention factor
    sin: Array  # f32[R,T,1,D/2]


def rotation(position: Array, config: ModelConfig) -> Rotation:
    """Of positions i32[R,T]: outside of a loop over layers or tokens, as XLA computes cosines anew wherever they are
    used in the same program.
    """
    angle = position[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
    scale = attention_factor(config)
    return Rotation(cos=jnp.cos(angle) * scale, sin=jnp.sin(angle) * scale)


def rotary(x: Array, by: Rotation) -> jax.Array:
    """Rotate halves of x [R,T,H,D] (Llama's convention), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = first * by.cos - second * by.sin, second * by.cos + first * by.sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _llama3(scaling: RopeScaling, wide: np.ndarray) -> np.ndarray:
    """f / factor where the wavelength 2 pi / f exceeds original / low, f below original / high, a blend between."""
    plain = 1.0 / wide
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position / (2 * math.pi / plain)  # in the original context
    blend = (turns - low) / (high - low)
    between = (1 - blend) * plain / scaling.factor + blend * plain
    return np.where(turns < low, plain / scaling.factor, np.where(turns > high, plain, between))


def _yarn(scaling: RopeScaling, wide: np.ndarray, theta: float) -> np.ndarray:
    """f / factor after the dimension that turns beta_slow times, f before that of beta_fast, a linear ramp between."""
    half = len(wide)

    def dimension(turns: float) -> float:
        return half * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)  # all dimensions, not pairs: as transformers has it
    width = high - low or 0.001
    kept = 1 - np.clip((np.arange(half, dtype=np.float32) - low) / width, 0, 1)
    return 1.0 / (scaling.factor * wide) * (1 - kept) + 1.0 / wide * kept
