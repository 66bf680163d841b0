"""config.json of Hugging Face checkpoints in and out: Qwen2 / Qwen2.5, Qwen3 and Llama.

Two spellings are read: that of transformers 5 (`rope_parameters`, `dtype`) and that of the public checkpoints of 2025
(`rope_theta`, `rope_scaling`, `torch_dtype`); a file is written so that both find theirs. A field that is absent or
null has the default of transformers 5. Nothing here imports jax.
"""

import dataclasses
from typing import Any

from tto_jax.models.config import ROPE_SCALING, ModelConfig, RopeScaling

FAMILIES = ("qwen2", "qwen3", "llama")
DTYPES = ("float32", "bfloat16", "float16")  # of the tensors in a checkpoint

# Ours, theirs, type, default in transformers 5: one for all families, or by family; None: see `_sizes`.
_FIELDS = (
    ("vocab_size", "vocab_size", int, {"qwen2": 151_936, "qwen3": 151_936, "llama": 32_000}),
    ("hidden_size", "hidden_size", int, 4096),
    ("num_layers", "num_hidden_layers", int, 32),
    ("num_heads", "num_attention_heads", int, 32),
    ("num_kv_heads", "num_key_value_heads", int, {"qwen2": 32, "qwen3": 32, "llama": None}),
    ("head_dim", "head_dim", int, {"qwen2": None, "qwen3": 128, "llama": None}),
    ("mlp_size", "intermediate_size", int, {"qwen2": 22_016, "qwen3": 22_016, "llama": 11_008}),
    ("max_position", "max_position_embeddings", int, {"qwen2": 32_768, "qwen3": 32_768, "llama": 2048}),
    ("norm_eps", "rms_norm_eps", float, 1e-6),
    ("tie_embeddings", "tie_word_embeddings", bool, False),
)

# Theirs, the values that the decoder computes (the first is the default), and why no other; for all families.
_FIXED = (
    ("hidden_act", ("silu", "swish"), "the MLP is SwiGLU"),
    ("use_sliding_window", (False,), "every layer attends to the whole context"),
    ("use_mrope", (False,), "positions are one-dimensional"),
    ("mlp_bias", (False,), "linear layers of the MLP have no biases"),
    ("partial_rotary_factor", (1.0,), "rotary positions turn all dimensions of a head"),
    ("pretraining_tp", (1,), "weights are not split"),
    ("attention_dropout", (0.0,), "there is no dropout"),
    ("is_causal", (True,), "a token sees itself and what is before it"),
    ("is_encoder_decoder", (False,), "it is a decoder"),
    ("quantization_config", (None,), "weights are float32, bfloat16 or float16; dequantise the checkpoint first"),
    ("auto_map", (None,), "code that comes with a checkpoint is not run"),
)
_ATTENTION_BIAS = (
    "qwen2 has biases on q, k and v whatever it says, the others none; the output projection never has one"
)

_ORIGINAL = "original_max_position_embeddings"  # of llama3 and yarn


