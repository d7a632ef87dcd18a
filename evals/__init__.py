"""Evaluation programs, run against checkpoints: `python -m evals.<name> --checkpoint=...`."""
