"""nanollama: train language models in JAX, from raw text to a model you can talk to."""

__version__ = "0.1.0"
