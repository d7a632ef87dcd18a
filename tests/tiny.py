"""A model small enough to compile in seconds, and batches for it. Shared by the tests of training."""

import dataclasses
from typing import Any

import numpy as np

from nanollama.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PackedSetConfig,
)

LENGTH = 32
MODEL = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
# One layer per scan iteration compiles in half the time; chunks smaller than a row, so that chunking is exercised.
COMPUTE = ComputeConfig(scan_unroll=1, loss_chunk_tokens=128)


def tiny_config(rows: int = 8, micro_batches: int = 1, **changes: Any) -> Config:
    """Constant learning rate, AdamW, one device, unless `changes` says otherwise."""
    config = Config(
        name="tiny",
        steps=1000,
        model=MODEL,
        data=DataConfig((PackedSetConfig("absent"),), "absent", LENGTH),
        batch=BatchConfig(rows, micro_batches),
        compute=COMPUTE,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    return dataclasses.replace(config, **changes)


def random_batch(seed: int, rows: int = 8, length: int = LENGTH, vocab: int = MODEL.vocab_size) -> dict[str, np.ndarray]:
    """Random tokens in two segments a row; between 10 % and 100 % of a row's targets have a weight."""
    random = np.random.default_rng(seed)
    cut = random.integers(1, length, (rows, 1))
    index = np.arange(length, dtype=np.int32)[None]
    start = np.where(index < cut, 0, cut).astype(np.int32)
    share = random.uniform(0.1, 1.0, (rows, 1))
    weights = (random.random((rows, length)) < share).astype(np.float32)
    weights[:, 0] = 1.0  # every row has a loss token
    return {
        "tokens": random.integers(0, vocab, (rows, length), dtype=np.int32),
        "targets": random.integers(0, vocab, (rows, length), dtype=np.int32),
        "weights": weights,
        "positions": (index - start).astype(np.int32),
        "first_key": start,
    }
