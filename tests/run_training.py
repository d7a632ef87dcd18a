"""A run in a process of its own, to be killed: `run_training.py DIRECTORY DETERMINISM DEVICES UNTIL DIE_AT`.

Resumes from DIRECTORY's newest good checkpoint, trains to step UNTIL, saves after every step. At step DIE_AT it
kills itself the hard way, with that step's save under way. Batches are a pure function of the step.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

ROWS, MICRO_BATCHES = 16, 8


def config_for(determinism: str) -> Any:
    from tiny import tiny_config

    from nanollama.config import CheckpointConfig, ScheduleConfig

    return tiny_config(
        ROWS,
        MICRO_BATCHES if determinism == "elastic" else 2,
        determinism=determinism,
        schedule=ScheduleConfig(warmup_steps=3),
        checkpoint=CheckpointConfig(every=1, keep=2),
    )


def main(directory: str, determinism: str, devices: int, until: int, die_at: int) -> None:
    from tiny import Training, random_batch

    from nanollama.config import MeshConfig, as_dict
    from nanollama.training.checkpoint import Checkpoints
    from nanollama.training.state import abstract_state

    config = config_for(determinism)
    mesh = MeshConfig() if determinism == "elastic" else MeshConfig(data=2, fsdp=2, tensor=1)
    training = Training(config, mesh)
    checkpoints = Checkpoints(directory, config.checkpoint)
    start = checkpoints.latest() or 0
    if start:
        abstract = abstract_state(config, training.optimizer, training.mesh)
        training.state, _ = checkpoints.restore(start, abstract, model=config.model)
    print(f"{devices} devices, from step {start}", flush=True)
    for step in range(start + 1, until + 1):
        training.train(random_batch(step, ROWS))
        checkpoints.save(step, training.state, {"config": as_dict(config)})
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from nanollama.parallel import backend

    backend.start(elastic=sys.argv[2] == "elastic", devices=int(sys.argv[3]))
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
