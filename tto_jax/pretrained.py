"""What a policy can start from: a Hugging Face directory, a checkpoint made of one, or a run that began with one."""

import dataclasses
import json
import os
from typing import Any, Literal

import jax
from etils import epath

from tto_jax import checkpoint
from tto_jax.models import hf_config, hf_weights
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params

SMALL = "hf"  # the folder of a converted checkpoint or of a run that holds the small files of a Hugging Face directory
SMALL_FILES = (  # all that transformers 5 writes beside the weights of a text model, and what older versions wrote
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",  # a folder of templates
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on disk: where it is, of which kind, and its parsed Hugging Face config.json."""

    path: epath.Path
    kind: Literal["hf", "converted", "run"]
    hf_config: dict[str, Any]

    @property
    def small_files(self) -> epath.Path:
        """The folder of config.json, generation_config.json and the tokenizer."""
        return self.path if self.kind == "hf" else self.path / SMALL

    @property
    def tokenizer_dir(self) -> epath.Path:
        """The folder from which `transformers.AutoTokenizer` loads the tokenizer."""
        return self.small_files

    def model_config(self, dtype: str = "float32", remat: str = "none") -> ModelConfig:
        """The decoder, computed in `dtype`. Raises ValueError naming every field that is not supported."""
        return hf_config.model_config(self.hf_config, dtype=dtype, remat=remat)

    def dtype(self) -> str:
        """The dtype of the tensors of the Hugging Face checkpoint that it is, or came from."""
        if self.kind == "hf":
            return hf_weights.stored_dtype(self.path)
        if self.kind == "converted":
            return json.loads((self.path / "info.json").read_text())["dtype"]
        return hf_config.checkpoint_dtype(self.hf_config)

    def load(self, config: ModelConfig, shardings=None, step: int | None = None) -> Params:
        """The parameters, float32, sharded as asked from the start (see `hf_weights.load`).

        Args:
          config: `model_config()`, in any compute dtype. shardings: one for all or a tree of them; None: first device.
          step: of a run, which of its checkpoints; default: the last one.

        Raises:
          FileNotFoundError, ValueError: nothing is there, or something else than `config` says.
        """
        if step is not None and self.kind != "run":
            raise ValueError(f"step={step}: {self.path} is no run; only runs have checkpoints of several steps.")
        if self.kind == "hf":
            return hf_weights.load(self.path, config, shardings)
        like = hf_weights.with_shardings(hf_weights.abstract_params(config), shardings)
        if self.kind == "converted":
            return checkpoint.load_params(self.path, like)[0]
        return checkpoint.restore_params(self.path / "checkpoints", like, step)[0]


def find(path: str | os.PathLike) -> Pretrained:
    """The model in a directory.

    A checkpoint of `python -m tto_jax.convert` has info.json, params/ and hf/; a run's workdir has checkpoints/ and,
    if it began with a pretrained model, hf/; a Hugging Face directory has config.json and safetensors.
    Raises FileNotFoundError or ValueError if it is none of these or can't be read, saying what was looked for.
    """
    path = epath.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is no directory. Name a Hugging Face directory, a checkpoint of `python -m tto_jax.convert` or "
            "the workdir of a run; models are not downloaded (`hf download MODEL --local-dir=DIR` does that)."
        )
    if (path / "info.json").exists() and (path / "params").exists():
        return Pretrained(path, "converted", _read_config(_small_config(path, "a checkpoint")))
    if (path / "checkpoints").is_dir() or (path / SMALL / "config.json").exists():
        return Pretrained(path, "run", _read_config(_small_config(path, "a run")))
    config = path / "config.json"
    if not config.exists():
        raise FileNotFoundError(
            f"{path} holds no model: looked for config.json (a Hugging Face directory), info.json and params/ (a "
            "checkpoint of `python -m tto_jax.convert`), checkpoints/ (the workdir of a run)."
        )
    found = Pretrained(path, "hf", _read_config(config))
    if "://" in os.fspath(path):
        raise ValueError(f"{path} is a Hugging Face directory and not local: its files are memory-mapped, copy it.")
    hf_weights.weight_files(path)
    return found


def _small_config(path: epath.Path, kind: str) -> epath.Path:
    config = path / SMALL / "config.json"
    if not config.exists():
        raise FileNotFoundError(
            f"{path} is {kind}, but not one of a pretrained model: there is no {SMALL}/config.json in it."
        )
    return config


def _read_config(path: epath.Path) -> dict[str, Any]:
    if instead := hf_weights.what_it_is_instead(path):
        raise ValueError(f"{path} {instead}.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} is no config.json of a Hugging Face model: it has no model_type.")
    return config


def copy_small_files(source: Pretrained, target: str | os.PathLike) -> None:
    """Copies config.json and what there is of `SMALL_FILES` into `target` (created; files there are replaced).

    With several processes the first one copies. config.json comes last: it marks the folder as complete.
    """
    target = epath.Path(target)
    if jax.process_index() != 0 or target.resolve() == source.small_files.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in (*SMALL_FILES, "config.json"):
        _copy(source.small_files / name, target / name)


def _copy(source: epath.Path, target: epath.Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            _copy(file, target / file.name)
    elif source.exists():
        target.write_bytes(source.read_bytes())
