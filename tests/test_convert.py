"""The page convert and what it writes, against transformers; the three kinds of directory that a policy starts from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from absl import app, flags
from absl.testing import flagsaver
from etils import epath
from safetensors import deserialize
from tokenizers import Tokenizer, models, pre_tokenizers

from tto_jax import checkpoint, convert, learner, pretrained
from tto_jax.learner import OptimizerConfig
from tto_jax.models import hf_weights

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
    eos_token_id=1,
    pad_token_id=0,
)
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=8, tie_word_embeddings=False)),
    "llama": (transformers.LlamaConfig, dict(tie_word_embeddings=False)),
}


def make_hf(folder: Path, family: str = "qwen2", dtype: str = "bfloat16", **options) -> Path:
    """A random model, all parameters drawn (norms and biases too), with a tokenizer and a generation config."""
    kind, own = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | own))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.generation_config = transformers.GenerationConfig(temperature=0.6, top_p=0.95, do_sample=True, eos_token_id=1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "one": 3, "two": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <eos>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    return make_hf(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def converted(hf_dir, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "tiny"
    convert.import_hf(hf_dir, target)
    return target


@pytest.fixture(scope="module")
def run(hf_dir, tmp_path_factory) -> Path:
    """A workdir as a run leaves it: parameters times 2 at step 3, times 3 at step 7."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    start = pretrained.find(hf_dir)
    checkpoint.claim_workdir(workdir, {"variant": "brpo"})
    pretrained.copy_small_files(start, workdir / "hf")
    params = start.load(start.model_config())
    with checkpoint.Checkpointer(workdir / "checkpoints", keep=3) as saved:
        for step, factor in ((3, 2.0), (7, 3.0)):
            scaled = jax.tree.map(lambda x: x * factor, params)  # noqa: B023
            saved.save(step, learner.init_state(scaled, OptimizerConfig(learning_rate=1e-3)), {"totals": {}})
    return workdir


def tensors(folder: Path) -> dict[str, tuple]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {n: (x["dtype"], x["shape"], bytes(x["data"])) for n, x in deserialize(file.read_bytes())}
    return found


def file_set(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_import_export_is_bitwise_and_transformers_computes_the_same(family, tmp_path, capsys):
    source = make_hf(tmp_path / "hf", family, max_shard_size="2KB" if family == "llama" else "1GB")
    convert.import_hf(source, tmp_path / "ckpt")
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out")
    said = capsys.readouterr().out
    assert tensors(tmp_path / "out") == tensors(source)
    count = sum(x.numel() for x in transformers.AutoModelForCausalLM.from_pretrained(source).parameters())
    assert f"{count:,} parameters, float32 (stored as bfloat16)" in said
    assert f"{count:,} parameters, bfloat16, " in said

    ids = np.random.default_rng(0).integers(0, 48, (3, 20)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", ids)
    convert.check_hf(source, tmp_path / "tokens.npy", tmp_path / "logits.npy")
    ours = np.load(tmp_path / "logits.npy")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert theirs.generation_config.temperature == 0.6 and theirs.generation_config.top_p == 0.95
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    assert ours.shape == (3, 20, 48) and ours.dtype == np.float32 and np.ptp(expected) > 1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    if family != "qwen2":  # whose class makes a byte-level tokenizer of any file
        assert tokenizer("one two three")["input_ids"] == [3, 4, 2]
    chat = [{"role": "user", "content": "one"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "one <eos>"
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.eos_token_id, config.dtype) == (family, 1, torch.bfloat16)
    assert type(config) is FAMILIES[family][0]


def test_a_real_tokenizer_comes_along(hf_dir, real_data, tmp_path):
    there = real_data / "tokenizers" / "deepseek-r1"
    shutil.copytree(hf_dir, tmp_path / "hf")
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    shutil.copytree(there, tmp_path / "hf", dirs_exist_ok=True)
    convert.import_hf(tmp_path / "hf", tmp_path / "ckpt")
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out")
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (there, tmp_path / "out"))
    text = "<think>\nLet x = \\frac{1}{2}.</think>"
    assert len(after(text)["input_ids"]) > 5 and after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template and after.eos_token == before.eos_token


def test_a_run_is_exported_at_its_last_step_or_a_given_one(run, hf_dir, tmp_path):
    before = hf_weights.load(hf_dir, pretrained.find(hf_dir).model_config())
    for step, factor in ((None, 3.0), (3, 2.0)):
        out = tmp_path / str(step)
        convert.export_hf(run, out, dtype="float32", step=step)
        found = pretrained.find(out)
        assert found.kind == "hf" and found.dtype() == "float32"
        after = found.load(found.model_config())
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x * factor, y), before, after)  # noqa: B023
        assert file_set(out) == file_set(hf_dir)
    assert pretrained.find(run).dtype() == "bfloat16"
    with pytest.raises(FileNotFoundError, match=r"No checkpoint of step 5 .*steps there: \[3, 7\]"):
        convert.export_hf(run, tmp_path / "five", step=5)
    assert not (tmp_path / "five").exists()


