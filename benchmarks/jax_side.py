"""Our side of `train_cpu.py`: the training step as `nanollama.train` runs it, on a workload's batches.

Owns the measuring of our step in a process of its own; knows nothing of PyTorch. Prints one JSON line.
    python -m benchmarks.jax_side WORKLOAD.npz [--steps N]
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

_STARTED = time.time()

import os
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") or "--xla_cpu_experimental_onednn_custom_call=true"
import jax  # noqa: E402  (after the clock: its import is part of the start-up time)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from benchmarks import workload  # noqa: E402
from nanollama.config import ComputeConfig  # noqa: E402
from nanollama.models.decoder import Decoder, head  # noqa: E402
from nanollama.ops.losses import cross_entropy_sums  # noqa: E402

Tree = Any


def nest(flat: dict[str, np.ndarray]) -> Tree:
    """{"layers/query": x} -> {"layers": {"query": x}}, on the device."""
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(array)
    return tree


def make_step(work: workload.Workload, compute: ComputeConfig):
    decoder = Decoder(work.model, compute)

    def loss_fn(params, batch):
        hidden, _ = decoder.apply({"params": params}, batch["tokens"], batch["positions"], batch["first_key"])
        sums = cross_entropy_sums(hidden, head(params), batch["targets"], batch["weights"],
                                  z_loss=work.z_loss, chunk_tokens=compute.loss_chunk_tokens)
        return sums.total / sums.weight

    decay = lambda params: jax.tree_util.tree_map_with_path(lambda p, x: "norm" not in p[-1].key, params)
    optimizer = optax.chain(optax.clip_by_global_norm(work.clip_norm), optax.adamw(
        work.learning_rate, b1=work.b1, b2=work.b2, eps=work.eps, weight_decay=work.weight_decay, mask=decay))

    def step(state, batch):
        params, opt = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), {"loss": loss}

    return jax.jit(step, donate_argnums=0), optimizer


def run(work: workload.Workload, steps: int = 0, compute: ComputeConfig = ComputeConfig()) -> dict[str, Any]:
    """Train on the first `steps` batches (0 = all); losses, and wall and processor time of each step."""
    step, optimizer = make_step(work, compute)
    params = nest(workload.make_weights(work))
    state = (params, optimizer.init(params))
    batches = workload.make_batches(work)
    losses, wall, processor, first = [], [], [], 0.0
    for index in range(steps or work.steps):
        wall_start, processor_start = time.perf_counter(), time.process_time()
        batch = {name: jnp.asarray(array[index]) for name, array in batches.items()}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        wall.append(time.perf_counter() - wall_start)
        processor.append(time.process_time() - processor_start)
        first = first or time.time()
    return {
        "losses": losses,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "first_step_after_seconds": first - _STARTED,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="0 = all batches")
    arguments = parser.parse_args()
    print(json.dumps(run(workload.load(arguments.workload), arguments.steps)))