def model_config(hf: dict[str, Any], *, dtype: str = "float32", remat: str = "none") -> ModelConfig:
    """The decoder that a parsed config.json describes.

    Args:
      hf: the parsed file.
      dtype, remat: of `ModelConfig`; the dtype of the checkpoint's tensors is `checkpoint_dtype`.

    Returns:
      The configuration. With yarn its max_position is the stretched one, factor * original, where the file has less:
      public files often keep the length before the stretch.

    Raises:
      ValueError: naming every field that is not supported, with its value and what is.
    """
    problems: list[str] = []
    family = hf.get("model_type")
    if family not in FAMILIES:
        problems.append(f"model_type={family!r}: dense decoders of the families {FAMILIES} are supported")
    _check_fixed(hf, family, problems)
    options = {}
    if family in FAMILIES:
        options = _sizes(hf, family, problems)
        options |= {"attention_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    options |= _rope(hf, problems)
    try:
        checkpoint_dtype(hf)
    except ValueError as error:
        problems.append(str(error))
    if not problems:
        scaling = options["rope_scaling"]
        if scaling is not None and scaling.kind == "yarn":
            stretched = int(scaling.factor * scaling.original_max_position)
            options["max_position"] = max(options["max_position"], stretched)
        try:
            return ModelConfig(**options, dtype=dtype, remat=remat)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("config.json describes a model that is not supported:\n  " + "\n  ".join(problems))


def checkpoint_dtype(hf: dict[str, Any]) -> str:
    """The dtype that a config.json gives for the stored tensors; float32 where it gives none.

    Raises ValueError for what is none of `DTYPES`.
    """
    name = "dtype" if hf.get("dtype") is not None else "torch_dtype"
    value = hf.get(name)
    if value is None:
        return "float32"
    found = str(value).removeprefix("torch.")
    if found not in DTYPES:
        raise ValueError(f"{name}={value!r}: choose one of {DTYPES}")
    return found


def to_hf(config: ModelConfig, dtype: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config.json of the decoder, in the spelling of transformers 5 and in that of 2025 at once.

    Args:
      config: the decoder. dtype: of the tensors that the checkpoint holds, one of `DTYPES`.
      base: the config.json the model came from: its family and what is not about the decoder (ids of BOS, EOS and pad,
        ...) are kept. Without it the family follows from the options.

    Raises:
      ValueError: if no family has these options, or `base` is another kind of model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} of a checkpoint is unknown: choose one of {DTYPES}")
    if config.learned_positions:
        raise ValueError(
            "model.learned_positions=True: Hugging Face's families have no learned positions; train without"
        )
    family = base["model_type"] if base else _family(config)
    hf = {
        **({"bos_token_id": None, "eos_token_id": None} if base is None else base),
        "model_type": family,
        "architectures": [_architecture(family)],
        **{theirs: getattr(config, ours) for ours, theirs, _, _ in _FIELDS},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
        **_rope_to_hf(config),
    }
    if family == "qwen2" and config.head_dim * config.num_heads == config.hidden_size:
        del hf["head_dim"]  # public files of qwen2 do not have it
    if family != "qwen2":
        hf["attention_bias"] = False
    if family == "llama":
        hf["mlp_bias"] = False
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"model.hidden_size={config.hidden_size} is not divisible by num_heads={config.num_heads}: "
                "transformers refuses such a llama"
            )
    read_back = dataclasses.asdict(model_config(hf, dtype=config.dtype, remat=config.remat))
    differing = [
        f"model.{name}={value} (read back: {read_back[name]})"
        for name, value in dataclasses.asdict(config).items()
        if value != read_back[name] and name != "max_position"  # which yarn may stretch
    ]
    if differing:
        raise ValueError(f"no config.json of model_type={family!r} says {', '.join(differing)}")
    return hf


