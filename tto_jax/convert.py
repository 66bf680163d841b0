"""Convert: python -m tto_jax.convert, in one of three ways

--from_hf=DIR --to=CKPT                                    a Hugging Face directory -> a checkpoint to start runs from
--from=CKPT_OR_WORKDIR --to_hf=DIR [--step=N] [--dtype=bfloat16]        that, or a run -> a Hugging Face directory
--check_hf=DIR --tokens=TOKENS.npy --logits=OUT.npy [--dtype=bfloat16]  our logits f32[N,T,V] of tokens i32[N,T]

--dtype: of the exported tensors (default: that of the original), or what the logits are computed in (default: float32).
Nothing is overwritten but OUT.npy; a conversion that is killed leaves nothing at its target.
"""

import contextlib
import functools
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from tto_jax import checkpoint, host, pretrained
from tto_jax.core import token_tree
from tto_jax.metrics import Progress
from tto_jax.models import decoder, hf_config, hf_weights
from tto_jax.models.config import DTYPES, ModelConfig

_FLAGS = {
    name: flags.DEFINE_string(name, None, text)
    for name, text in {
        "from_hf": "Hugging Face directory to import.",
        "to": "Where the imported checkpoint goes.",
        "from": "Checkpoint of this page, or workdir of a run, to export.",
        "to_hf": "Where the exported Hugging Face directory goes.",
        "check_hf": "Hugging Face directory (or checkpoint, or workdir) to compute logits of.",
        "tokens": "NumPy file of token ids i32[N,T].",
        "logits": "NumPy file to write: f32[N,T,V].",
    }.items()
}
_DTYPE = flags.DEFINE_enum("dtype", None, hf_config.DTYPES, "Of exported tensors, or of the computation of logits.")
_STEP = flags.DEFINE_integer("step", None, "Of a workdir: which checkpoint; default: the last.", allow_override=True)

_MODES = (("from_hf", "to"), ("from", "to_hf"), ("check_hf", "tokens", "logits"))
_CHUNK = 512  # positions whose logits are on the device at a time


