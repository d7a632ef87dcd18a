"""One JAX for all tests: eight virtual CPU devices, elastic runs' thread pool, one compilation cache."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))

from nanollama.parallel import backend

backend.start(elastic=True, devices=8)
