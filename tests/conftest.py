"""What every test session sets before jax is imported: one platform, one compilation cache, no display."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tto_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("MPLBACKEND", "Agg")

# `configs` is no installed package: it lies beside `tests`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
