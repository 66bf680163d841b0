"""Checkpoints in and out against torch's state dicts and the safetensors library; files that are broken."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tto_jax.models import decoder, hf_weights
from tto_jax.models.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(
    vocab_size=48, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=24, max_position=64
)
QWEN2 = ModelConfig(**SIZES, attention_bias=True, tie_embeddings=True)
QWEN3 = ModelConfig(**SIZES | {"head_dim": 8}, qk_norm=True, tie_embeddings=False)
LLAMA = ModelConfig(**SIZES, tie_embeddings=False)
FAMILIES = {"qwen2": QWEN2, "qwen3": QWEN3, "llama": LLAMA}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What `transformers` names the tensors of a model, with their shapes: written down anew, as loops."""
    hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = (hidden,)
        for name, size in (("q", q), ("k", kv), ("v", kv)):
            found[f"{at}self_attn.{name}_proj.weight"] = (size, hidden)
            if config.attention_bias:
                found[f"{at}self_attn.{name}_proj.bias"] = (size,)
        if config.qk_norm:
            found |= {f"{at}self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
        found[f"{at}self_attn.o_proj.weight"] = (hidden, q)
        found |= {f"{at}mlp.{name}_proj.weight": (config.mlp_size, hidden) for name in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (hidden, config.mlp_size)
    return found


def tensors(config: ModelConfig, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Every finite bit pattern may occur: signed zeros and subnormal numbers too."""
    rng, kind, found = np.random.default_rng(seed), np.dtype(DTYPES[dtype]), {}
    for name, shape in shapes(config).items():
        bits = rng.integers(0, 2 ** (8 * kind.itemsize), shape, dtype=f"u{kind.itemsize}")
        value = bits.view(kind)
        found[name] = np.where(np.isfinite(value.astype(np.float32)), value, np.ones_like(value))
    return found


def gaussian(config: ModelConfig) -> dict[str, np.ndarray]:
    """Numbers as a model has them."""
    rng = np.random.default_rng(5)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(config).items()}


def write(folder: Path, values: dict[str, np.ndarray], files: int = 1) -> Path:
    """A checkpoint written by the safetensors library: one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if files == 1:
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index, names = {}, sorted(values)
    for number in range(files):
        file, mine = f"model-{number + 1:05d}-of-{files:05d}.safetensors", names[number::files]
        save_file({name: values[name] for name in mine}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def read(folder: Path) -> dict[str, tuple]:
    """Name -> (dtype, shape, bytes) of all files, by the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as handle:
            assert handle.metadata() == {"format": "pt"}
        for name, value in raw(file).items():
            assert name not in found
            found[name] = value
    return found


def raw(file: Path) -> dict[str, tuple]:
    from safetensors import deserialize

    return {n: (x["dtype"], tuple(x["shape"]), bytes(x["data"])) for n, x in deserialize(file.read_bytes())}


def assert_bits(ours, theirs: np.ndarray) -> None:
    theirs = theirs.astype(np.float32)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    np.testing.assert_array_equal(np.asarray(ours).view(np.uint32), theirs.view(np.uint32))


def assert_holds(params, values: dict[str, np.ndarray], config: ModelConfig) -> None:
    """Ours against theirs, place by place, without the table."""
    params = jax.tree.map(np.asarray, params)
    assert_bits(params["embed"]["embedding"], values["model.embed_tokens.weight"])
    assert_bits(params["norm"]["scale"], values["model.norm.weight"])
    assert ("lm_head" in params) == (not config.tie_embeddings)
    if not config.tie_embeddings:
        assert_bits(params["lm_head"]["kernel"], values["lm_head.weight"].T)
    layers = params["layers"]
    for i in range(config.num_layers):
        theirs = {name.split(f"layers.{i}.")[1]: x for name, x in values.items() if f"layers.{i}." in name}
        assert_bits(layers["attention_norm"]["scale"][i], theirs["input_layernorm.weight"])
        assert_bits(layers["mlp_norm"]["scale"][i], theirs["post_attention_layernorm.weight"])
        for name in ("gate", "up", "down"):
            assert_bits(layers[name]["kernel"][i], theirs[f"mlp.{name}_proj.weight"].T)
        for name, there in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
            assert_bits(layers["attention"][name]["kernel"][i], theirs[f"self_attn.{there}_proj.weight"].T)
        for name in "qkv" if config.attention_bias else "":
            assert_bits(layers["attention"][name]["bias"][i], theirs[f"self_attn.{name}_proj.bias"])
        for name in "qk" if config.qk_norm else "":
            assert_bits(layers["attention"][f"{name}_norm"]["scale"][i], theirs[f"self_attn.{name}_norm.weight"])


# The table -----------------------------------------------------------------------------------------------------------


def test_each_name_has_one_row_and_each_row_is_used():
    used = set()
    for config in FAMILIES.values():
        for name in shapes(config):
            rows = [row for row in hf_weights.TABLE if re.fullmatch(row[0], name)]
            assert len(rows) == 1, name
            used.add(rows[0])
    assert used == set(hf_weights.TABLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_there_and_back(family):
    config = FAMILIES[family]
    flat = jax.tree_util.tree_leaves_with_path(hf_weights.abstract_params(config))
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    names = [name for path in paths for name in hf_weights.names_of(path, config.num_layers)]
    assert sorted(names) == sorted(shapes(config))
    assert {hf_weights.slots_of(name)[0].path for name in names} == set(paths)


def test_a_dot_matches_a_dot_only():
    assert hf_weights.slots_of("model_norm.weight") == [] == hf_weights.slots_of("model.norm.weight2")


# In ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_load_is_exact(family, dtype, tmp_path):
    config, values = FAMILIES[family], tensors(FAMILIES[family], dtype)
    params = hf_weights.load(write(tmp_path, values, files=1 if family == "llama" else 4), config)
    assert jax.tree.structure(params) == jax.tree.structure(hf_weights.abstract_params(config))
    assert_holds(params, values, config)
    assert {device for x in jax.tree.leaves(params) for device in x.devices()} == {jax.devices()[0]}
    assert hf_weights.stored_dtype(tmp_path) == dtype


def test_parameters_do_not_depend_on_the_files_once_loaded(tmp_path):
    values = tensors(LLAMA)
    params = hf_weights.load(write(tmp_path, values), LLAMA)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert_holds(params, values, LLAMA)


def test_a_tied_checkpoint_may_hold_its_head_too(tmp_path):
    values = tensors(QWEN2, "bfloat16")
    values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()
    assert_holds(hf_weights.load(write(tmp_path / "same", values), QWEN2), values, QWEN2)
    values["lm_head.weight"][-1, -1] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from model\.embed_tokens"):
        hf_weights.load(write(tmp_path / "other", values), QWEN2)


def test_progress_counts_parameters(tmp_path):
    seen, total = [], sum(np.prod(shape) for shape in shapes(QWEN3).values())
    write(tmp_path, tensors(QWEN3))
    params = hf_weights.load(tmp_path, QWEN3, on_progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == total
    seen.clear()
    hf_weights.save(tmp_path / "out", QWEN3, params, dtype="float32", max_shard_bytes=8000, on_progress=seen.append)
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == total


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
sys.path.insert(0, sys.argv[1])
from test_hf_weights import QWEN2, tensors, write, assert_holds
from pathlib import Path
from tto_jax.models import hf_weights

folder, values = Path(sys.argv[2]), tensors(QWEN2, "bfloat16")
write(folder, values, files=3)
devices = jax.devices()
assert len(devices) == 8
mesh = Mesh(np.array(devices)[::-1].reshape(2, 4), ("a", "b"))  # not in the order of their ids
abstract = hf_weights.abstract_params(QWEN2)
rules = {"kernel": P(None, "a", "b"), "bias": P(None, ("b", "a")), "embedding": P("b"), "scale": P()}

def named(path, leaf):
    return NamedSharding(mesh, P() if path[0].key == "norm" else rules[path[-1].key])

layers = Mesh(np.array(devices[:3]), ("layer",))

def by_layer(path, leaf):
    return NamedSharding(layers, P("layer" if leaf.shape[0] == 3 else None))

for shardings in (
    NamedSharding(mesh, P()),
    SingleDeviceSharding(devices[5]),
    jax.tree_util.tree_map_with_path(named, abstract),
    jax.tree_util.tree_map_with_path(by_layer, abstract),
):
    params = hf_weights.load(folder, QWEN2, shardings)
    assert_holds(params, values, QWEN2)
    if not isinstance(shardings, jax.sharding.Sharding):
        assert jax.tree.map(lambda x: x.sharding, params) == shardings
    for x in jax.tree.leaves(params):  # every replica holds the values, not only the first
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(x)[shard.index])
    hf_weights.save(folder / "out", QWEN2, params, dtype="bfloat16")
    assert_holds(hf_weights.load(folder / "out", QWEN2), values, QWEN2)
    (folder / "out" / "model.safetensors").unlink()

# Replicas may share memory on the host: a donated update must not write there.
params = hf_weights.load(folder, QWEN2, NamedSharding(mesh, P()))
before = jax.tree.map(np.array, params)
negated = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)(params)
for x, old in zip(jax.tree.leaves(negated), jax.tree.leaves(before)):
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), -old)
print("fine")
"""


def run_with_8_devices(*argv) -> subprocess.CompletedProcess:
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True)


def test_born_sharded_in_any_way_on_8_devices(tmp_path):
    done = run_with_8_devices("-c", SHARDED, Path(__file__).parent, tmp_path)
    assert done.stdout.strip() == "fine", done.stderr


TWO_PROCESSES = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
from test_hf_weights import QWEN2, tensors
from pathlib import Path
from tto_jax.models import hf_weights

folder, port, index = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=60)
mesh = Mesh(np.array(jax.devices()), ("x",))
rules = {"kernel": P(None, "x"), "bias": P(), "embedding": P("x"), "scale": P()}
shardings = jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, rules[path[-1].key]), hf_weights.abstract_params(QWEN2)
)
read, whole = 0, hf_weights._read

