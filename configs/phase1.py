"""Phase 1 of NanoLlama-1B: the base model at 4K context, WSD warm-up and stable part.

    python -m nanollama.train --config=configs/phase1.py --workdir=runs/phase1
    python -m nanollama.train --config=configs/phase1.py:runlocal --workdir=runs/phase1-local

`runlocal` is the same program shrunk to a laptop: a micro model on the data that `make quickstart` made. The
decay belongs to the later phases: a phase-1 checkpoint of any step can be annealed (arXiv:2404.06395).
"""

from ml_collections import ConfigDict

from nanollama.config_files import parse_arg
from nanollama.models.families import preset


def get_config(argument: str = "") -> ConfigDict:
    local = parse_arg(argument, runlocal=False)["runlocal"]

    config = ConfigDict()
    config.name = "phase1-local" if local else "phase1"
    config.seed = 0
    config.steps = 60 if local else 50_000  # 50,000 steps x 524,288 tokens = 26B tokens

    config.model = ConfigDict(preset("llama-micro" if local else "nanollama-1b"))
    config.compute = ConfigDict()
    config.compute.dtype = "float32" if local else "bfloat16"  # parameters and optimizer state stay float32
    config.compute.remat = "none"  # with as many micro-batches as fit, nothing needs to be computed twice
    config.compute.loss_chunk_tokens = 1024 if local else 4096

    config.data = ConfigDict()
    if local:
        config.data.sets = (
            {"path": "runs/quickstart/packed", "recipe": "configs/mixtures/quickstart.yaml"},
        )
        config.data.tokenizer = "runs/quickstart/tokenizer"
        config.data.sequence_length = 512
    else:
        config.data.sets = ({"path": "data/phase1/packed", "recipe": "configs/mixtures/phase1.yaml"},)
        config.data.tokenizer = "data/phase1/tokenizer"  # 32,000 pieces, trained once, frozen for all phases
        config.data.sequence_length = 4096

    config.batch = ConfigDict()
    config.batch.global_rows = 8 if local else 128  # 128 x 4096 = 524,288 tokens per step
    config.batch.micro_batches = 2 if local else 0  # 0: the fewest that fit the devices, one H100 or a pod

    config.optimizer = ConfigDict({"name": "adamw", "learning_rate": 1e-3 if local else 3e-4})
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.schedule = ConfigDict({"name": "wsd", "decay_steps": 0})
    config.schedule.warmup_steps = 10 if local else 2_000
    config.loss = ConfigDict({"z_loss": 1e-4})

    config.mesh = ConfigDict({"data": -1 if local else 1, "fsdp": 1 if local else -1})  # shard a large model

    config.checkpoint = ConfigDict({"every": 20 if local else 1_000, "keep": 3})
    config.checkpoint.milestone_every = 0 if local else 10_000
    config.evaluation = ConfigDict({"every": 20 if local else 1_000, "batches": 4 if local else 64})
    config.logging = ConfigDict({"every": 5 if local else 10, "sample_every": 0 if local else 5_000})
    config.logging.sample_prompts = ("The purpose of this module", "def ")
    return config
