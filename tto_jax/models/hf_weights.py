"""Weights of Hugging Face checkpoints (Qwen2, Qwen3, Llama) in and out: one table, used in both directions.

Reading streams: headers first, where every disagreement is found, then tensor by tensor from memory-mapped files into
arrays that are sharded from the start. Names and layouts are those that `transformers` saves (`*ForCausalLM`).
"""

import collections
import dataclasses
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params

KEEP, TRANSPOSE = (
    "keep",
    "transpose",
)  # a linear layer is [out, in] there and [in, out] here; norms and tables are alike

# A tensor's name there, the parameter's path here, and how one becomes the other (each is its own inverse).
# (\d+) is the layer, which is the index on the first axis of the parameter.
TABLE = (
    (r"model\.embed_tokens\.weight", "embed.embedding", KEEP),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", "layers.attention_norm.scale", KEEP),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight", "layers.attention.q.kernel", TRANSPOSE),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.bias", "layers.attention.q.bias", KEEP),
    (r"model\.layers\.(\d+)\.self_attn\.q_norm\.weight", "layers.attention.q_norm.scale", KEEP),
    (r"model\.layers\.(\d+)\.self_attn\.k_proj\.weight", "layers.attention.k.kernel", TRANSPOSE),
    (r"model\.layers\.(\d+)\.self_attn\.k_proj\.bias", "layers.attention.k.bias", KEEP),
    (r"model\.layers\.(\d+)\.self_attn\.k_norm\.weight", "layers.attention.k_norm.scale", KEEP),
    (r"model\.layers\.(\d+)\.self_attn\.v_proj\.weight", "layers.attention.v.kernel", TRANSPOSE),
    (r"model\.layers\.(\d+)\.self_attn\.v_proj\.bias", "layers.attention.v.bias", KEEP),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", "layers.attention.out.kernel", TRANSPOSE),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", "layers.mlp_norm.scale", KEEP),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight", "layers.gate.kernel", TRANSPOSE),
    (r"model\.layers\.(\d+)\.mlp\.up_proj\.weight", "layers.up.kernel", TRANSPOSE),
    (r"model\.layers\.(\d+)\.mlp\.down_proj\.weight", "layers.down.kernel", TRANSPOSE),
    (r"model\.norm\.weight", "norm.scale", KEEP),
    (r"lm_head\.weight", "lm_head.kernel", TRANSPOSE),
)

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


# The table, both ways ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor of a checkpoint belongs: a parameter, or one layer of it."""

    path: str
    layer: int | None
    transform: str


def slots_of(name: str) -> list[Slot]:
    """All places that the table gives to a checkpoint's tensor: one if the name is known."""
    found = []
    for pattern, path, transform in TABLE:
        if match := re.fullmatch(pattern, name):
            found.append(Slot(path, int(match[1]) if match.groups() else None, transform))
    return found


def names_of(path: str, num_layers: int) -> list[str]:
    """Names of the tensors that make up a parameter, by layer; empty if the table lacks it."""
    for pattern, its_path, _ in TABLE:
        if its_path == path:
            name = pattern.replace(r"\.", ".")
            return [name.replace(r"(\d+)", str(i)) for i in range(num_layers)] if r"(\d+)" in name else [name]
    return []


def abstract_params(config: ModelConfig) -> Params:
    """The parameters of `config` as a nested dict of `jax.ShapeDtypeStruct` (float32)."""
    return jax.eval_shape(lambda: decoder.init_params(config, 0))


def _flat(tree: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep=".")


def _expected(config: ModelConfig) -> dict[Slot, tuple[str, tuple[int, ...]]]:
    """Every tensor that a checkpoint of `config` has: slot -> (name, shape there), embeddings, layers, norm, head.

    Raises ValueError if a parameter has no name there.
    """
    flat = _flat(abstract_params(config))
    nameless = sorted(path for path in flat if not names_of(path, config.num_layers))
    if nameless:
        raise ValueError(
            f"Hugging Face checkpoints of Qwen2, Qwen3 and Llama have no tensor for {', '.join(nameless)} "
            "(model.learned_positions is an option of the embedded tasks)."
        )
    tensors = {}
    for path, leaf in flat.items():
        for name in names_of(path, config.num_layers):
            (slot,) = slots_of(name)
            shape = leaf.shape if slot.layer is None else leaf.shape[1:]
            tensors[slot] = name, shape[::-1] if slot.transform == TRANSPOSE else shape
    rows = [path for _, path, _ in TABLE]

    def order(slot: Slot) -> tuple:
        row = rows.index(slot.path)
        return (1, slot.layer, row) if slot.layer is not None else (2 if row else 0, 0, row)

    return {slot: tensors[slot] for slot in sorted(tensors, key=order)}


