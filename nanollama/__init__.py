"""nanollama: train language models in JAX, from raw text to a model you can talk to."""

import os
import sys

__version__ = "0.1.0"

if sys.version_info < (3, 12):
    # jaxlib 0.10.1, the newest for Python 3.11, prints two long "errors" for every program it takes from its
    # own compilation cache (openxla/xla#44565, harmless). It reads this when it is loaded. XLA's real errors
    # arrive as Python exceptions all the same; set the variable to 0 to see everything.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