def _family(config: ModelConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.attention_bias else "llama"


def _architecture(family: str) -> str:
    return f"{family.capitalize()}ForCausalLM"


def _check_fixed(hf: dict, family: str | None, problems: list[str]) -> None:
    for name, supported, reason in _FIXED:
        value = hf.get(name)
        if value is not None and value not in supported:
            problems.append(f"{name}={value!r}: {reason}; supported is {supported[0]!r}")
    if hf.get("attention_bias") and family != "qwen2":
        problems.append(f"attention_bias={hf['attention_bias']!r}: {_ATTENTION_BIAS}; supported is False")
    layer_types = hf.get("layer_types")
    layers = hf.get("num_hidden_layers")
    if layer_types is not None and layer_types != ["full_attention"] * (layers if isinstance(layers, int) else 32):
        problems.append(f"layer_types={layer_types!r}: supported is 'full_attention' for each of {layers} layers")
    architectures = hf.get("architectures")
    if architectures and family in FAMILIES and list(architectures) != [_architecture(family)]:
        problems.append(f"architectures={architectures!r}: supported is {[_architecture(family)]!r}")


def _sizes(hf: dict, family: str, problems: list[str]) -> dict[str, Any]:
    """The fields of `_FIELDS` under our names; what is of the wrong type goes to `problems` and has None."""
    options = {}
    for ours, theirs, kind, default in _FIELDS:
        value = default[family] if isinstance(default, dict) else default
        options[ours] = _typed(hf, theirs, kind, problems) if hf.get(theirs) is not None else value
    hidden, heads = options["hidden_size"], options["num_heads"]
    if options["num_kv_heads"] is None:
        options["num_kv_heads"] = heads
    if hf.get("head_dim") is None and options["head_dim"] is None and hidden and heads:
        options["head_dim"] = hidden // heads
        if hidden % heads:
            problems.append(
                f"hidden_size={hidden}: not divisible by num_attention_heads={heads}, and head_dim is not given"
            )
    return options


def _typed(section: dict, name: str, kind: type, problems: list[str], prefix: str = "") -> Any:
    """section[name] as `kind` (an int passes for a float), or None and a problem."""
    value = section[name]
    accepted = (int, float) if kind is float else kind
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        return kind(value)
    problems.append(f"{prefix}{name}={value!r}: it must be of type {kind.__name__}")
    return None


def _rope(hf: dict, problems: list[str]) -> dict[str, Any]:
    """rope_theta and rope_scaling of either spelling; where a file holds both they must agree."""
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        section = hf.get(name)
        if section and not isinstance(section, dict):
            problems.append(f"{name}={section!r}: it must be an object or null")
        elif section:
            found[name] = _rope_section(hf, name, section, problems)
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        problems.append(
            f"rope_parameters={hf['rope_parameters']!r}, rope_scaling={hf['rope_scaling']!r}: they contradict "
            "each other"
        )
    return next(iter(found.values())) if found else _rope_section(hf, "rope_parameters", {}, problems)


def _rope_section(hf: dict, name: str, section: dict, problems: list[str]) -> dict[str, Any]:
    at = f"{name}."
    given = {key: value for key, value in section.items() if value is not None and key not in ("type", "rope_type")}
    given |= _agreed(hf, given, at, "rope_theta", problems)
    theta = _typed(given, "rope_theta", float, problems, at) if "rope_theta" in given else 10_000.0
    kind = section.get("rope_type", section.get("type", "default"))
    if kind != "default" and kind not in ROPE_SCALING:
        problems.append(f"{at}rope_type={kind!r}: supported are {('default', *ROPE_SCALING)}")
        return {}
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"{at}partial_rotary_factor={given['partial_rotary_factor']!r}: supported is 1.0")
    given = {key: value for key, value in given.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaling = None if kind == "default" else _scaling(hf, kind, given, at, problems)
    known = () if kind == "default" else ("factor", _ORIGINAL, *ROPE_SCALING[kind])
    problems += [f"{at}{key}={given[key]!r}: not an option of {kind!r}" for key in given if key not in known]
    return {"rope_theta": theta, "rope_scaling": scaling}


def _scaling(hf: dict, kind: str, given: dict, at: str, problems: list[str]) -> RopeScaling | None:
    given = {_ORIGINAL: hf.get("max_position_embeddings")} | given | _agreed(hf, given, at, _ORIGINAL, problems)
    required = ("factor", _ORIGINAL, *(ROPE_SCALING[kind] if kind == "llama3" else ()))
    missing = [name for name in required if given.get(name) is None]
    problems += [f"{at}{name} is missing: {kind!r} needs {required}" for name in missing]
    kinds = {_ORIGINAL: int, "truncate": bool}
    known = len(problems)
    options = {
        "original_max_position" if name == _ORIGINAL else name: _typed(
            given, name, kinds.get(name, float), problems, at
        )
        for name in ("factor", _ORIGINAL, *ROPE_SCALING[kind])
        if given.get(name) is not None
    }
    if missing or len(problems) > known:
        return None
    try:
        return RopeScaling(kind, **options)
    except ValueError as error:
        problems.append(str(error))
    return None


def _agreed(hf: dict, section: dict, at: str, name: str, problems: list[str]) -> dict[str, Any]:
    """{name: value} of a field that may stand at the top of the file or in its rotary section; {} if in neither."""
    values = [x[name] for x in (section, hf) if x.get(name) is not None]
    if len(values) == 2 and values[0] != values[1]:
        problems.append(f"{name}={values[1]!r}, {at}{name}={values[0]!r}: they contradict each other")
    return {name: values[0]} if values else {}


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    scaling, options = config.rope_scaling, {"rope_type": "default"}
    if scaling is not None:
        options = {"rope_type": scaling.kind, "factor": scaling.factor, _ORIGINAL: scaling.original_max_position}
        for field in dataclasses.fields(scaling):
            value = getattr(scaling, field.name)
            if field.name in ROPE_SCALING[scaling.kind] and (scaling.kind == "llama3" or value != field.default):
                options[field.name] = value
    return {
        "rope_parameters": options | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": options if scaling is not None else None,
    }
