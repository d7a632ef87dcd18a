"""Pallas kernels for GPUs, and what chooses their tiles. Import only jax and numpy."""