def main(argv):
    """The page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option is a flag")
    given = tuple(name for name, flag in _FLAGS.items() if flag.value is not None)
    if given not in _MODES:
        modes = " | ".join(" ".join(f"--{name}" for name in mode) for mode in _MODES)
        raise app.UsageError(f"got {' '.join(f'--{name}' for name in given) or 'nothing'}; give one of: {modes}")
    mode = given[0]
    if mode == "from_hf" and _DTYPE.value:
        raise app.UsageError(f"--dtype={_DTYPE.value}: imported parameters are float32, always")
    if mode != "from" and _STEP.value is not None:
        raise app.UsageError(f"--step={_STEP.value} belongs to --from")
    if mode == "check_hf" and _DTYPE.value not in (None, *DTYPES):
        raise app.UsageError(f"--dtype={_DTYPE.value}: logits can be computed in one of {DTYPES}")
    host.set_up()
    paths = [_FLAGS[name].value for name in given]
    if mode == "from_hf":
        import_hf(*paths)
    elif mode == "from":
        export_hf(*paths, dtype=_DTYPE.value, step=_STEP.value)
    else:
        check_hf(*paths, dtype=_DTYPE.value or "float32")


def import_hf(source: str, target: str) -> None:
    """A Hugging Face directory -> `target/{params,info.json,hf}`.

    Raises FileExistsError if `target` isn't empty, and what `pretrained.find` and `hf_weights.load` raise.
    """
    begin, start = time.perf_counter(), pretrained.find(source)
    if start.kind != "hf":
        raise ValueError(f"--from_hf={source} is no Hugging Face directory, but of this library already: {start.kind}.")
    model, dtype = start.model_config(), start.dtype()
    with _new_directory(target) as folder, _progress(model, "convert, %") as progress:
        params = hf_weights.load(source, model, _host_sharding(), on_progress=progress)
        info = {"source": Path(source).absolute().name, "dtype": dtype, "parameters": _count(model)}
        checkpoint.save_params(folder, params, info)
        pretrained.copy_small_files(start, folder / pretrained.SMALL)
    _say(target, model, f"float32 (stored as {dtype})", begin)


def export_hf(source: str, target: str, dtype: str | None = None, step: int | None = None) -> None:
    """A checkpoint or a run -> a Hugging Face directory with safetensors of `dtype` (default: the original's).

    Raises FileExistsError if `target` isn't empty, and what `pretrained.find`, `load` and `hf_weights.save` raise.
    """
    begin, start = time.perf_counter(), pretrained.find(source)
    if start.kind == "hf":
        raise ValueError(f"--from={source} is a Hugging Face directory already.")
    model, dtype = start.model_config(), dtype or start.dtype()
    config = hf_config.to_hf(model, dtype, start.hf_config)
    with _new_directory(target) as folder, _progress(model, "convert, %") as progress:
        params = start.load(model, _host_sharding(), step)
        pretrained.copy_small_files(start, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        hf_weights.save(folder, model, params, dtype=dtype, on_progress=progress)
    _say(target, model, dtype, begin)


def check_hf(source: str, tokens: str, logits: str, dtype: str = "float32") -> None:
    """Writes f32[N,T,V], the logits of the model in `source` for `tokens` i32[N,T], computed in `dtype`.

    Row by row: [N,T,V] is never in memory. Raises ValueError if the tokens are not ids [N,T] of the model.
    """
    begin, start = time.perf_counter(), pretrained.find(source)
    model = start.model_config(dtype)
    ids = read_tokens(tokens, model)
    params = start.load(model)
    out = Path(logits)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    rows, length = ids.shape
    try:
        written = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.float32, shape=(rows, length, model.vocab_size)
        )
        with Progress(rows, name="rows") as progress, jax.default_matmul_precision("highest"):
            for row in range(rows):
                hidden = _hidden(model, params, ids[row])
                for at in range(0, length, _CHUNK):
                    written[row, at : at + _CHUNK] = _logits(model, params, hidden[at : at + _CHUNK])
                progress.update(row + 1, {})
        written.flush()
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    _say(logits, model, f"f32{[rows, length, model.vocab_size]} computed in {dtype}", begin)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: ModelConfig, params, tokens):
    """i32[T] -> [T,M]."""
    rows = token_tree.sequences(tokens[None], jnp.array([tokens.size]), jnp.zeros((1, tokens.size), bool))
    return decoder.forward_rows(model, params, rows)[0]


_logits = jax.jit(decoder.logits, static_argnums=0)


def read_tokens(path: str, model: ModelConfig) -> np.ndarray:
    """Token ids i32[N,T] of a NumPy file. Raises ValueError, naming the file, if they are not ids of `model`."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--tokens={path} is no NumPy file of an array ({error}).") from error
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"--tokens={path} holds several arrays: save one i32[N,T] with np.save.")
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise ValueError(f"--tokens={path} is {tokens.dtype}{list(tokens.shape)}: it must be i32[N,T], not empty.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.vocab_size:
        raise ValueError(
            f"--tokens={path} holds ids from {low} to {high}; those of the model are 0 to {model.vocab_size - 1}."
        )
    if tokens.shape[1] > model.max_position:
        raise ValueError(
            f"--tokens={path} has rows of {tokens.shape[1]} tokens; the model's context is {model.max_position}."
        )
    return tokens.astype(np.int32)


@contextlib.contextmanager
def _new_directory(target: str) -> Iterator[Path]:
    """Name of a folder to make beside `target`, which takes its place when the block ends well, and else is removed."""
    target = Path(os.path.abspath(os.path.expanduser(target)))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory: choose another, nothing is overwritten.")
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _progress(model: ModelConfig, name: str) -> Iterator[Callable[[int], None]]:
    total = _count(model)
    with Progress(100, name=name) as progress:
        yield lambda done: progress.update(100 * done // total, {"parameters": f"{done:,}"})


def _host_sharding() -> jax.sharding.Sharding:
    """Conversions need no accelerator: parameters stay in the host's memory wherever JAX has a CPU backend."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def _count(model: ModelConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(hf_weights.abstract_params(model)))


def _say(target: str, model: ModelConfig, what: str, begin: float) -> None:
    print(f"{target}: {_count(model):,} parameters, {what}, {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    app.run(main)
