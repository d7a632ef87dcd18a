"""Importing, extending and exporting a model holds about one published tensor in memory, never the model."""

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorstore
from flax.traverse_util import unflatten_dict
from packed_sets import make_tokenizer
from test_initial import random_run

from nanollama.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    PackedSetConfig,
    as_dict,
)
from nanollama.export.add_tokens import extend
from nanollama.export.huggingface import export
from nanollama.export.import_huggingface import import_model
from nanollama.export.safetensors_file import SafetensorsDirectory
from nanollama.export.weights import parameter_shapes
from nanollama.training import checkpoint, stored_parameters
from nanollama.training.checkpoint import Checkpoints, find_step_folder
from nanollama.training.integrity import checkpoint_hash

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


# --- checkpoints that training wrote: their stacked parameters are read layer by layer, expert by expert ---

MIXTURE = ModelConfig(
    family="qwen3_moe", vocab_size=400, hidden_size=64, intermediate_size=64, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=32, qk_norm=True, moe=MoeConfig(num_experts=4, experts_per_token=2, expert_size=128),
)  # fmt: skip
TABLE = 4 * 400 * 64  # bytes of embedding and of head: the largest tensors
STACKED = 4 * 3 * 4 * 64 * 128  # of all experts of all layers


class Reads(list[int]):
    """Bytes of the chunks that each read of `stored_parameters` decompresses."""

    def open(self, *arguments: Any, **options: Any) -> Any:
        store = tensorstore.open(*arguments, **options).result()

        def read(span: tuple[slice, ...]) -> Any:
            chunk = store.chunk_layout.read_chunk.shape
            ends = zip(span, chunk, strict=False)
            cut = [math.ceil(one.stop / size) - one.start // size for one, size in ends]
            whole = [math.ceil(size / one) for size, one in zip(store.shape, chunk, strict=True)]
            chunks = math.prod(cut + whole[len(cut) :])
            self.append(chunks * math.prod(chunk) * store.dtype.numpy_dtype.itemsize)
            return store[span]

        view = type("View", (), {"__getitem__": lambda _, span: read(span)})()
        view.chunk_layout, view.shape = store.chunk_layout, store.shape
        return SimpleNamespace(result=lambda: view)


def trained(folder: Path, params: dict[str, np.ndarray], **changes: Any) -> Path:
    """A run's checkpoint as the loop saves it."""
    data = DataConfig((PackedSetConfig("none"),), "none", 64)
    metadata = {"config": as_dict(Config("mixture", 1, MIXTURE, data, BatchConfig(1))), "tokenizer": "", **changes}
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(1, {"params": unflatten_dict(params, sep="/"), "step": np.ones((), np.int32)}, metadata)
    checkpoints.close()
    return folder


def test_trained_parameters_are_read_layer_by_layer_and_expert_by_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(checkpoint, "LEAST_CHUNK_BYTES", 16 << 10)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(MIXTURE)
    params = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
    base = trained(tmp_path / "base", params)

    lora = LoraConfig(rank=2, alpha=4.0, targets=("expert_up",))
    a, b = rng.normal(0, 1, (3, 4, 64, 2)).astype(np.float32), rng.normal(0, 1, (3, 4, 2, 128)).astype(np.float32)
    adapters = {"layers/expert_up_lora_a": a, "layers/expert_up_lora_b": b}
    parent = {"path": str(base), "step": 1, "hash": checkpoint_hash(find_step_folder(base))}
    config = {**as_dict(Config("mixture", 1, MIXTURE, DataConfig((PackedSetConfig("none"),), "none", 64),
                               BatchConfig(1), initial_checkpoint=str(base), lora=lora))}  # fmt: skip
    run = trained(tmp_path / "run", adapters, config=config, parent=parent)

    reads = Reads()
    monkeypatch.setattr(stored_parameters, "ts", reads)
    for source in (base, run):
        reads.clear()
        export(source, tmp_path / f"{source.name}-out")
        assert max(reads) <= TABLE < STACKED / 3
        assert sum(reads) >= sum(4 * math.prod(shape) for shape in shapes.values())
        assert sum(reads) <= 1.5 * sum(4 * math.prod(shape) for shape in shapes.values()), "read more than once"
    plain, merged = SafetensorsDirectory(tmp_path / "base-out"), SafetensorsDirectory(tmp_path / "run-out")
    up = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert np.array_equal(plain.read(up), params["layers/expert_up"][1, 2].T)
    np.testing.assert_allclose(merged.read(up), (params["layers/expert_up"][1, 2] + 2 * a[1, 2] @ b[1, 2]).T, atol=1e-5)
