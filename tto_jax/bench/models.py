"""The models that are measured: Qwen2 shapes with random weights by name, or a checkpoint directory."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from tto_jax import pretrained
from tto_jax.kernels import branch_decode
from tto_jax.models import decoder, hf_config, hf_weights
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params


def _qwen2(vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, mlp_size, tie_embeddings=True):
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=mlp_size,
        max_position=131_072,
        attention_bias=True,
        tie_embeddings=tie_embeddings,
    )


MODELS = {
    "ci": _qwen2(512, 32, 2, 4, 2, 8, 48),
    "tiny": _qwen2(2048, 256, 4, 4, 2, 64, 704),  # 3.5M parameters
    "small": _qwen2(32_768, 384, 8, 6, 2, 64, 1024),  # 25M
    "1.5b": _qwen2(151_936, 1536, 28, 12, 2, 128, 8960, tie_embeddings=False),  # R1-Distill-Qwen-1.5B
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model to measure; its weights are loaded when they are asked for."""

    config: ModelConfig
    path: str | None = None

    def params(self) -> Params:
        """Float32, from the directory or random."""
        return pretrained.find(self.path).load(self.config) if self.path else decoder.init_params(self.config, 0)


def find(name: str, dtype: str, remat: str = "none", hf: str | None = None) -> Loaded:
    """A model by name or the one in the directory `hf`, with the platform's kernels. ValueError for an unknown name."""
    kernel = {"branch_decode": branch_decode.choose(jax.default_backend())}
    if hf:
        return Loaded(dataclasses.replace(pretrained.find(hf).model_config(dtype, remat), **kernel), hf)
    if name not in MODELS:
        raise ValueError(f"--model={name!r} is unknown: choose one of {tuple(MODELS)}, or give --hf=DIR")
    return Loaded(dataclasses.replace(MODELS[name], dtype=dtype, remat=remat, **kernel))


@contextlib.contextmanager
def exported(loaded: Loaded, params: Params) -> Iterator[str]:
    """A Hugging Face directory of these weights in the compute dtype, for a peer: the model's own, or a new one."""
    if loaded.path is not None:
        yield loaded.path
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        model = dataclasses.replace(loaded.config, branch_decode=ModelConfig.branch_decode)  # no kernel is saved
        hf_weights.save(directory, model, params, dtype=model.dtype)
        (directory / "config.json").write_text(json.dumps(hf_config.to_hf(model, model.dtype)))
        del params  # the directory holds them now
        yield str(directory)
