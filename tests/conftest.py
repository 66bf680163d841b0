"""What every test session sets before jax is imported: one platform, one compilation cache, no display."""

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_FLAGS = {
    "xla_force_host_platform_device_count": 8,  # for meshes; other tests use the first
    # The threads of virtual devices share few cores. Where others use them too, one can wait longer for its turn than
    # the 40 s after which XLA ends the process.
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
}
given = os.environ.get("XLA_FLAGS", "")
missing = [f"--{name}={value}" for name, value in XLA_FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tto_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("MPLBACKEND", "Agg")

# `configs` is no installed package: it lies beside `tests`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real problems and a real tokenizer, which are not part of the repository."""
    folder = Path(os.environ.get("TTO_TEST_DATA", ""))
    if not (folder / "tokenizers").is_dir():
        pytest.skip("set TTO_TEST_DATA to a folder with deepscaler, gsm8k and tokenizers: not tested on real data")
    return folder


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Drops a module's compiled programs: each maps memory, and a process that has 65,530 maps (Linux) is aborted."""
    yield
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.clear_caches()
        gc.collect()
