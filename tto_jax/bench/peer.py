"""A peer in a process of its own, so that its memory, its CPU time and its libraries are its own. No jax here.

`Peer` starts `python -m tto_jax.bench.peer_NAME --option=value ...`, which calls `serve` and answers one JSON line a
request. What each peer does is in its module.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tto_jax.bench import memory, threads


class Peer:
    """The page's end. A context manager: the process ends with it."""

    def __init__(self, name: str, arrays: Mapping[str, np.ndarray], platform: str, **options):
        """Args: name: of the module. arrays: given by file. platform: `cpu`, or where our side runs."""
        self._name, self._folder = name, tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "arrays.npz"
        np.savez(file, **arrays)
        options |= {"arrays": file, "device": "cpu" if platform == "cpu" else "cuda", "threads": threads.available()}
        command = [sys.executable, "-m", f"tto_jax.bench.peer_{name}"]
        command += [f"--{option}={value}" for option, value in options.items()]
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self._said = open(Path(self._folder.name) / "said", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(command, **pipes, stderr=self._said, text=True, env=_environment(platform))
        self.versions: dict[str, str] = {}
        self.last: dict[str, float] = {}  # its answer to the last `work`: its CPU seconds, and what it found

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

    def work(self) -> None:
        """Does once what is measured."""
        self.last = self._ask({"do": "work"})

    def clock(self) -> float:
        """CPU seconds of the process, up to the end of its last `work`."""
        return self.last.get("cpu_s", 0.0)

    def reset(self) -> None:
        """The peak begins at what is held now."""
        self._ask({"do": "reset"})

    def peak(self) -> tuple[int, str]:
        """Largest number of bytes that it held since `reset`, and how that is known."""
        return tuple(self._ask({"do": "peak"})["peak"])

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probs at temperature 1 of the last tokens of sequences i32[N,L], as many as it samples or trains."""
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
            said = self._said.read().strip()[-2000:] or "it said nothing"
            raise RuntimeError(f"--peer={self._name} ended: {said}")
        return json.loads(line)


def _environment(platform):
    """Ours; on CPU with the allocator's settings of `host.keep_freed_memory`, which our side has."""
    kept = {"MALLOC_MMAP_MAX_": 0, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1, "MALLOC_TOP_PAD_": 64 * 2**20}
    return os.environ | ({name: str(value) for name, value in kept.items()} if platform == "cpu" else {})


def torch_peak(device: str) -> dict[str, Callable[[], dict]]:
    """What `serve` answers about the memory of a device, of a peer in torch; nothing on a CPU."""
    if device == "cpu":
        return {}
    import torch

    return {
        "reset": lambda: torch.cuda.reset_peak_memory_stats() or {},
        "peak": lambda: {"peak": (torch.cuda.max_memory_allocated(), "torch.cuda")},
    }


def serve(
    load: Callable[[argparse.Namespace, Mapping[str, np.ndarray]], Mapping[str, Callable[..., dict]]],
    kinds: Mapping[str, type],
    libraries: Sequence[str],
) -> None:
    """The peer's end: load, say the versions, then answer until the input ends.

    Args:
      load: options and arrays -> the requests it answers: `work`, `logprobs`, and `reset` and `peak` where its memory
        is not this process's.
      kinds: its own options. libraries: whose versions are said.
    """
    parser = argparse.ArgumentParser(description="Started by python -m tto_jax.bench TARGET --peer=NAME")
    for name, kind in {**kinds, "arrays": str, "device": str, "threads": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    flags = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    requests = _own_memory() | load(flags, np.load(flags.arrays))
    versions = {name: importlib.metadata.version(name) for name in libraries}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(requests[request.pop("do")](**request)), file=answers, flush=True)


def _own_memory():
    was_reset = []

    def reset():
        was_reset.append(memory.reset())
        return {}

    return {"reset": reset, "peak": lambda: {"peak": memory.peak(was_reset[-1])}}
