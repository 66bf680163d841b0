"""transformers' `generate` in a process of its own, so that memory and CPU time are its own. No jax here.

The page starts `python -m tto_jax.bench.peer --model=DIR ...`, which answers one JSON line a command.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tto_jax.bench import memory, threads


class Peer:
    """The page's end. A context manager: the process ends with it."""

    def __init__(self, model: str, prompts: np.ndarray, new: int, dtype: str, platform: str):
        """Args: model: a Hugging Face directory. prompts: i32[N,P], full. platform: `cpu`, or where our side runs."""
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "prompts.npy"
        np.save(file, prompts)
        command = [sys.executable, "-m", "tto_jax.bench.peer", f"--model={model}", f"--prompts={file}", f"--new={new}"]
        command += [f"--dtype={dtype}", f"--device={'cpu' if platform == 'cpu' else 'cuda'}"]
        command += [f"--threads={threads.available()}"]
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self._said = open(Path(self._folder.name) / "said", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(command, **pipes, stderr=self._said, text=True, env=_environment(platform))
        self.versions: dict[str, str] = {}
        self._cpu = 0.0

    def __enter__(self) -> "Peer":
        try:
            self.versions = self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate()
        self._said.close()
        self._folder.cleanup()

    def generate(self) -> None:
        """Samples all rows once."""
        self._cpu = self._ask({"do": "generate"})["cpu_s"]

    def clock(self) -> float:
        """CPU seconds of the process, up to the end of its last `generate`."""
        return self._cpu

    def reset(self) -> None:
        """The peak begins at what is held now."""
        self._ask({"do": "reset"})

    def peak(self) -> tuple[int, str]:
        """Largest number of bytes that it held since `reset`, and how that is known."""
        return tuple(self._ask({"do": "peak"})["peak"])

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probs at temperature 1 of the last `new` tokens of sequences i32[N,P+new]."""
        file = Path(self._folder.name) / "tokens.npy"
        np.save(file, tokens)
        return np.asarray(self._ask({"do": "logprobs", "tokens": str(file)})["logprobs"])

    def _ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            raise RuntimeError(f"--peer=transformers ended: {self._said.read().strip()[-2000:] or 'it said nothing'}")
        return json.loads(line)


def _environment(platform):
    """Ours; on CPU with the allocator's settings of `host.keep_freed_memory`, which our side has."""
    kept = {"MALLOC_MMAP_MAX_": 0, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1, "MALLOC_TOP_PAD_": 64 * 2**20}
    return os.environ | ({name: str(value) for name, value in kept.items()} if platform == "cpu" else {})


def main(argv: Sequence[str] | None = None) -> None:
    """The peer's end: load, say the versions, then answer until the input ends."""
    parser = argparse.ArgumentParser(description="Started by python -m tto_jax.bench rollout --peer=transformers")
    for name, kind in {"model": str, "prompts": str, "new": int, "dtype": str, "device": str, "threads": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    flags = parser.parse_args(argv)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    work = _load(flags)
    print(json.dumps(_versions()), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(work[request.pop("do")](**request)), file=answers, flush=True)


def _versions():
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def _load(flags):
    """The commands: name -> function."""
    import torch
    import transformers

    torch.set_num_threads(flags.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype))
    model = model.to(flags.device).eval()
    model.generation_config = transformers.GenerationConfig(  # no stop token: every row has all its tokens
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=flags.new, pad_token_id=0
    )
    prompts = torch.from_numpy(np.load(flags.prompts)).long().to(flags.device)

    @torch.inference_mode()
    def generate():
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts))
        if out.shape != (prompts.shape[0], prompts.shape[1] + flags.new):
            raise RuntimeError(f"generate gave {tuple(out.shape)}: not {flags.new} tokens for each of {prompts.shape}")
        if flags.device != "cpu":
            torch.cuda.synchronize()
        return {"cpu_s": time.process_time()}

    @torch.inference_mode()
    def logprobs(tokens):
        tokens = torch.from_numpy(np.load(tokens)).long().to(flags.device)
        logits = model(tokens).logits[:, -flags.new - 1 : -1].float()
        found = torch.log_softmax(logits, -1).gather(-1, tokens[:, -flags.new :, None])[..., 0]
        return {"logprobs": found.tolist()}

    def reset():
        if flags.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        was_reset.append(memory.reset())
        return {}

    def peak():
        if flags.device != "cpu":
            return {"peak": (torch.cuda.max_memory_allocated(), "torch.cuda")}
        return {"peak": memory.peak(was_reset[-1])}

    was_reset = []
    return {"generate": generate, "logprobs": logprobs, "reset": reset, "peak": peak}


if __name__ == "__main__":
    main()
