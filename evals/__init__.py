"""Evaluation programs, run against checkpoints: `python -m evals.<name> --checkpoint=...`."""

import nanollama  # noqa: F401  # it sets what must be set before jaxlib is loaded
