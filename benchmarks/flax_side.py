"""The same Llama in plain Flax, as a straightforward program has it: the third side of `train_cpu.py`.

Linen modules in a loop over layers, attention as two einsums with a dense mask and a softmax, whole logits, optax's
cross-entropy and AdamW, one jitted step; no flag, no huge pages. Imports jax, flax, optax and numpy only, reads weights
and batches from the .npz that `workload.py` writes, and prints one JSON line.
    python -m benchmarks.flax_side WORKLOAD.npz
"""

import argparse
import json
import resource
import time
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Model = dict[str, Any]  # fields of a ModelConfig


def apply_rope(x_BTHK: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    K = x_BTHK.shape[-1]
    angles = positions_BT[..., None] * theta ** (-jnp.arange(0, K, 2) / K)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    left, right = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Attention(nn.Module):
    m: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        m = self.m

        def heads(name: str, count: int) -> jax.Array:
            return nn.DenseGeneral((count, m["head_dim"]), use_bias=False, name=name)(x_BTD)

        q = apply_rope(heads("query", m["num_heads"]), positions_BT, m["rope_theta"])
        k = apply_rope(heads("key", m["num_kv_heads"]), positions_BT, m["rope_theta"])
        repeats = m["num_heads"] // m["num_kv_heads"]
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(heads("value", m["num_kv_heads"]), repeats, axis=2)
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * m["head_dim"] ** -0.5
        weights = nn.softmax(jnp.where(mask_BTS[:, None], scores, -1e30))
        out = jnp.einsum("bhts,bshk->bthk", weights, v)
        return nn.DenseGeneral(m["hidden_size"], axis=(-2, -1), use_bias=False, name="output")(out)


class Block(nn.Module):
    m: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        m = self.m
        h = nn.RMSNorm(m["norm_eps"], name="attention_norm")(x_BTD)
        x_BTD = x_BTD + Attention(m, name="attention")(h, positions_BT, mask_BTS)
        h = nn.RMSNorm(m["norm_eps"], name="mlp_norm")(x_BTD)
        gate = nn.Dense(m["intermediate_size"], use_bias=False, name="gate")(h)
        up = nn.Dense(m["intermediate_size"], use_bias=False, name="up")(h)
        return x_BTD + nn.Dense(m["hidden_size"], use_bias=False, name="down")(nn.silu(gate) * up)


class Llama(nn.Module):
    m: Any

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Logits of every token, [B, T, V]."""
        m, key = self.m, jnp.arange(batch["tokens"].shape[1])
        mask_BTS = (key >= batch["first_key"][..., None]) & (key <= key[:, None])
        embedding = nn.Embed(m["vocab_size"], m["hidden_size"], name="embedding")
        x = embedding(batch["tokens"])
        for layer in range(m["num_layers"]):
            x = Block(m, name=f"layer_{layer}")(x, batch["positions"], mask_BTS)
        x = nn.RMSNorm(m["norm_eps"], name="final_norm")(x)
        if m["tie_embeddings"]:
            return embedding.attend(x)
        return nn.Dense(m["vocab_size"], use_bias=False, name="head")(x)


def load_weights(file: Any, m: Model) -> Any:
    """Our stacked arrays as this program's tree."""

    def stacked(layer: int, name: str) -> jax.Array:
        return jnp.array(file[f"weights/layers/{name}"][layer])

    params: dict[str, Any] = {
        "embedding": {"embedding": jnp.array(file["weights/embedding"])},
        "final_norm": {"scale": jnp.array(file["weights/final_norm"])},
    }
    if not m["tie_embeddings"]:
        params["head"] = {"kernel": jnp.array(file["weights/head"])}
    for layer in range(m["num_layers"]):
        params[f"layer_{layer}"] = {
            **{name: {"scale": stacked(layer, name)} for name in ("attention_norm", "mlp_norm")},
            **{name: {"kernel": stacked(layer, name)} for name in ("gate", "up", "down")},
            "attention": {name: {"kernel": stacked(layer, name)} for name in ("query", "key", "value", "output")},
        }
    return params


def run(path: str, steps: int | None = None) -> dict[str, Any]:
    """Losses, and wall and processor time of each step; the first `steps`, default all."""
    file = np.load(path)
    work = json.loads(str(file["workload"]))
    model, params = Llama(flax.core.freeze(work["model"])), load_weights(file, work["model"])
    optimizer = optax.chain(
        optax.clip_by_global_norm(work["clip_norm"]),
        optax.adamw(
            work["learning_rate"], work["b1"], work["b2"], work["eps"], weight_decay=work["weight_decay"],
            mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        ),
    )  # fmt: skip
    opt_state = optimizer.init(params)

    def loss_of(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits, weights = model.apply({"params": params}, batch), batch["weights"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        losses += work["z_loss"] * jax.nn.logsumexp(logits, axis=-1) ** 2 if work["z_loss"] else 0.0
        return (losses * weights).sum() / weights.sum()

    @jax.jit
    def step(params: Any, opt_state: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    batches = {name: file[f"batches/{name}"] for name in ("tokens", "targets", "weights", "positions", "first_key")}
    losses, wall, processor = [], [], []
    for number in range(work["steps"] if steps is None else steps):
        batch = {name: array[number] for name, array in batches.items()}
        wall_start, processor_start = time.perf_counter(), time.process_time()
        params, opt_state, loss = step(params, opt_state, batch)
        jax.block_until_ready(params)
        losses.append(float(loss))
        wall.append(time.perf_counter() - wall_start)
        processor.append(time.process_time() - processor_start)
    return {
        "losses": losses,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": {"flax": flax.__version__, "optax": optax.__version__},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    print(json.dumps(run(parser.parse_args().workload)))
