"""What decoder: Qwen2, Qwen3 and Llama differ by these fields only."""

import dataclasses
from collections.abc import Mapping

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "attention", "full")  # what the backward computes again grows to the right
# The options of each kind of rotary scaling, beside factor and original_max_position.
ROPE_SCALING = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context (static); the equations are in `models.rope`.

    An option of the other kind must keep its default.
    """

    kind: str
    factor: float  # how many times longer the context becomes
    original_max_position: int  # context in tokens before the stretch
    # llama3: wavelengths above original / low are stretched in full, those below original / high not at all
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn: dimensions that turn fewer than beta_slow times in the original context are stretched in full, those that
    # turn more than beta_fast times not at all
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # on cos and sin; None: from factor, mscale and mscale_all_dim
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the two bounds to whole dimensions

    def __post_init__(self):
        if self.kind not in ROPE_SCALING:
            raise ValueError(f"model.rope_scaling.kind={self.kind!r} is unknown: choose one of {tuple(ROPE_SCALING)}")
        allowed = ("kind", "factor", "original_max_position", *ROPE_SCALING[self.kind])
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in allowed and value != field.default:
                raise ValueError(f"model.rope_scaling.{field.name}={value} says nothing to {self.kind!r}: leave it out")
        if not self.factor >= 1 or self.original_max_position < 1:
            raise ValueError(
                f"model.rope_scaling.factor={self.factor}, original_max_position={self.original_max_position}: "
                "the factor is at least 1 and the context a positive number of tokens"
            )
        _check_order("low_freq_factor", self.low_freq_factor, "high_freq_factor", self.high_freq_factor)
        _check_order("beta_slow", self.beta_slow, "beta_fast", self.beta_fast)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"model.rope_scaling.{name}={value}: it must be positive, or None")


def _check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0 < low < high:
        raise ValueError(
            f"model.rope_scaling.{low_name}={low}, {high_name}={high}: 0 < {low_name} < {high_name} must hold"
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of the decoder (static).

    Qwen2: attention_bias. Qwen3: qk_norm. Llama: neither. Parameters are float32; dtype is what they are computed in.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_position: int  # context length in tokens: no token may stand at or beyond it (checked by the settings)
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None  # or its fields as a dict, as configurations hold it
    norm_eps: float = 1e-6
    attention_bias: bool = False  # on q, k and v
    qk_norm: bool = False
    tie_embeddings: bool = True
    learned_positions: bool = (
        False  # beside the rotary ones, as very small models need them to find a place in a prompt
    )
    dtype: str = "float32"
    kv_copies: int = 1  # of each KV head in activations and cache, for more tensor shards than KV heads
    branch_decode: str = "merged"  # implementation of the attention of new tokens over the cache
    remat: str = (
        "none"  # what the backward recomputes: nothing, all but matrix products, all but attention, whole layers
    )

    @property
    def group(self) -> int:
        """Heads that share a KV head of the cache."""
        return self.num_heads // (self.num_kv_heads * self.kv_copies)

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", _rope_scaling(self.rope_scaling))
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size")
        for name in (*sizes, "max_position"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: sizes are positive integers")
        if self.num_heads % self.num_kv_heads:
            choices = tuple(n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: "
                f"choose one of {choices}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: rotary embeddings need an even head size")
        if not (self.rope_theta > 0 and self.norm_eps > 0):
            raise ValueError(
                f"model.rope_theta={self.rope_theta}, norm_eps={self.norm_eps}: both must be positive, "
                "such as 10000.0 and 1e-6"
            )
        if self.rope_scaling is not None and not self.rope_theta > 1:
            raise ValueError(f"model.rope_theta={self.rope_theta}: with rope_scaling it must exceed 1, such as 10000.0")
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype!r} is unknown: choose one of {DTYPES}")
        if self.remat not in REMAT:
            raise ValueError(f"model.remat={self.remat!r} is unknown: choose one of {REMAT}")


def _rope_scaling(options: Mapping) -> RopeScaling:
    names = tuple(field.name for field in dataclasses.fields(RopeScaling))
    required, unknown = names[:3], sorted(set(options) - set(names))
    if unknown or not set(required) <= set(options):
        raise ValueError(f"model.rope_scaling={dict(options)}: {required} must be given, of {names}")
    return RopeScaling(**options)
