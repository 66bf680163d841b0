"""config.json of public checkpoints and of transformers 5, what is refused, and what is written."""

import copy
import dataclasses
import json
import math

import pytest

from tto_jax.models import hf_config
from tto_jax.models.config import ModelConfig, RopeScaling

QWEN2_OF_2025 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN3_OF_2025 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_OF_2025 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN2_1P5B = QWEN2_OF_2025 | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_window_layers": 21,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
# config.json of the public checkpoints, the number of parameters that their pages state, and head size and tie.
PUBLIC = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        QWEN2_1P5B | {"max_position_embeddings": 131072, "tie_word_embeddings": False},
        1_777_088_000,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        QWEN2_OF_2025
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen2.5-Math-1.5B": (
        QWEN2_1P5B | {"max_position_embeddings": 4096, "tie_word_embeddings": True},
        1_543_714_304,
    ),
    "Qwen3-0.6B": (
        QWEN3_OF_2025
        | {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "Qwen3-8B": (
        QWEN3_OF_2025
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        LLAMA3_OF_2025
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        LLAMA3_OF_2025
        | {
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "rope_scaling": LLAMA3_OF_2025["rope_scaling"] | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
}
QWEN2, QWEN3, LLAMA = (PUBLIC[name][0] for name in ("DeepSeek-R1-Distill-Qwen-1.5B", "Qwen3-0.6B", "Llama-3.2-1B"))
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def in_transformers_5(hf):
    """The same file as transformers 5 spells it."""
    hf = copy.deepcopy(hf)
    rope = hf.pop("rope_scaling", None) or {"rope_type": "default"}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type"))
    return hf | {"rope_parameters": rope | {"rope_theta": hf.pop("rope_theta")}, "dtype": hf.pop("torch_dtype")}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_checkpoints(name):
    import jax

    from tto_jax.models import decoder

    hf, parameters = PUBLIC[name]
    config = hf_config.model_config(hf, dtype="bfloat16", remat="dots")
    shapes = jax.eval_shape(lambda: decoder.init_params(config, 0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == parameters
    assert (config.dtype, config.remat) == ("bfloat16", "dots")
    assert hf_config.model_config(in_transformers_5(hf), dtype="bfloat16", remat="dots") == config
    assert hf_config.checkpoint_dtype(hf) == hf_config.checkpoint_dtype(in_transformers_5(hf)) == "bfloat16"


def test_fields_of_each_family():
    qwen2, qwen3, llama = (hf_config.model_config(hf) for hf in (QWEN2, QWEN3, LLAMA))
    assert qwen2 == ModelConfig(
        vocab_size=151936,
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_size=8960,
        max_position=131072,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        attention_bias=True,
        tie_embeddings=False,
    )
    assert (qwen3.head_dim, qwen3.num_heads, qwen3.hidden_size) == (128, 16, 1024)
    assert (qwen3.attention_bias, qwen3.qk_norm, qwen3.tie_embeddings, qwen3.rope_theta) == (False, True, True, 1e6)
    assert (llama.attention_bias, llama.qk_norm, llama.norm_eps) == (False, False, 1e-5)
    assert llama.rope_scaling == RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


def test_yarn_as_the_model_cards_say():
    """The file keeps the length before the stretch, which the model goes beyond."""
    for hf in (QWEN3 | {"rope_scaling": YARN}, in_transformers_5(QWEN3 | {"rope_scaling": YARN})):
        config = hf_config.model_config(hf)
        assert config.rope_scaling == RopeScaling("yarn", 4.0, 32768)
        assert config.max_position == 131072
    longer = hf_config.model_config(QWEN3 | {"rope_scaling": YARN, "max_position_embeddings": 200_000})
    assert longer.max_position == 200_000
    every = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 0.7}
    config = hf_config.model_config(QWEN3 | {"rope_scaling": YARN | every | {"truncate": False}})
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 32768, **every, truncate=False)
    nulls = dict.fromkeys(every)
    assert hf_config.model_config(QWEN3 | {"rope_scaling": YARN | nulls}).rope_scaling == RopeScaling(
        "yarn", 4.0, 32768
    )


def test_original_length_is_that_of_the_file_unless_given():
    yarn = {key: value for key, value in YARN.items() if not key.startswith("original")}
    assert hf_config.model_config(QWEN3 | {"rope_scaling": yarn}).rope_scaling.original_max_position == 40960
    at_the_top = QWEN3 | {"rope_scaling": yarn, "original_max_position_embeddings": 20480}
    assert hf_config.model_config(at_the_top).rope_scaling.original_max_position == 20480


def test_the_rope_type_counts_over_the_older_type():
    both = LLAMA["rope_scaling"] | {"type": "linear"}
    assert hf_config.model_config(LLAMA | {"rope_scaling": both}) == hf_config.model_config(LLAMA)
    default = {"type": "default", "rope_type": "default", "partial_rotary_factor": 1.0}
    assert hf_config.model_config(QWEN3 | {"rope_scaling": default}) == hf_config.model_config(QWEN3)


@pytest.mark.parametrize("family", hf_config.FAMILIES)
def test_absent_fields_have_the_defaults_of_transformers(family):
    from transformers import AutoConfig

    default = AutoConfig.for_model(family)
    config = hf_config.model_config({"model_type": family})
    assert config == hf_config.model_config(json.loads(default.to_json_string(use_diff=False)))
    assert config.num_kv_heads == default.num_key_value_heads
    assert config.head_dim == getattr(default, "head_dim", default.hidden_size // default.num_attention_heads)
    assert config.rope_theta == default.rope_parameters["rope_theta"]


UNSUPPORTED = [
    (QWEN2, {"model_type": "qwen2_moe"}, r"model_type='qwen2_moe': .*\('qwen2', 'qwen3', 'llama'\)"),
    (QWEN3, {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, r"model_type='qwen3_moe'"),
    (LLAMA, {"model_type": "mixtral"}, r"model_type='mixtral'"),
    (LLAMA, {"model_type": None}, r"model_type=None"),
    (QWEN2, {"use_sliding_window": True}, r"use_sliding_window=True: .*; supported is False"),
    (QWEN3, {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, r"layer_types=.*supported is 'full_att"),
    (QWEN3, {"layer_types": ["full_attention"] * 27}, r"layer_types=.* for each of 28 layers"),
    (QWEN2, {"use_mrope": True}, r"use_mrope=True"),
    (QWEN2, {"hidden_act": "gelu"}, r"hidden_act='gelu': .*; supported is 'silu'"),
    (LLAMA, {"attention_bias": True}, r"attention_bias=True: .*output projection never has one"),
    (QWEN3, {"attention_bias": True}, r"attention_bias=True"),
    (LLAMA, {"mlp_bias": True}, r"mlp_bias=True"),
    (LLAMA, {"pretraining_tp": 2}, r"pretraining_tp=2"),
    (QWEN2, {"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
    (QWEN2, {"is_causal": False}, r"is_causal=False"),
    (QWEN2, {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config={'quant_method': 'gptq'}"),
    (QWEN2, {"auto_map": {"AutoModel": "modeling.Mine"}}, r"auto_map=.*is not run"),
    (QWEN2, {"architectures": ["Qwen2ForRewardModel"]}, r"architectures=\['Qwen2ForRewardModel'\]"),
    (LLAMA, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.rope_type='linear': supported are \("),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_type='dynamic'"),
    (QWEN2, {"rope_scaling": {"rope_type": "longrope"}}, r"rope_type='longrope'"),
    (
        QWEN2,
        {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24]}},
        r"rope_scaling\.mrope_section=\[16, 2",
    ),
    (QWEN2, {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters\.partial_rotary_factor=0\.5"),
    (QWEN2, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"rope_parameters\.full_attention="),
    (
        QWEN2,
        {"rope_parameters": {"rope_theta": 5.0}},
        r"rope_theta=10000, rope_parameters\.rope_theta=5\.0: they contra",
    ),
    (
        QWEN2,
        {"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}},
        r"rope_parameters=.*rope_scaling=.*contra",
    ),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling\.low_freq_factor is missing"),
    (QWEN2, {"rope_scaling": {"type": "yarn"}}, r"rope_scaling\.factor is missing: 'yarn' needs"),
    (QWEN2, {"rope_scaling": YARN | {"factor": 0.5}}, r"factor=0\.5"),
    (QWEN2, {"rope_scaling": YARN | {"factor": "4"}}, r"rope_scaling\.factor='4': it must be of type float"),
    (QWEN2, {"rope_scaling": "yarn"}, r"rope_scaling='yarn': it must be an object or null"),
    (QWEN2, {"rope_theta": "1e6"}, r"rope_theta='1e6': it must be of type float"),
    (QWEN2, {"torch_dtype": "float8_e4m3fn"}, r"torch_dtype='float8_e4m3fn': choose one of \('float32', 'bfloat16'"),
    (QWEN2, {"hidden_size": "1536"}, r"hidden_size='1536': it must be of type int"),
    (QWEN2, {"num_hidden_layers": 28.5}, r"num_hidden_layers=28\.5: it must be of type int"),
    (QWEN2, {"tie_word_embeddings": "no"}, r"tie_word_embeddings='no': it must be of type bool"),
    (QWEN2, {"num_key_value_heads": 5}, r"num_kv_heads=5 does not divide num_heads=12"),
    (QWEN2, {"num_attention_heads": 10}, r"hidden_size=1536: not divisible by num_attention_heads=10"),
    (QWEN2, {"vocab_size": 0}, r"vocab_size=0"),
    (QWEN2, {"num_attention_heads": 0}, r"num_heads=0"),
]


@pytest.mark.parametrize(("hf", "changes", "says"), UNSUPPORTED)
def test_what_is_not_supported_is_named(hf, changes, says):
    with pytest.raises(ValueError, match=says):
        hf_config.model_config(hf | changes)


def test_all_problems_are_reported_together():
    wrong = {
        "use_mrope": True,
        "hidden_act": "gelu",
        "quantization_config": {"quant_method": "gptq"},
        "hidden_size": "1536",
        "torch_dtype": "int4",
        "rope_scaling": {"type": "linear"},
    }
    with pytest.raises(ValueError) as caught:
        hf_config.model_config(QWEN2 | wrong)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(wrong)
    for name in wrong:
        assert sum(line.strip().startswith(name) for line in lines) == 1, name


def test_checkpoint_dtype():
    assert hf_config.checkpoint_dtype({}) == "float32"
    assert hf_config.checkpoint_dtype({"torch_dtype": "torch.bfloat16"}) == "bfloat16"
    assert hf_config.checkpoint_dtype({"dtype": "float16", "torch_dtype": "float32"}) == "float16"


EXPORTED = {
    "qwen2": hf_config.model_config(QWEN2),
    "qwen2-yarn": hf_config.model_config(QWEN2 | {"rope_scaling": YARN | {"beta_fast": 16.0, "mscale": 0.7}}),
    "qwen2-head": dataclasses.replace(hf_config.model_config(QWEN2), head_dim=64),
    "qwen3": hf_config.model_config(QWEN3),
    "llama": dataclasses.replace(hf_config.model_config(LLAMA), rope_scaling=None),
    "llama-llama3": hf_config.model_config(LLAMA),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_reads_what_is_written(name, tmp_path, monkeypatch):
    """The whole file, and either spelling of it alone."""
    import torch
    from transformers import AutoConfig, modeling_rope_utils

    monkeypatch.setattr(modeling_rope_utils.logger, "warning", pytest.fail)
    config = EXPORTED[name]
    hf = hf_config.to_hf(config, "bfloat16")
    new = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    old = {key: value for key, value in hf.items() if key not in ("rope_parameters", "dtype")}
    for spelling in (hf, new, old):
        assert hf_config.model_config(spelling) == config
        (tmp_path / "config.json").write_text(json.dumps(spelling))
        read = AutoConfig.from_pretrained(tmp_path)
        assert read.dtype == torch.bfloat16 and read.model_type == name.split("-")[0]
        assert read.architectures == [type(read).__name__.replace("Config", "ForCausalLM")]
        assert (read.bos_token_id, read.eos_token_id) == (None, None), "not Llama's default 1 and 2"
        assert read.rope_parameters == hf["rope_parameters"]
        assert hf_config.model_config(json.loads(read.to_json_string())) == config


@pytest.mark.parametrize("name", PUBLIC)
def test_the_original_file_is_kept_but_for_the_decoder(name):
    original, _ = PUBLIC[name]
    config = hf_config.model_config(original)
    written = hf_config.to_hf(config, "float32", original)
    for key in original.keys() - {"torch_dtype"}:
        assert written[key] == original[key], key
    assert written["torch_dtype"] == written["dtype"] == "float32"
    added = {"rope_parameters", "dtype", "head_dim", "attention_bias", "mlp_bias", "rope_scaling"}
    assert written.keys() - original.keys() <= added
    assert hf_config.model_config(written) == config
    assert original == PUBLIC[name][0], "the argument is not changed"


def test_a_shorter_context_is_written_as_it_is():
    config = dataclasses.replace(hf_config.model_config(QWEN3 | {"rope_scaling": YARN}), max_position=16_384)
    assert hf_config.to_hf(config, "bfloat16")["max_position_embeddings"] == 16_384


@pytest.mark.parametrize(
    ("changes", "base", "says"),
    [
        ({"learned_positions": True}, None, r"model\.learned_positions=True"),
        ({"attention_bias": True}, None, r"'qwen3' says model\.attention_bias=True \(read back: False\)"),
        ({"qk_norm": False}, QWEN3, r"'qwen3' says model\.qk_norm=False"),
        ({"qk_norm": True}, LLAMA, r"'llama' says model\.qk_norm=True"),
        ({"qk_norm": False, "num_heads": 24}, None, r"hidden_size=1024 is not divisible by num_heads=24"),
        ({}, QWEN2 | {"model_type": "gemma"}, r"model_type='gemma'"),
        ({"num_layers": 3}, QWEN3 | {"layer_types": ["full_attention"] * 28}, r"layer_types=.* for each of 3 layers"),
    ],
)
def test_what_no_family_has_is_not_written(changes, base, says):
    config = dataclasses.replace(hf_config.model_config(QWEN3), **changes)
    with pytest.raises(ValueError, match=says):
        hf_config.to_hf(config, "bfloat16", base)


def test_an_unknown_dtype_is_not_written():
    with pytest.raises(ValueError, match=r"dtype='int8' .*\('float32', 'bfloat16', 'float16'\)"):
        hf_config.to_hf(hf_config.model_config(QWEN3), "int8")