# Files ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file: dtype as the file names it, shape, and where its bytes begin."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def open(self) -> np.ndarray:
        """The tensor as a read-only view of the mapped file: nothing is read before it is used."""
        dtype = DTYPES[self.dtype]
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)
        return np.ndarray(self.shape, dtype, buffer=_mapped(self.file), offset=self.begin)


def _mapped(file: Path) -> mmap.mmap:
    with open(file, "rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def what_it_is_instead(file: Path) -> str | None:
    """Says what a file of a checkpoint is if it isn't what its name says: a Git LFS pointer, a web page, empty."""
    with file.open("rb") as handle:
        start = handle.read(200)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull` or `hf download`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not the file itself: the download went wrong, repeat it"
    return None if start else "is empty: the download went wrong, repeat it"


def read_header(file: Path) -> dict[str, Stored]:
    """Tensors of one safetensors file, by name; the file's size must be what its header says.

    Raises ValueError, naming the file and what is wrong: truncated, a Git LFS pointer, a web page, not safetensors.
    """
    if instead := what_it_is_instead(file):
        raise ValueError(f"{file} {instead}.")
    size = file.stat().st_size
    with open(file, "rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise ValueError(f"{file} is no safetensors file (its first 8 bytes give a header of {length} bytes).")
        if length > size - 8:
            raise ValueError(f"{file} is truncated: {size:,} bytes, of which the header alone would be {length:,}.")
        text = handle.read(length)
    try:
        entries = _entries(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no safetensors file: its header can't be read ({error!r}).") from error
    found, at = {}, 0
    for begin, end, name, dtype, shape in entries:
        if begin != at or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
            raise ValueError(
                f"{file} is corrupt: {name}, {dtype}{list(shape)}, is said to lie at bytes {begin} to {end}."
            )
        found[name], at = Stored(file, dtype, shape, 8 + length + begin), end
    if size != 8 + length + at:
        what = "truncated" if size < 8 + length + at else "longer than its header says"
        raise ValueError(f"{file} is {what}: {size:,} bytes, and its header asks for {8 + length + at:,}.")
    return found


def _entries(header: dict) -> list[tuple[int, int, str, str, tuple[int, ...]]]:
    """(begin, end, name, dtype, shape) of a header, by begin; the format leaves no holes between tensors."""
    entries = []
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = map(int, entry["data_offsets"])
            entries.append((begin, end, name, str(entry["dtype"]), tuple(map(int, entry["shape"]))))
    return sorted(entries)


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint, and the index's name -> file (None for a single file).

    Raises FileNotFoundError if there are none, or if the index names files that are missing; ValueError if the index
    can't be read.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], None
    index = directory / INDEX
    if not index.is_file():
        there = sorted(x.name for x in directory.iterdir()) if directory.is_dir() else []
        other = [name for name in there if name.endswith((".bin", ".pth", ".pt", ".gguf", ".safetensors"))]
        raise FileNotFoundError(
            f"{directory} holds no weights that can be read: looked for {SINGLE} and {INDEX}"
            + (f", found {', '.join(other[:8])}; other formats must be saved as safetensors first" if other else "")
            + "."
        )
    if instead := what_it_is_instead(index):
        raise ValueError(f"{index} {instead}.")
    try:
        names = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error!r}).") from error
    files = [directory / file for file in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(missing)} of {len(files)} files that are missing: {', '.join(missing)}."
        )
    return files, names


def read_headers(directory: str | os.PathLike) -> dict[str, Stored]:
    """All tensors of a checkpoint's directory (a local one: the files are memory-mapped), by name.

    Raises what `weight_files` and `read_header` raise, and ValueError if a name is stored twice or the index and the
    files disagree.
    """
    files, index = weight_files(Path(directory))
    found: dict[str, Stored] = {}
    wrong = []
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                wrong.append(f"{name}: duplicate, in {found[name].file.name} and {file.name}")
            elif index is not None and index.get(name) != file.name:
                wrong.append(f"{name}: in {file.name}, and the index says {index.get(name, 'nothing of it')}")
            found[name] = stored
    wrong += [f"{name}: the index says {index[name]}, which lacks it" for name in sorted((index or {}).keys() - found)]
    _raise(f"The files of the checkpoint in {directory} contradict each other", wrong)
    return found


def stored_dtype(directory: str | os.PathLike) -> str:
    """The dtype in which most bytes of a checkpoint are stored: float32, float16 or bfloat16."""
    total: dict[str, int] = {}
    for stored in read_headers(directory).values():
        if stored.dtype in DTYPES:
            dtype = DTYPES[stored.dtype]
            total[dtype.name] = total.get(dtype.name, 0) + dtype.itemsize * math.prod(stored.shape)
    if not total:
        raise ValueError(f"{directory} holds no tensor of {', '.join(DTYPES)}.")
    return max(total, key=total.__getitem__)


def _raise(what: str, wrong: list[str]) -> None:
    if wrong:
        shown = [*wrong[:50], *([f"... and {len(wrong) - 50} more"] if len(wrong) > 50 else [])]
        raise ValueError(f"{what} ({len(wrong)} disagreements):\n  " + "\n  ".join(shown))


def _check(directory, stored: dict[str, Stored], config: ModelConfig) -> dict[Slot, Stored]:
    """Each expected slot's tensor. Raises a ValueError with everything unmapped, missing, duplicate or misshapen."""
    expected = _expected(config)
    wrong, found, named = [], {}, {}
    tied_head = stored.get(_HEAD) if config.tie_embeddings else None
    for name, tensor in sorted(stored.items()):
        slots = slots_of(name)
        if tensor is tied_head:
            continue
        if len(slots) != 1:
            wrong.append(f"{name}: {'ambiguous' if slots else 'unmapped'}, {len(slots)} rows of the table match it")
        elif slots[0] not in expected:
            wrong.append(f"{name}: extra, a model of this configuration has no such tensor")
        elif slots[0] in found:
            wrong.append(f"{name}: duplicate of {named[slots[0]]}")
        else:
            found[slots[0]], named[slots[0]] = tensor, name
            if tensor.dtype not in DTYPES:
                wrong.append(f"{name}: dtype {tensor.dtype}, must be one of {', '.join(DTYPES)}")
            if tensor.shape != expected[slots[0]][1]:
                wrong.append(f"{name}: shape {list(tensor.shape)}, must be {list(expected[slots[0]][1])}")
    wrong += [f"{name}: missing" for slot, (name, _) in expected.items() if slot not in found]
    what = f"The checkpoint in {directory} is not one of the model that is configured"
    _raise(what, wrong)
    if tied_head is not None and not _same(tied_head, stored[_EMBEDDING]):
        _raise(what, [f"{_HEAD}: differs from {_EMBEDDING}, although tie_word_embeddings says that they are one"])
    return {slot: found[slot] for slot in expected}


def _same(a: Stored, b: Stored) -> bool:
    """Whether two tensors [V,M] are equal bit for bit; compared row by row of blocks, to stay small."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a_bytes, b_bytes = a.open().view(np.uint8), b.open().view(np.uint8)
    return all(np.array_equal(a_bytes[i : i + 1024], b_bytes[i : i + 1024]) for i in range(0, len(a_bytes), 1024))


# In ------------------------------------------------------------------------------------------------------------------


def load(
    directory: str | os.PathLike,
    config: ModelConfig,
    shardings=None,
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Params:
    """The parameters of a checkpoint: float32, a nested dict as of `decoder.init_params`, born sharded.

    Tensors are read from the mapped files straight into the shards, one shard after another, so that on CPU there is
    hardly more than the arrays, and elsewhere the host holds one shard at a time. Exact for bfloat16, float16, float32.

    Args:
      directory: holds safetensors, one file or several with an index. A tied checkpoint may hold its head too.
      config: what its config.json says.
      shardings: a `jax.sharding.Sharding` for all, or a tree of them like the parameters; None is the first device.
        With several processes each fills what it addresses.
      on_progress: is told now and then how many parameters are there.

    Raises:
      FileNotFoundError, ValueError: as `read_headers`; everything unmapped, missing, extra, duplicate, of another shape
        or dtype, together, before any tensor is read.
    """
    abstract = _flat(with_shardings(abstract_params(config), shardings))
    tensors: dict[str, list[tuple[Slot, Stored]]] = {path: [] for path in abstract}
    for slot, stored in _check(directory, read_headers(directory), config).items():
        tensors[slot.path].append((slot, stored))
    params, done = {}, 0
    for path, leaf in abstract.items():
        params[path] = _fill(leaf.shape, leaf.sharding, tensors[path])
        done += leaf.size
        on_progress(done)
    return traverse_util.unflatten_dict(params, sep=".")


def with_shardings(abstract: Params, shardings=None) -> Params:
    """`abstract` with a sharding on every leaf: one for all, or a tree of them; None is the first device.

    Raises ValueError if the tree isn't like the parameters, or None is given where there are several processes.
    """
    if shardings is None:
        if jax.process_count() > 1:
            raise ValueError("shardings=None: with several processes every parameter needs a sharding.")
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    if differ := sorted(_flat(shardings).keys() ^ _flat(abstract).keys()):
        raise ValueError(f"shardings must be a tree like the parameters; these paths are in one only: {differ}.")
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def _fill(shape: tuple[int, ...], sharding: jax.sharding.Sharding, tensors: list[tuple[Slot, Stored]]) -> jax.Array:
    """One parameter from its tensors, shard by shard; replicas share what is read."""
    replicas: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape))
        replicas.setdefault(part, []).append(device)
    shards = []
    for part, devices in replicas.items():
        shard = _read(tensors, part)
        shards += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read(tensors: list[tuple[Slot, Stored]], part: tuple[tuple[int, int], ...]) -> np.ndarray:
    """float32, what `part` (begin and end on each axis) of a parameter holds; only that is read."""
    shard = _page_aligned(tuple(end - begin for begin, end in part))
    for slot, stored in tensors:
        tensor = stored.open()
        tensor = tensor.T if slot.transform == TRANSPOSE else tensor
        if slot.layer is None:
            shard[...] = tensor[tuple(slice(*axis) for axis in part)]
        elif part[0][0] <= slot.layer < part[0][1]:
            shard[slot.layer - part[0][0]] = tensor[tuple(slice(*axis) for axis in part[1:])]
    return shard


def _page_aligned(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in pages of its own.

    JAX on CPU takes such memory over instead of copying it, and elsewhere it goes back to the system at once when it
    is freed: neither is so of what malloc gives.
    """
    size = 4 * math.prod(shape)
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.ndarray(shape, np.float32, buffer=pages)


# Out -----------------------------------------------------------------------------------------------------------------


def save(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    *,
    dtype: str,
    max_shard_bytes: int = 5 * 10**9,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes safetensors into `directory` (created if absent): one file, or shards and, last of all, their index.

    The host holds one tensor at a time. Until the last rename nothing there can be loaded. A tied head is not written,
    as `transformers` does it. With several processes all call, the first writes.

    Args:
      directory: local; may hold other files, but no safetensors.
      config: of the parameters.
      params: as of `load`; sharded in any way.
      dtype: float32, bfloat16 (rounded to nearest even) or float16.
      max_shard_bytes: a tensor that is larger gets a shard of its own.
      on_progress: is told now and then how many parameters are written.

    Raises:
      FileExistsError: safetensors are there. ValueError: the parameters aren't of `config`, or a value is too large for
        float16.
    """
    codes = {x.name: code for code, x in DTYPES.items()}
    if dtype not in codes:
        raise ValueError(f"dtype={dtype!r} is unknown: choose one of {tuple(codes)}.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be at least 1.")
    expected, flat = _expected(config), _flat(params)
    _check_params(flat, _flat(abstract_params(config)))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if there := sorted(x.name for x in directory.iterdir() if x.name == INDEX or x.suffix == ".safetensors"):
        raise FileExistsError(f"{directory} holds weights already ({', '.join(there[:5])}): choose another.")
    shards = _shards(expected, DTYPES[codes[dtype]].itemsize, max_shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    done = 0
    for file, slots in zip(files, shards):
        shapes = {expected[slot][0]: expected[slot][1] for slot in slots}
        tensors = (_fetch(flat[slot.path], slot, DTYPES[codes[dtype]]) for slot in slots)
        if jax.process_index() == 0:
            _write_file(directory / file, shapes, codes[dtype], tensors)
        else:
            collections.deque(tensors, maxlen=0)  # the first process needs this one's part
        done += sum(math.prod(shape) for shape in shapes.values())
        on_progress(done)
    if len(shards) > 1 and jax.process_index() == 0:
        _write_index(directory, expected, dict(zip(files, shards)), DTYPES[codes[dtype]].itemsize)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("hf_weights.save")


def _check_params(flat: dict[str, Any], abstract: dict[str, Any]) -> None:
    wrong = [f"{path}: in one only" for path in sorted(flat.keys() ^ abstract.keys())]
    wrong += [
        f"{path}: {list(np.shape(flat[path]))}, must be {list(abstract[path].shape)}"
        for path in sorted(flat.keys() & abstract.keys())
        if tuple(np.shape(flat[path])) != abstract[path].shape
    ]
    _raise("The parameters are not those of the model that is configured", wrong)


def _shards(expected: dict[Slot, tuple], itemsize: int, limit: int) -> list[list[Slot]]:
    """Slots in order, split where a file would exceed `limit` bytes."""
    shards, room = [], 0
    for slot, (_, shape) in expected.items():
        size = math.prod(shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(slot)
        room -= size
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


@jax.jit
def _layer(stacked, index):
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def _fetch(value: jax.Array, slot: Slot, dtype: np.dtype) -> np.ndarray:
    """One tensor of a checkpoint, on the host; in a run of several processes each gets it."""
    whole = _assemble(value, slot.layer) if value.is_fully_addressable else _gather(value, slot.layer)
    with np.errstate(over="ignore"):
        tensor = (whole.T if slot.transform == TRANSPOSE else whole).astype(dtype, order="C")
    if dtype == np.float16 and np.isinf(tensor).any() and not np.isinf(whole).any():
        raise ValueError(f"{slot.path} holds {np.abs(whole).max():.6g}, which float16 can't (it ends at 65504).")
    return tensor


def _assemble(value: jax.Array, layer: int | None) -> np.ndarray:
    """From the shards, each on its own device: no sum over devices, which would flush subnormal numbers."""
    whole = np.empty(value.shape if layer is None else value.shape[1:], value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id != 0:
            continue
        if layer is None:
            whole[shard.index] = np.asarray(shard.data)
            continue
        begin, end, _ = shard.index[0].indices(value.shape[0])
        if begin <= layer < end:
            whole[shard.index[1:]] = np.asarray(_layer(shard.data, np.int32(layer - begin)))
    return whole


def _gather(value: jax.Array, layer: int | None) -> np.ndarray:
    """From all processes; all must call."""
    from jax.experimental import multihost_utils

    value = value if layer is None else _layer(value, np.int32(layer))
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def _write_file(file: Path, shapes: dict[str, tuple[int, ...]], code: str, tensors: Iterable[np.ndarray]) -> None:
    """One safetensors file: header, then tensor by tensor in the header's order; renamed when it is complete."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * DTYPES[code].itemsize
        header[name], at = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            handle.write(tensor.view(np.uint8).data)
    os.replace(temporary, file)


def _write_index(directory: Path, expected, files: dict[str, list[Slot]], itemsize: int) -> None:
    count = sum(math.prod(shape) for _, shape in expected.values())
    names = {expected[slot][0]: file for file, slots in files.items() for slot in slots}
    index = {
        "metadata": {"total_parameters": count, "total_size": count * itemsize},
        "weight_map": dict(sorted(names.items())),
    }
    temporary = directory / (INDEX + ".tmp")
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(temporary, directory / INDEX)
