"""The models, weights and batches that JAX and PyTorch are compared on.

Owns what both sides must share to the bit, made by numpy from a seed so that no big file is committed, and
the .npz that carries it to `torch_twin.py`. Knows nothing of JAX, PyTorch or clocks.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from nanollama.config import ModelConfig
from nanollama.models.families import preset


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model, its batches and its optimizer; everything else is AdamW's default."""

    name: str
    model: ModelConfig
    rows: int
    length: int  # positions per row
    steps: int
    packed: bool = False  # rows hold documents that must not see each other; False: one document a row
    z_loss: float = 0.0
    learning_rate: float = 1e-3  # constant
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # not on norms
    clip_norm: float = 1.0
    weight_seed: int = 1
    batch_seed: int = 2


# 8.5M parameters: the smaller of the two sizes that our goals on CPU are stated for
EIGHT_MILLION = ModelConfig(8192, 256, 688, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=32)


def of_model(name: str, *, steps: int, packed: bool = False) -> Workload:
    """What `train_cpu.py` times: "8m" or a preset, at a batch that two cores step in about two seconds."""
    model = EIGHT_MILLION if name == "8m" else ModelConfig(**preset(name))
    rows = {"8m": 8, "llama-micro": 8, "llama-23m": 4}.get(name, 1)
    return Workload(name, model, rows=rows, length=512, steps=steps, packed=packed)


def for_agreement(*, packed: bool) -> Workload:
    """200 steps of a 0.86M model: long enough for a wrong update to show, short enough for every CI run."""
    model = ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=344,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=not packed,  # so that the two runs cover both kinds of head
    )
    name = "agreement-packed" if packed else "agreement"
    return Workload(name, model, rows=4, length=128, steps=200, packed=packed, z_loss=1e-4)


def make_weights(work: Workload) -> dict[str, np.ndarray]:
    """Initial parameters by "/"-joined name, float32, layers stacked, as `nanollama.models.decoder` has them.

    Uniform, not normal: plain multiples of random bits are the same on every machine and numpy version.
    """
    m, rng = work.model, np.random.default_rng(work.weight_seed)
    V, D, F, L, K = m.vocab_size, m.hidden_size, m.intermediate_size, m.num_layers, m.head_dim
    shapes = {
        "embedding": (V, D),
        "layers/query": (L, D, m.num_heads, K),
        "layers/key": (L, D, m.num_kv_heads, K),
        "layers/value": (L, D, m.num_kv_heads, K),
        "layers/output": (L, m.num_heads, K, D),
        "layers/gate": (L, D, F),
        "layers/up": (L, D, F),
        "layers/down": (L, F, D),
    }
    if not m.tie_embeddings:
        shapes["head"] = (D, V)
    half_width = np.float32(m.init_std * 3**0.5)  # of the uniform distribution with this deviation
    weights = {name: (2 * rng.random(shape, dtype=np.float32) - 1) * half_width for name, shape in shapes.items()}
    for name, shape in {"layers/attention_norm": (L, D), "layers/mlp_norm": (L, D), "final_norm": (D,)}.items():
        weights[name] = np.ones(shape, np.float32)
    return weights


def make_batches(work: Workload) -> dict[str, np.ndarray]:
    """Batches of all steps, each array [steps, rows, length], in the loader's form (keys as on the device).

    The text is a chain that can be learned: three tokens in four are the fixed successor of the one before.
    Packed rows are cut into documents at random places, and end in a few positions of padding.
    """
    rng = np.random.default_rng(work.batch_seed)
    V, T = work.model.vocab_size, work.length
    lines = work.steps * work.rows
    successor = rng.permutation(V)
    text = np.empty((lines, T + 1), np.int32)
    text[:, 0] = rng.integers(V, size=lines)
    for t in range(1, T + 1):
        random = rng.integers(V, size=lines)
        text[:, t] = np.where(rng.random(lines) < 0.75, successor[text[:, t - 1]], random)
    first_key = np.zeros((lines, T), np.int32)
    weights = np.ones((lines, T), np.float32)
    if work.packed:
        real = T - rng.integers(1, 1 + T // 16, size=lines)
        starts = np.sort(rng.integers(1, T - T // 8, size=(lines, 3)), axis=1)
        for line in range(lines):
            for start in starts[line]:
                first_key[line, start:] = start
                weights[line, start - 1] = 0.0  # the last token of a document predicts nothing
            first_key[line, real[line] :] = np.arange(real[line], T)
            weights[line, real[line] - 1 :] = 0.0
            text[line, real[line] :] = 0
    positions = np.arange(T, dtype=np.int32) - first_key
    targets = np.where(weights > 0, text[:, 1:], 0)
    arrays = {
        "tokens": text[:, :-1],
        "targets": targets.astype(np.int32),
        "weights": weights,
        "positions": positions,
        "first_key": first_key,
    }
    return {name: array.reshape(work.steps, work.rows, T) for name, array in arrays.items()}


def digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of names, shapes and bytes: says whether two machines made the same inputs."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def as_dict(work: Workload) -> dict[str, Any]:
    """JSON-able form of the recipe; `from_dict(as_dict(w)) == w`."""
    return dataclasses.asdict(work)


def from_dict(values: dict[str, Any]) -> Workload:
    return Workload(**{**values, "model": ModelConfig(**values["model"])})


def save(path: Path, work: Workload, *, weights: bool = True) -> None:
    """Write weights (where asked for), batches and the workload itself to one uncompressed .npz."""
    arrays = {f"weights/{name}": array for name, array in make_weights(work).items()} if weights else {}
    arrays |= {f"batches/{name}": array for name, array in make_batches(work).items()}
    np.savez(path, workload=np.array(json.dumps(as_dict(work))), **arrays)  # type: ignore[arg-type]


def load(path: Path) -> Workload:
    """The workload that `save` wrote; the arrays are made again from its seeds."""
    with np.load(path) as file:
        return from_dict(json.loads(str(file["workload"])))
