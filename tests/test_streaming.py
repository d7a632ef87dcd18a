"""Importing, extending and exporting a model holds about one of its parameters in memory, never the model."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from packed_sets import make_tokenizer
from test_initial import random_run

from nanollama.config import ModelConfig
from nanollama.export.add_tokens import extend
from nanollama.export.huggingface import export
from nanollama.export.import_huggingface import import_model
from nanollama.export.weights import parameter_shapes

MODEL = ModelConfig(
    vocab_size=3000, hidden_size=512, intermediate_size=1024, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=64
)
LARGEST = max(4 * int(np.prod(shape)) for shape in parameter_shapes(MODEL).values())
WHOLE = sum(4 * int(np.prod(shape)) for shape in parameter_shapes(MODEL).values())
SLACK = 3 << 20  # headers, JSON, the library's own buffers


def peak(work: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy hold at one time while `work` is done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_one_parameter_at_a_time(tmp_path: Path) -> None:
    assert WHOLE > 2 * (2 * LARGEST + SLACK), "the model is too small to show anything"
    random_run(tmp_path / "run", make_tokenizer(tmp_path / "tokenizer"), MODEL)
    quiet = dict(say=lambda line: None)
    for name, work in {
        "export": lambda: export(tmp_path / "run", tmp_path / "out", shard_bytes=4 << 20),
        "import": lambda: import_model(tmp_path / "out", tmp_path / "again", **quiet),
        "add_tokens": lambda: extend(tmp_path / "again", tmp_path / "more", **quiet),
    }.items():
        used = peak(work)
        print(f"{name}: peak {used / 2**20:.1f} MiB, largest parameter {LARGEST / 2**20:.1f}, all {WHOLE / 2**20:.1f}")
        assert used <= 2 * LARGEST + SLACK, name
    assert peak(lambda: [np.ones(WHOLE // 4, np.float32)]) > 2 * LARGEST + SLACK, "the measure sees a whole model"
    assert len(list((tmp_path / "out").glob("model-*"))) > 3

