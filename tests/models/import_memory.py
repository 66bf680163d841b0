"""Peak of anonymous memory while a checkpoint is imported: python tests/models/import_memory.py FOLDER [--bytes=1e9]

Makes a random Qwen2 checkpoint in FOLDER (unless one is there), loads it on 8 virtual CPU devices, every matrix sharded
over all of them, biases and norms replicated, and samples RssAnon of /proc/self/status meanwhile. Exits with 1 if the
peak is above the start by more than the arrays' bytes + 2 of the checkpoint's largest tensors (+ --allowance bytes).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

LAYERS, HEAD = 8, 64


def config(parameters: float) -> dict:
    """A config.json of about that many parameters: an MLP 6 times as wide, 1 KV head for 4, an untied head."""
    per_layer = 3 * 6 + 2.5
    hidden = 256 * max(1, int(math.sqrt(parameters / (LAYERS * per_layer + 16)) / 256))
    vocabulary = int((parameters - LAYERS * per_layer * hidden**2) / (2 * hidden)) // 8 * 8
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 6,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def make(folder: Path, total: float, dtype: str) -> None:
    """A checkpoint of about `total` bytes, a file a layer; written by numpy and safetensors, none of the library."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    dtype = np.dtype({"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype])
    hf = config(total / dtype.itemsize) | {"torch_dtype": dtype.name}
    hidden, mlp, kv = hf["hidden_size"], hf["intermediate_size"], hf["num_key_value_heads"] * HEAD
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, size in (("q", hidden), ("k", kv), ("v", kv)):
        layer |= {f"self_attn.{name}_proj.weight": (size, hidden), f"self_attn.{name}_proj.bias": (size,)}
    layer |= {"self_attn.o_proj.weight": (hidden, hidden), "mlp.down_proj.weight": (hidden, mlp)}
    layer |= {"mlp.gate_proj.weight": (mlp, hidden), "mlp.up_proj.weight": (mlp, hidden)}
    files = [{f"model.layers.{i}.{name}": shape for name, shape in layer.items()} for i in range(LAYERS)]
    files.append({"model.embed_tokens.weight": (hf["vocab_size"], hidden), "model.norm.weight": (hidden,)})
    files.append({"lm_head.weight": (hf["vocab_size"], hidden)})
    folder.mkdir(parents=True, exist_ok=True)
    rng, index = np.random.default_rng(0), {}
    for number, shapes in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {n: rng.standard_normal(s, dtype=np.float32).astype(dtype) for n, s in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(hf))


def resident() -> int:
    """Anonymous memory of this process that is resident, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak(threading.Thread):
    """The largest `resident()` while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.value, self._stop_now = resident(), threading.Event()

    def run(self):
        while not self._stop_now.wait(0.001):
            self.value = max(self.value, resident())

    def stop(self) -> int:
        self._stop_now.set()
        self.join()
        return max(self.value, resident())


def measure(folder: Path, allowance: float) -> bool:
    """Loads, prints the figures, and says whether the limit was kept."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tto_jax.models import hf_config, hf_weights

    mesh = Mesh(jax.devices(), ("fsdp",))
    model = hf_config.model_config(json.loads((folder / "config.json").read_text()))

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("kernel"):
            row_parallel = name in ("layers.attention.out.kernel", "layers.down.kernel", "lm_head.kernel")
            axes = (None, "fsdp") if row_parallel else ("fsdp", None)
            return NamedSharding(mesh, PartitionSpec(*([None] * (leaf.ndim - 2)), *axes))
        return NamedSharding(mesh, PartitionSpec("fsdp") if name == "embed.embedding" else PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(sharding, hf_weights.abstract_params(model))
    stored = hf_weights.read_headers(folder).values()
    largest = max(math.prod(x.shape) * hf_weights.DTYPES[x.dtype].itemsize for x in stored)
    checkpoint = sum(math.prod(x.shape) * hf_weights.DTYPES[x.dtype].itemsize for x in stored)
    start, peak, begin = resident(), Peak(), time.perf_counter()
    peak.start()
    params = jax.block_until_ready(hf_weights.load(folder, model, shardings))
    seconds, top = time.perf_counter() - begin, peak.stop() - start
    arrays = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    limit = arrays + 2 * largest + allowance
    print(
        f"checkpoint {checkpoint / 1e6:.1f} MB, arrays {arrays / 1e6:.1f} MB on {len(jax.devices())} devices, largest "
        f"tensor {largest / 1e6:.1f} MB; peak over start {top / 1e6:.1f} MB = arrays + {(top - arrays) / 1e6:.1f} MB "
        f"({(top - arrays) / largest:.2f} largest tensors), limit {limit / 1e6:.1f} MB, ratio {top / limit:.3f}; "
        f"{seconds:.1f} s"
    )
    return top <= limit


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--allowance", type=float, default=0.0, help="bytes beside: see the test of the small size")
    parser.add_argument("--make_only", action="store_true")
    given = parser.parse_args()
    if given.make_only:
        make(given.folder, given.bytes, given.dtype)
        return 0
    if not (given.folder / "config.json").exists():  # in another process: its memory is not this one's
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make_only"], check=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    return 0 if measure(given.folder, given.allowance) else 1


if __name__ == "__main__":
    sys.exit(main())