def test_export_in_bfloat16_loads_with_the_values_rounded(run, tmp_path):
    convert.export_hf(run, tmp_path / "out")
    model = pretrained.find(run).model_config()
    ours = pretrained.find(run).load(model)["layers"]["down"]["kernel"][1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    down = theirs["model.layers.1.mlp.down_proj.weight"]
    assert down.dtype == torch.bfloat16
    np.testing.assert_array_equal(down.float().numpy().T, np.asarray(ours.astype(jnp.bfloat16).astype(jnp.float32)))


# The three kinds -----------------------------------------------------------------------------------------------------


def test_three_kinds_one_face(hf_dir, converted, run):
    start = pretrained.find(hf_dir)
    model = start.model_config(dtype="bfloat16", remat="full")
    assert (model.dtype, model.remat, model.attention_bias) == ("bfloat16", "full", True)
    expected = start.load(model)
    for path, kind in ((hf_dir, "hf"), (converted, "converted"), (run, "run")):
        found = pretrained.find(str(path))
        assert (found.kind, found.model_config("bfloat16", "full"), found.dtype()) == (kind, model, "bfloat16")
        assert transformers.AutoTokenizer.from_pretrained(found.tokenizer_dir).eos_token == "<eos>"
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = found.load(model, one)
        factor = 3.0 if kind == "run" else 1.0
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x * factor, y), expected, params)  # noqa: B023
        assert {(x.dtype, x.sharding) for x in jax.tree.leaves(params)} == {(jnp.dtype("float32"), one)}
    info = json.loads((converted / "info.json").read_text())
    assert info == {"source": "tiny", "dtype": "bfloat16", "parameters": sum(x.size for x in jax.tree.leaves(expected))}


