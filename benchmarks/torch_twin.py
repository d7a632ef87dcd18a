"""The same Llama in plain PyTorch: SDPA, fused AdamW; eager and float32 unless asked for other.

Owns the other side of `train_cpu.py`; runs in an environment of its own, imports torch and numpy only, reads
weights and batches from the .npz that `workload.py` writes, and prints one JSON line.
    python benchmarks/torch_twin.py WORKLOAD.npz
"""

import argparse
import json
import platform
import resource
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, self.eps)


def apply_rope(x_BHTK: torch.Tensor, cos_BTC: torch.Tensor, sin_BTC: torch.Tensor) -> torch.Tensor:
    left, right = x_BHTK.chunk(2, dim=-1)
    cos, sin = cos_BTC[:, None], sin_BTC[:, None]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, m: dict[str, Any]):
        super().__init__()
        D, K, self.K = m["hidden_size"], m["head_dim"], m["head_dim"]
        self.H, self.G = m["num_heads"], m["num_kv_heads"]
        self.attention_norm = RMSNorm(D, m["norm_eps"])
        self.query = nn.Linear(D, self.H * K, bias=False)
        self.key = nn.Linear(D, self.G * K, bias=False)
        self.value = nn.Linear(D, self.G * K, bias=False)
        self.output = nn.Linear(self.H * K, D, bias=False)
        self.mlp_norm = RMSNorm(D, m["norm_eps"])
        self.gate = nn.Linear(D, m["intermediate_size"], bias=False)
        self.up = nn.Linear(D, m["intermediate_size"], bias=False)
        self.down = nn.Linear(m["intermediate_size"], D, bias=False)

    def forward(self, x_BTD: torch.Tensor, rope: tuple, seen: Any) -> torch.Tensor:
        """seen: None for plain causal; a dense mask [B, 1, T, S]; or flex_attention's blocks."""
        B, T, _ = x_BTD.shape
        h = self.attention_norm(x_BTD)
        q = apply_rope(self.query(h).view(B, T, self.H, self.K).transpose(1, 2), *rope)
        k = apply_rope(self.key(h).view(B, T, self.G, self.K).transpose(1, 2), *rope)
        v = self.value(h).view(B, T, self.G, self.K).transpose(1, 2)
        if seen is None or isinstance(seen, torch.Tensor):
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
        else:
            a = flex_attention(q, k, v.to(q.dtype), block_mask=seen, enable_gqa=True)
        x_BTD = x_BTD + self.output(a.transpose(1, 2).reshape(B, T, self.H * self.K))
        h = self.mlp_norm(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, m: dict[str, Any]):
        super().__init__()
        D, V = m["hidden_size"], m["vocab_size"]
        self.m = m
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList([Block(m) for _ in range(m["num_layers"])])
        self.final_norm = RMSNorm(D, m["norm_eps"])
        self.head = nn.Linear(D, V, bias=False)
        if m["tie_embeddings"]:
            self.head.weight = self.embedding.weight

    def forward(self, batch: dict[str, Any], remat: bool = False) -> torch.Tensor:
        K, tokens = self.m["head_dim"], batch["tokens"]
        exponents = torch.arange(0, K, 2, dtype=torch.float32, device=tokens.device) / K
        angles = batch["positions"].float()[..., None] * self.m["rope_theta"] ** -exponents
        rope = (angles.cos(), angles.sin())
        x = self.embedding(tokens)
        for layer in self.layers:
            if remat:
                x = checkpoint(layer, x, rope, batch["seen"], use_reentrant=False)
            else:
                x = layer(x, rope, batch["seen"])
        return self.head(self.final_norm(x))


def dense_mask(first_key_BT: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, S] bool: causal, and inside the query's document."""
    index = torch.arange(first_key_BT.shape[1], device=first_key_BT.device)
    return ((index >= first_key_BT[..., None]) & (index <= index[:, None]))[:, None]


