"""A 7B model (Llama 2's shape) at 4K context: 1M tokens a step, for 8 large GPUs or a slice of a TPU pod.

    python -m nanollama.plan --config=configs/pretrain_7b.py --target=h100x8
    python -m nanollama.plan --config=configs/pretrain_7b.py --target=v5p-256

Everything but the model, the batch and the layout is phase 1's.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from nanollama.config_files import parse_arg
from nanollama.models.families import preset


def get_config(argument: str = "") -> ConfigDict:
    parse_arg(argument)  # it takes none
    config = runpy.run_path(str(Path(__file__).with_name("phase1.py")))["get_config"]()
    config.name = "pretrain-7b"
    config.steps = 140_000  # 140,000 steps x 1,048,576 tokens = 147B tokens, 20 per parameter

    config.model = ConfigDict(preset("llama-7b"))
    config.compute.remat = "full"
    config.compute.scan_unroll = 1  # 32 unrolled layers compile for many minutes

    config.batch.global_rows = 256  # 256 x 4096 = 1,048,576 tokens per step
    config.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return config
