"""Our side of `train_cpu.py`: the training step as `nanollama.train` runs it, on a workload's batches.

Owns the measuring of our step in a process of its own; knows nothing of PyTorch. Prints one JSON line.
    python -m benchmarks.jax_side WORKLOAD.npz [--steps N]
"""

import time

_STARTED = time.time()  # before the imports below: they are part of the start-up time

import argparse  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import workload  # noqa: E402
from nanollama.config import (  # noqa: E402
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
from nanollama.models.decoder import Decoder  # noqa: E402
from nanollama.parallel import backend  # noqa: E402
from nanollama.parallel.mesh import make_mesh  # noqa: E402
from nanollama.training.optim import make_optimizer  # noqa: E402
from nanollama.training.state import TrainState, state_shardings  # noqa: E402
from nanollama.training.step import make_train_step, put_batch  # noqa: E402


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
        params = nest(workload.make_weights(work))
        state = TrainState(np.zeros((), np.int32), params, optimizer.init(params))  # type: ignore[arg-type]
        # copied, for the step donates its state and the CPU backend may lend numpy's own memory
        self.state = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree), out_shardings=shardings)(state)
        decoder = Decoder(config.model, config.compute)
        self.step = make_train_step(config, decoder, optimizer, self.mesh, shardings)

    def train(self, arrays: dict[str, np.ndarray]) -> float:
        """One step; the loss that is minimised, once the new state is there."""
        self.state, metrics = self.step(self.state, put_batch(arrays, self.config, self.mesh))
        jax.block_until_ready(self.state)
        return float(metrics["total"])


def nest(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """{"layers/query": x} -> {"layers": {"query": x}}."""
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def losses(work: workload.Workload, compute: ComputeConfig = DEFAULT) -> list[float]:
    """The loss at every step of the workload."""
    training, batches = Training(work, compute), workload.make_batches(work)
    return [training.train({name: array[step] for name, array in batches.items()}) for step in range(work.steps)]


def run(work: workload.Workload, steps: int = 0, compute: ComputeConfig = DEFAULT) -> dict[str, Any]:
    """Train on the first `steps` batches (0 = all); losses, and wall and processor time of each step."""
    backend.start()
    training, batches = Training(work, compute), workload.make_batches(work)
    values, wall, processor, first_step = [], [], [], 0.0
    for step in range(steps or work.steps):
        arrays = {name: array[step] for name, array in batches.items()}
        wall_start, processor_start = time.perf_counter(), time.process_time()
        values.append(training.train(arrays))
        wall.append(time.perf_counter() - wall_start)
        processor.append(time.process_time() - processor_start)
        first_step = first_step or time.time() - _STARTED
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="0 = all batches")
    parser.add_argument("--compute", default="{}", help="JSON: fields of ComputeConfig that differ from its default")
    arguments = parser.parse_args()
    compute = ComputeConfig(**json.loads(arguments.compute))
    print(json.dumps(run(workload.load(arguments.workload), arguments.steps, compute)))
