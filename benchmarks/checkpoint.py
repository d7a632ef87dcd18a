"""What a checkpoint costs: how long the loop stands still for a save, when it is safe on disk, and a restore.

    python benchmarks/checkpoint.py [--model=llama-23m] [--rounds=3] [--directory=DIR]

Parameters and both moments of AdamW, float32, as a run saves them: written in the background, hashed file by file,
committed by a rename. `stall` is the time `save` takes before training may go on; `committed` until the folder has
its final name; `verify` reads and hashes every byte; `restore` includes it. DIR decides the disk: by default that of
temporary folders.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from benchmarks import jax_side
from benchmarks.machine import RESULTS, write
from benchmarks.workload import Workload
from nanollama.config import CheckpointConfig, ComputeConfig, Config, ModelConfig
from nanollama.models.families import preset
from nanollama.parallel import backend
from nanollama.parallel.mesh import make_mesh
from nanollama.training.checkpoint import Checkpoints
from nanollama.training.integrity import find_damage
from nanollama.training.optim import make_optimizer
from nanollama.training.state import TrainState, abstract_state, init_state


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def lived_in(state: TrainState) -> TrainState:
    """As after training: a fresh optimizer's zeros would be compressed to nothing."""
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [
        jax.random.normal(key, leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


def measure(config: Config, directory: Path, rounds: int) -> dict[str, Any]:
    """Medians over `rounds` saves of one state, each restored by a reader of its own."""
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:1]), make_optimizer(config)
    state = jax.block_until_ready(jax.jit(lived_in)(init_state(config, optimizer, mesh)[0]))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    abstract, settings = abstract_state(config, optimizer, mesh), CheckpointConfig(keep=2)
    times: dict[str, list[float]] = {name: [] for name in ("stall", "committed", "verify", "restore")}
    writer = Checkpoints(directory, settings)
    for step in range(1, rounds + 2):  # the first makes Orbax's threads and is not counted
        stall = seconds(lambda step=step: writer.save(step, state, {"benchmark": "checkpoint"}))
        committed = stall + seconds(writer.wait)
        reader = Checkpoints(directory, settings)
        verify = seconds(lambda step=step: find_damage(directory / str(step)))
        restore = seconds(lambda step=step, reader=reader: reader.restore(step, abstract)[0])
        reader.close()
        if step > 1:
            for name, value in zip(times, (stall, committed, verify, restore), strict=True):
                times[name].append(value)
    writer.close()
    disk = sum(file.stat().st_size for file in (directory / str(rounds + 1)).rglob("*") if file.is_file())
    result: dict[str, Any] = {"state_mb": round(size / 1e6, 1), "disk_mb": round(disk / 1e6, 1), "rounds": rounds}
    for name, values in times.items():
        middle = statistics.median(values)
        result[name] = {"seconds": round(middle, 4), "mb_per_second": round(size / 1e6 / middle)}
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-23m", help="a preset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; what is made there is removed")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.json")
    options = parser.parse_args(arguments)
    backend.start()
    work = Workload(options.model, ModelConfig(**preset(options.model)), rows=1, length=128, steps=1)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        free = shutil.disk_usage(directory).free
        figures = measure(jax_side.config_of(work, ComputeConfig()), Path(directory), options.rounds)
    print(f"{options.model}: {figures['state_mb']:,} MB of state, {figures['disk_mb']:,} MB on disk, "
          f"{free / 1e9:,.0f} GB free there")  # fmt: skip
    print(f"{'':<12}{'seconds':>9}{'MB/s':>9}")
    for name, figure in figures.items():
        if isinstance(figure, dict):
            print(f"{name:<12}{figure['seconds']:>9.3f}{figure['mb_per_second']:>9,}")
    what = "seconds and megabytes of state a second: medians; one device, page cache warm"
    write(options.out, what, {"model": options.model, **figures}, "jax", "orbax-checkpoint", "tensorstore", "numpy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
