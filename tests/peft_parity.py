"""Adapters against the peft package: `make test-parity` prints the largest difference of logits.

The base is a published folder with added tokens; random adapters on every linear layer and random new rows. peft's
base + adapter, peft's own merging, and our merged export must agree.
"""

import os

import nanollama  # noqa: F401 - before JAX, which it keeps from printing of its own cache

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from packed_sets import make_tokenizer

from nanollama.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    PackedSetConfig,
    as_dict,
)
from nanollama.data.tokenizer_folder import copy_tokenizer
from nanollama.export.add_tokens import extend
from nanollama.export.huggingface import export
from nanollama.export.imported import save_run
from nanollama.export.weights import parameter_shapes
from nanollama.models import lora as loras
from nanollama.parallel.mesh import make_mesh, one_device
from nanollama.training.checkpoint import Checkpoints, find_step_folder
from nanollama.training.initial import fresh
from nanollama.training.integrity import checkpoint_hash
from nanollama.training.optim import make_optimizer

OLD, NEW, LIMIT = 400, 408, 1e-5
BASE = ModelConfig(
    vocab_size=OLD, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
CASES: dict[str, tuple[ModelConfig, LoraConfig]] = {
    "llama": (BASE, LoraConfig(rank=4, alpha=8.0, train_rows_from=OLD)),
    "qwen2, tied": (
        dataclasses.replace(BASE, family="qwen2", qkv_bias=True, tie_embeddings=True),
        LoraConfig(rank=3, alpha=8.0, rank_stabilised=True, targets=("query", "value", "down"), train_rows_from=OLD),
    ),
}


def adapters(folder: Path, base: Path, model: ModelConfig, lora: LoraConfig) -> Path:
    """A run of random adapters on `base`, as training would have saved it."""
    data = DataConfig((PackedSetConfig("none"),), str(base / "tokenizer"), 64)
    config = Config("peft", 1, model, data, BatchConfig(1), initial_checkpoint=str(base), lora=lora)
    state = fresh(config, make_optimizer(config), one_device(make_mesh(MeshConfig())))
    rng = np.random.default_rng(1)
    learned = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), loras.learned(state.params))
    tokenizer = copy_tokenizer(base / "tokenizer", folder / "tokenizer")
    step = find_step_folder(base)
    parent = {"path": str(base), "step": 0, "hash": checkpoint_hash(step)}
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(asynchronous=False))
    metadata = {"config": as_dict(config), "tokenizer": tokenizer.sha256, "parent": parent}
    checkpoints.save(1, {"params": learned, "step": np.zeros((), np.int32)}, metadata)
    checkpoints.close()
    return folder


def differences(folder: Path, model: ModelConfig, lora: LoraConfig) -> dict[str, float]:
    """Largest differences of logits to our merged export."""
    from peft import PeftModel

    rng = np.random.default_rng(0)
    arrays = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in parameter_shapes(model).items()}
    readers: Any = {path: (lambda array=array: array) for path, array in arrays.items()}
    quiet = dict(say=lambda line: None)
    save_run(folder / "old", model, readers, lineage={}, tokenizer=make_tokenizer(folder / "tok", OLD), **quiet)
    base = extend(folder / "old", folder / "base", **quiet)
    extended = dataclasses.replace(model, vocab_size=NEW, vocab_padding=-NEW % 128)
    run = adapters(folder / "run", base, extended, lora)
    export(base, folder / "hf")
    export(run, folder / "merged")
    export(run, folder / "adapter", adapter=True)
    tokens = torch.randint(0, NEW, (2, 40))
    tokens[:, ::5] = torch.arange(OLD, NEW)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).logits

    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, merged = load(folder / "hf", dtype=torch.float32), logits(load(folder / "merged", dtype=torch.float32))
    without = logits(plain)
    wrapped = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    found = {"adapter": logits(wrapped), "merged by peft": logits(wrapped.merge_and_unload()), "base": without}
    return {name: float((value - merged).abs().max()) for name, value in found.items()}


def main() -> int:
    """Print the table; 1 when a difference is too large, or the adapters do nothing."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    failed = 0
    for name, (model, lora) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = differences(Path(folder), model, lora)
        good = max(found["adapter"], found["merged by peft"]) <= LIMIT < found["base"]
        failed += not good
        figures = ", ".join(f"{what} {value:.1e}" for what, value in found.items())
        print(f"peft, {name:<12} differences to our merged export: {figures}{'' if good else '   FAILED'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
