"""Our side of `train_cpu.py`: the training step as `nanollama.train` runs it, on a workload's batches.

Owns the measuring of our step in a process of its own; knows nothing of PyTorch. Prints one JSON line.
    python -m benchmarks.jax_side WORKLOAD.npz
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from benchmarks import workload
from nanollama.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    PackedSetConfig,
    ScheduleConfig,
)
from nanollama.models.decoder import Decoder
from nanollama.parallel import backend
from nanollama.parallel.mesh import make_mesh
from nanollama.training.optim import make_optimizer
from nanollama.training.state import TrainState, state_shardings
from nanollama.training.step import compile_step, make_train_step, put_batch


def config_of(work: workload.Workload, compute: ComputeConfig) -> Config:
    """The run config that trains this workload on one device."""
    return Config(
        name=work.name,
        steps=work.steps,
        model=work.model,
        data=DataConfig((PackedSetConfig("absent"),), "absent", work.length),
        batch=BatchConfig(work.rows),
        compute=compute,
        optimizer=OptimizerConfig(
            "adamw", work.learning_rate, work.b1, work.b2, work.eps, work.weight_decay, work.clip_norm
        ),
        schedule=ScheduleConfig("constant"),
        loss=LossConfig(work.z_loss),
        mesh=MeshConfig(1, 1, 1),
    )


DEFAULT = ComputeConfig()


class Training:
    """The workload's state and its compiled step; `train` is what the loop does with a batch."""

    def __init__(self, work: workload.Workload, compute: ComputeConfig):
        self.config = config = config_of(work, compute)
        self.mesh = make_mesh(config.mesh, jax.devices()[:1])
        optimizer = make_optimizer(config)
        shardings = state_shardings(config, optimizer, self.mesh)
        params = unflatten_dict(workload.make_weights(work), sep="/")
        state = TrainState(np.zeros((), np.int32), params, optimizer.init(params))  # type: ignore[arg-type]
        # copied, for the step donates its state and the CPU backend may lend numpy's own memory
        self.state = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree), out_shardings=shardings)(state)
        decoder = Decoder(config.model, config.compute)
        self.program: Any = None  # compiled when the first batch is there
        self.step = make_train_step(config, decoder, optimizer, self.mesh, shardings)

    def train(self, arrays: dict[str, np.ndarray]) -> float:
        """One step; the loss that is minimised, once the new state is there."""
        batch = put_batch(arrays, self.config, self.mesh)
        if self.program is None:
            self.program = compile_step(self.step, self.state, batch)
        self.state, metrics = self.program(self.state, batch)
        jax.block_until_ready(self.state)
        return float(metrics["total"])


def run(work: workload.Workload, started: float, compute: ComputeConfig = DEFAULT) -> dict[str, Any]:
    """Losses, and wall and processor time of each step; `started` is when this process was, as `time.time()`."""
    backend.start()
    training, batches = Training(work, compute), workload.make_batches(work)
    values, wall, processor, first_step = [], [], [], 0.0
    for step in range(work.steps):
        arrays = {name: array[step] for name, array in batches.items()}
        wall_start, processor_start = time.perf_counter(), time.process_time()
        values.append(training.train(arrays))
        wall.append(time.perf_counter() - wall_start)
        processor.append(time.process_time() - processor_start)
        first_step = first_step or time.time() - started
    return {
        "losses": values,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "first_step_after_seconds": first_step,
        "threads": backend.pool_threads(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
    }


if __name__ == "__main__":
    backend.use_huge_pages()  # as `nanollama.train` does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--started", type=float, default=time.time(), help="when the caller started it, epoch seconds")
    parser.add_argument("--compute", default="{}", help="JSON: fields of ComputeConfig that differ from its default")
    given = parser.parse_args()
    print(json.dumps(run(workload.load(given.workload), given.started, ComputeConfig(**json.loads(given.compute)))))
