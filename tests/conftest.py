"""What every test session sets before jax is imported: one platform, one compilation cache, no display."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):  # for meshes; others use the first
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
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