def counted(tensors, part):
    global read
    shard = whole(tensors, part)
    read += shard.size
    return shard

hf_weights._read = counted
params = hf_weights.load(folder, QWEN2, shardings)
sharded = [x.size for path, x in jax.tree_util.tree_leaves_with_path(params) if path[-1].key in ("kernel", "embedding")]
replicated = sum(x.size for x in jax.tree.leaves(params)) - sum(sharded)
assert read == sum(sharded) // 2 + replicated, (read, sharded, replicated)
hf_weights.save(folder / "out", QWEN2, params, dtype="bfloat16", max_shard_bytes=4000)
try:
    hf_weights.load(folder, QWEN2)
except ValueError as error:
    assert "every parameter needs a sharding" in str(error)
else:
    raise AssertionError("no sharding was accepted")
print("fine")
"""


@pytest.mark.slow
def test_two_processes_fill_and_write_one_checkpoint(tmp_path):
    write(tmp_path, {name: x.astype(DTYPES["bfloat16"]) for name, x in gaussian(QWEN2).items()}, files=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_collective_call_terminate_timeout_seconds=600",
    }
    command = [sys.executable, "-c", TWO_PROCESSES, str(Path(__file__).parent), str(tmp_path), str(port)]
    both = [
        subprocess.Popen(
            [*command, str(i)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        for process in both:
            out, error = process.communicate(timeout=300)
            assert out.strip().endswith("fine"), error
    finally:
        for process in both:
            process.kill()
    assert read(tmp_path / "out") == read(tmp_path)


def test_shardings_of_another_tree_are_refused(tmp_path):
    write(tmp_path, tensors(LLAMA))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match=r"in one only: \['embed.embedding', .*'wrong'\]"):
        hf_weights.load(tmp_path, LLAMA, {"wrong": one})


def peak(folder: Path, *options) -> str:
    program = ROOT / "tests" / "models" / "import_memory.py"
    done = subprocess.run([sys.executable, program, folder, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_peak_memory_of_a_small_import(tmp_path):
    """No allowance: the limit is 64 + 2 x 10 MB; a second copy of the parameters would take 128."""
    print(peak(tmp_path / "checkpoint", "--bytes=64e6"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_1_gb(dtype, tmp_path):
    print(peak(tmp_path / "checkpoint", "--bytes=1e9", f"--dtype={dtype}"))


# Out -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 4000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_is_bitwise(family, dtype, limit, tmp_path):
    config = FAMILIES[family]
    write(tmp_path / "in", tensors(config, dtype, seed=1), files=2)
    params = hf_weights.load(tmp_path / "in", config)
    hf_weights.save(tmp_path / "out", config, params, dtype=dtype, max_shard_bytes=limit)
    assert read(tmp_path / "out") == read(tmp_path / "in")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    if limit > 10**6:
        assert files == {"model.safetensors"}
        return
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert files == {*index["weight_map"].values(), "model.safetensors.index.json"}
    for name, file in index["weight_map"].items():
        assert name in raw(tmp_path / "out" / file)
    for file in files - {"model.safetensors.index.json"}:
        sizes = [len(data) for _, _, data in raw(tmp_path / "out" / file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
        assert (tmp_path / "out" / file).stat().st_size % DTYPES[dtype](0).itemsize == 0
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in read(tmp_path / "out").values())
    assert {re.search(r"of-(\d+)", file)[1] for file in files if "-of-" in file} == {f"{len(files) - 1:05d}"}


def test_layers_beyond_nine_keep_their_order(tmp_path):
    config = dataclasses.replace(LLAMA, num_layers=11)
    values = tensors(config)
    params = hf_weights.load(write(tmp_path / "in", values, files=3), config)
    assert_holds(params, values, config)
    hf_weights.save(tmp_path / "out", config, params, dtype="float32")
    assert read(tmp_path / "out") == read(tmp_path / "in")


def test_export_rounds_to_nearest_even_as_torch_does(tmp_path):
    import torch

    params = decoder.init_params(LLAMA, 3)
    hf_weights.save(tmp_path, LLAMA, params, dtype="bfloat16")
    theirs = torch.from_numpy(np.asarray(params["layers"]["up"]["kernel"][1]).T.copy()).to(torch.bfloat16)
    from safetensors.torch import load_file as load_torch

    assert torch.equal(load_torch(tmp_path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"], theirs)


@pytest.mark.parametrize("limit", [10**9, 4000])
def test_a_killed_export_leaves_nothing_that_loads(limit, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    fetched, count = hf_weights._fetch, len(shapes(LLAMA))

    def fetch(*args):
        nonlocal count
        count -= 1
        if not count:  # of the last tensor
            raise Killed
        return fetched(*args)

    monkeypatch.setattr(hf_weights, "_fetch", fetch)
    with pytest.raises(Killed):
        hf_weights.save(tmp_path, LLAMA, decoder.init_params(LLAMA, 0), dtype="float32", max_shard_bytes=limit)
    assert any(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        hf_weights.load(tmp_path, LLAMA)


def test_what_cannot_be_exported(tmp_path):
    params = decoder.init_params(LLAMA, 0)
    with pytest.raises(ValueError, match="dtype='float64' is unknown"):
        hf_weights.save(tmp_path, LLAMA, params, dtype="float64")
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        hf_weights.save(tmp_path, LLAMA, params, dtype="float32", max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"layers\.down\.kernel: \[3, 24, 16\], must be \[3, 32, 16\]"):
        hf_weights.save(tmp_path, dataclasses.replace(LLAMA, mlp_size=32), params, dtype="float32")
    with pytest.raises(ValueError, match=r"lm_head\.kernel: in one only"):
        hf_weights.save(tmp_path, dataclasses.replace(LLAMA, tie_embeddings=True), params, dtype="float32")
    learned = dataclasses.replace(LLAMA, learned_positions=True)
    with pytest.raises(ValueError, match="no tensor for position_embed"):
        hf_weights.save(tmp_path, learned, decoder.init_params(learned, 0), dtype="float32")
    params["layers"]["up"]["kernel"] = params["layers"]["up"]["kernel"].at[1, 0, 0].set(70000.0)
    with pytest.raises(ValueError, match=r"layers\.up\.kernel holds 70000"):
        hf_weights.save(tmp_path / "half", LLAMA, params, dtype="float16")
    hf_weights.save(tmp_path / "whole", LLAMA, params, dtype="float32")
    with pytest.raises(FileExistsError, match="holds weights already"):
        hf_weights.save(tmp_path / "whole", LLAMA, params, dtype="float32")


# Broken checkpoints --------------------------------------------------------------------------------------------------


def test_all_disagreements_are_reported_together_before_any_tensor_is_read(tmp_path, monkeypatch):
    values = tensors(QWEN3)
    del values["model.layers.1.mlp.up_proj.weight"], values["model.norm.weight"]
    values["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    values["model.layers.3.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    values["model.layers.02.input_layernorm.weight"] = np.zeros(16, np.float32)
    values["model.layers.2.mlp.down_proj.weight"] = values["model.layers.2.mlp.down_proj.weight"].T.copy()
    values["lm_head.weight"] = np.zeros((48, 16), np.int8)
    monkeypatch.setattr(hf_weights.Stored, "open", lambda self: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError) as error:
        hf_weights.load(write(tmp_path, values, files=2), QWEN3)
    lines = str(error.value).splitlines()
    assert "8 disagreements" in lines[0] and len(lines) == 9
    for said in (
        "model.layers.1.mlp.up_proj.weight: missing",
        "model.norm.weight: missing",
        "model.layers.0.self_attn.q_proj.bias: extra, a model of this configuration has no such tensor",
        "model.layers.3.mlp.up_proj.weight: extra, a model of this configuration has no such tensor",
        "model.layers.0.self_attn.rotary_emb.inv_freq: unmapped, 0 rows of the table match it",
        "model.layers.2.input_layernorm.weight: duplicate of model.layers.02.input_layernorm.weight",
        "model.layers.2.mlp.down_proj.weight: shape [24, 16], must be [16, 24]",
        "lm_head.weight: dtype I8, must be one of BF16, F16, F32",
    ):
        assert f"  {said}" in lines


def test_a_long_list_is_cut(tmp_path):
    config = dataclasses.replace(LLAMA, num_layers=20)
    with pytest.raises(ValueError, match=r"153 disagreements[^$]*and 103 more"):
        hf_weights.load(write(tmp_path, tensors(LLAMA)), config)


def test_an_index_and_its_files_that_disagree(tmp_path):
    values = tensors(LLAMA)
    write(tmp_path, values, files=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))

    again = load_file(tmp_path / second) | {"lm_head.weight": values["lm_head.weight"]}
    save_file(again, tmp_path / second)
    with pytest.raises(ValueError, match=rf"lm_head\.weight: duplicate, in {first} and {second}"):
        hf_weights.load(tmp_path, LLAMA)

    write(tmp_path, values, files=2)
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.other"] = first
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"2 disagree") as error:
        hf_weights.load(tmp_path, LLAMA)
    assert f"model.other: the index says {first}, which lacks it" in str(error.value)
    assert f"model.norm.weight: in {second}, and the index says nothing of it" in str(error.value)

    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError, match=rf"names 1 of 2 files that are missing: {second}"):
        hf_weights.load(tmp_path, LLAMA)
    path.write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        hf_weights.load(tmp_path, LLAMA)


def broken(folder: Path, change) -> Path:
    write(folder, tensors(LLAMA))
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    return folder


def with_header(change):
    """The file with its parsed header changed."""

    def apply(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], "is truncated: [0-9,]+ bytes, and its header asks for"),
        (lambda data: data[:100], "is truncated: 100 bytes, of which the header alone"),
        (lambda data: data + b"x", "is longer than its header says"),
        (lambda data: data[:4], "its first 8 bytes give a header of 0 bytes"),
        (lambda data: b"", "is empty"),
        (lambda data: b"PK\x03\x04" + data, "is no safetensors file"),
        (lambda data: data[:8] + b"?" * (len(data) - 8), "its header can't be read"),
        (lambda data: b"\n<!DOCTYPE html><html>" + data, "is a web page"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (with_header(lambda h: h["lm_head.weight"].update(shape=[16, 47])), r"lm_head.weight, F32\[16, 47\], is said"),
        (with_header(lambda h: h.pop("lm_head.weight")), "is corrupt"),
        (with_header(lambda h: h["lm_head.weight"].pop("dtype")), "its header can't be read"),
        (with_header(lambda h: h["lm_head.weight"].update(data_offsets=[0])), "its header can't be read"),
    ],
)
def test_a_broken_file_is_named(change, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        hf_weights.load(broken(tmp_path, change), LLAMA)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_other_formats_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for model\.safetensors and model\.safetensors\.index\.json\."):
        hf_weights.load(tmp_path, LLAMA)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "consolidated.00.pth").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"found consolidated\.00\.pth, pytorch_model\.bin; other formats"):
        hf_weights.load(tmp_path, LLAMA)