def test_a_run_that_goes_on_is_read_and_left_alone(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    unfinished = checkpoints / "9.orbax-checkpoint-tmp" / "state"
    unfinished.mkdir(parents=True)
    like = hf_weights.abstract_params(pretrained.find(run).model_config())
    params, step = checkpoint.restore_params(checkpoints, like)
    assert step == 7 and unfinished.is_dir()
    assert jax.tree.structure(params) == jax.tree.structure(like)
    with pytest.raises(ValueError, match=r"1 paths differ[^$]*embed\.embedding: .*\[48, 16\], you gave"):
        wrong = like | {"embed": {"embedding": jax.ShapeDtypeStruct((49, 16), jnp.float32)}}
        checkpoint.restore_params(checkpoints, wrong)
    with pytest.raises(FileNotFoundError, match=r"No checkpoint in .*steps there: none"):
        checkpoint.restore_params(tmp_path / "nothing", like)


def test_step_is_of_runs_only(hf_dir, converted):
    for path in (hf_dir, converted):
        found = pretrained.find(path)
        with pytest.raises(ValueError, match=r"step=3: .* is no run"):
            found.load(found.model_config(), step=3)


def test_what_is_no_model_is_said_to_be_none(hf_dir, converted, run, tmp_path):
    def refused(kind, said):
        with pytest.raises(kind, match=said):
            pretrained.find(tmp_path / "x")
        shutil.rmtree(tmp_path / "x", ignore_errors=True)

    refused(FileNotFoundError, r"x is no directory. Name a Hugging Face directory.*hf download")
    (tmp_path / "x").mkdir()
    refused(FileNotFoundError, r"looked for config\.json .*, info\.json and params/ .*, checkpoints/")
    shutil.copytree(converted, tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "hf")
    refused(FileNotFoundError, r"is a checkpoint, but not one of a pretrained model: there is no hf/config\.json")
    shutil.copytree(run, tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "hf")
    refused(FileNotFoundError, "is a run, but not one of a pretrained model")
    for text, said in (
        ("version https://git-lfs.github.com/spec/v1\n", "config.json is a Git LFS pointer"),
        ("<html>", "config.json is a web page"),
        ("{", "config.json is not JSON"),
        ('{"variant": "brpo"}', "it has no model_type"),
    ):
        shutil.copytree(hf_dir, tmp_path / "x")
        (tmp_path / "x" / "config.json").write_text(text)
        refused(ValueError, said)
    shutil.copytree(hf_dir, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").rename(tmp_path / "x" / "pytorch_model.bin")
    refused(FileNotFoundError, r"found pytorch_model\.bin; other formats")


def test_small_files_are_copied_weights_are_not(hf_dir, converted, tmp_path):
    start = pretrained.find(hf_dir)
    (start.path / "additional_chat_templates").mkdir(exist_ok=True)
    (start.path / "additional_chat_templates" / "tools.jinja").write_text("{{ 1 }}")
    pretrained.copy_small_files(start, tmp_path / "hf")
    expected = file_set(hf_dir) - {"model.safetensors"}
    assert file_set(tmp_path / "hf") == expected
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} < expected
    for name in expected:
        assert (tmp_path / "hf" / name).read_bytes() == (hf_dir / name).read_bytes()
    pretrained.copy_small_files(start, tmp_path / "hf")  # as a run that resumes
    pretrained.copy_small_files(pretrained.find(converted), converted / "hf")  # onto itself
    assert (converted / "hf" / "config.json").read_bytes() == (hf_dir / "config.json").read_bytes()
    shutil.rmtree(start.path / "additional_chat_templates")


# Refusals of the page ------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(hf_dir, converted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        convert.import_hf(hf_dir, tmp_path / "full")
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        convert.export_hf(converted, tmp_path / "full")
    assert file_set(tmp_path) == {"full/x"}
    (tmp_path / "empty").mkdir()
    convert.export_hf(converted, tmp_path / "empty")
    assert tensors(tmp_path / "empty") == tensors(hf_dir)


def test_a_conversion_that_fails_leaves_nothing(hf_dir, converted, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "copy_small_files", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.import_hf(hf_dir, tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr(hf_weights, "_fetch", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.export_hf(converted, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_each_direction_wants_its_kind(hf_dir, converted, tmp_path):
    with pytest.raises(ValueError, match="is no Hugging Face directory, but of this library already: converted"):
        convert.import_hf(converted, tmp_path / "x")
    with pytest.raises(ValueError, match="is a Hugging Face directory already"):
        convert.export_hf(hf_dir, tmp_path / "x")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((2, 3), np.float32), r"float32\[2, 3\]: it must be i32\[N,T\]"),
        (np.zeros(3, np.int32), r"int32\[3\]: it must be i32\[N,T\]"),
        (np.zeros((0, 3), np.int32), "not empty"),
        (np.array([[0, 48]], np.int32), "ids from 0 to 48; those of the model are 0 to 47"),
        (np.array([[-1, 4]], np.int64), "ids from -1 to 4"),
        (np.array([[2**40, 4]], np.int64), "ids from 4 to 1099511627776"),
        (np.zeros((1, 65), np.int32), "rows of 65 tokens; the model's context is 64"),
        (np.array([[{}]], object), "is no NumPy file of an array"),
    ],
)
def test_tokens_that_are_none(value, said, hf_dir, tmp_path):
    np.save(tmp_path / "t.npy", value, allow_pickle=True)
    with pytest.raises(ValueError, match=said):
        convert.check_hf(hf_dir, tmp_path / "t.npy", tmp_path / "logits.npy")
    assert not (tmp_path / "logits.npy").exists()


def test_a_file_of_tokens_that_is_no_array(hf_dir, tmp_path):
    (tmp_path / "text").write_text("1 2 3")
    np.savez(tmp_path / "several.npz", a=np.zeros((1, 1)))
    for name, said in (("text", "is no NumPy file"), ("several.npz", "holds several arrays")):
        with pytest.raises(ValueError, match=said):
            convert.check_hf(hf_dir, tmp_path / name, tmp_path / "logits.npy")
    with pytest.raises(FileNotFoundError):
        convert.check_hf(hf_dir, tmp_path / "none.npy", tmp_path / "logits.npy")


def test_logits_in_bfloat16_are_near_and_positions_beyond_a_chunk_are_right(hf_dir, tmp_path, monkeypatch):
    np.save(tmp_path / "t.npy", np.random.default_rng(1).integers(0, 48, (2, 37)))
    convert.check_hf(hf_dir, tmp_path / "t.npy", tmp_path / "whole.npy")
    convert.check_hf(hf_dir, tmp_path / "t.npy", tmp_path / "half.npy", dtype="bfloat16")
    monkeypatch.setattr(convert, "_CHUNK", 16)
    convert.check_hf(hf_dir, tmp_path / "t.npy", tmp_path / "parts.npy")
    whole, half, parts = (np.load(tmp_path / f"{name}.npy") for name in ("whole", "half", "parts"))
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert 0 < np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "got nothing; give one of: --from_hf --to | --from --to_hf | --check_hf --tokens --logits"),
        ("--from_hf=a", "got --from_hf; give one of"),
        ("--from_hf=a --to=b --to_hf=c", "got --from_hf --to --to_hf"),
        ("--from_hf=a --to=b --dtype=bfloat16", "imported parameters are float32"),
        ("--from_hf=a --to=b --step=3", "--step=3 belongs to --from"),
        ("--check_hf=a --tokens=b --logits=c --dtype=float16", "--dtype=float16: logits can be computed in one of"),
        ("--from=a --to_hf=b c", "unexpected arguments ['c']"),
    ],
)
def test_usage(typed, said):
    with flagsaver.flagsaver(), pytest.raises(app.UsageError) as error:
        convert.main(flags.FLAGS(["convert", *typed.split()]))
    assert said in str(error.value)


def test_the_page_itself(hf_dir, tmp_path):
    np.save(tmp_path / "t.npy", np.zeros((1, 4), np.int32))
    command = [sys.executable, "-m", "tto_jax.convert"]
    options = [f"--from_hf={hf_dir}", f"--to={tmp_path / 'ckpt'}"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert, % 100/100 parameters=" in done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'ckpt'}: ") and done.stdout.count("\n") == 1
    assert pretrained.find(epath.Path(tmp_path / "ckpt")).kind == "converted"