def block_mask(first_key_BT: torch.Tensor) -> Any:
    """The same for flex_attention, which skips blocks: what PyTorch has for documents on a GPU."""

    def seen(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (s >= first_key_BT[b, t]) & (s <= t)

    B, T = first_key_BT.shape
    return create_block_mask(seen, B, None, T, T, device=first_key_BT.device)


def load_weights(model: Decoder, weights: Any) -> None:
    """Copy ours in: nn.Linear keeps [out, in], so matrices are flattened to 2-D and transposed."""
    with torch.no_grad():
        model.embedding.weight.copy_(torch.from_numpy(weights["weights/embedding"]))
        if not model.m["tie_embeddings"]:
            model.head.weight.copy_(torch.from_numpy(weights["weights/head"]).T)
        model.final_norm.scale.copy_(torch.from_numpy(weights["weights/final_norm"]))
        for name in ("attention_norm", "mlp_norm"):
            for layer, scale in zip(model.layers, weights[f"weights/layers/{name}"], strict=True):
                getattr(layer, name).scale.copy_(torch.from_numpy(scale))
        for name in ("query", "key", "value", "output", "gate", "up", "down"):
            for layer, matrix in zip(model.layers, weights[f"weights/layers/{name}"], strict=True):
                target = getattr(layer, name).weight
                target.copy_(torch.from_numpy(matrix).reshape(target.shape[1], target.shape[0]).T)


def loss_of(model: Decoder, batch: dict[str, Any], work: dict[str, Any], remat: bool = False) -> torch.Tensor:
    """Mean over the tokens that count of -log p(target) + z_loss * logsumexp^2."""
    logits = model(batch, remat).flatten(0, 1)
    targets, weights = batch["targets"].flatten(), batch["weights"].flatten()
    if work["packed"]:
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    else:
        loss = F.cross_entropy(logits, targets)
    if work["z_loss"]:
        loss = loss + work["z_loss"] * (logits.logsumexp(-1) ** 2 * weights).sum() / weights.sum()
    return loss


def make_optimizer(model: Decoder, work: dict[str, Any]) -> torch.optim.Optimizer:
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": work["weight_decay"]},
        {"params": norms, "weight_decay": 0.0},
    ]
    betas = (work["b1"], work["b2"])
    return torch.optim.AdamW(groups, lr=work["learning_rate"], betas=betas, eps=work["eps"], fused=True)


def run(
    path: str, bf16: bool = False, compiled: bool = False, device: str = "cpu", remat: bool = False
) -> dict[str, Any]:
    """Losses, and wall and processor time of each step; `bf16` is autocast, as PyTorch's users have it.

    A workload without weights (large models) is run from PyTorch's own initial ones.
    """
    file = np.load(path)
    work = json.loads(str(file["workload"]))
    with torch.device(device):
        model = Decoder(work["model"])
    if "weights/embedding" in file:
        load_weights(model, file)
    optimizer = make_optimizer(model, work)
    names = ("tokens", "targets", "weights", "positions", "first_key")
    batches = {name: torch.from_numpy(file[f"batches/{name}"]).to(device) for name in names}
    for name in ("tokens", "targets"):
        batches[name] = batches[name].long()
    loss_function = torch.compile(loss_of) if compiled else loss_of
    losses, wall, processor = [], [], []
    for step in range(work["steps"]):
        batch: dict[str, Any] = {name: array[step] for name, array in batches.items()}
        wall_start, processor_start = time.perf_counter(), time.process_time()
        make_mask = block_mask if device == "cuda" else dense_mask
        batch["seen"] = make_mask(batch["first_key"]) if work["packed"] else None
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_function(model, batch, work, remat)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), work["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        wall.append(time.perf_counter() - wall_start)
        processor.append(time.process_time() - processor_start)
    peak = torch.cuda.max_memory_allocated() >> 20 if device == "cuda" else 0
    return {
        "losses": losses,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "peak_memory_mib": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--remat", action="store_true", help="each layer computed again in the backward pass")
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.workload, arguments.bf16, arguments.compile, arguments.device, arguments.remat)))
