"""What decoder: Qwen2, Qwen3 and Llama differ by these fields only."""

import dataclasses

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")


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
    norm_eps: float = 1e-6
    attention_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    learned_positions: bool = (
        False  # beside the rotary ones, as very small models need them to find a place in a prompt
    )
    dtype: str = "float32"
    remat: str = "none"  # what the backward recomputes: nothing, all but matrix products, whole layers

    def __post_init__(self):
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
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype!r} is unknown: choose one of {DTYPES}")
        if self.remat not in REMAT:
            raise ValueError(f"model.remat={self.remat!r} is unknown: choose one of {REMAT}")
