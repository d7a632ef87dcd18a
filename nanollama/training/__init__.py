"""State, optimizers, the train step, checkpoints and metrics."""
