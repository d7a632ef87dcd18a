"""The quickstart's model: about 4 million parameters, trained on two CPU cores in minutes.

`configs/quickstart.py:workdir=DIR` reads the data that `make quickstart` (or its stages) wrote to DIR; what
follows `workdir=` is the path to its end, commas included. `tiny,` before it shrinks it all to seconds.
"""

from ml_collections import ConfigDict

from nanollama.config_files import parse_arg
from nanollama.models.families import preset


def get_config(argument: str = "") -> ConfigDict:
    options, _, workdir = argument.partition("workdir=")
    tiny = parse_arg(options.rstrip(","), tiny=False)["tiny"]
    workdir = workdir or "runs/quickstart"

    config = ConfigDict()
    config.name = "quickstart"
    config.seed = 0
    config.steps = 8 if tiny else 320

    config.model = ConfigDict(preset("llama-micro"))  # 3.8M parameters, vocabulary of 8192
    if tiny:
        config.model.update(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2)
        config.model.update(num_heads=2, num_kv_heads=1)

    config.data = ConfigDict()
    config.data.sets = ({"path": f"{workdir}/packed", "recipe": "configs/mixtures/quickstart.yaml"},)
    config.data.tokenizer = f"{workdir}/tokenizer"
    config.data.sequence_length = 128 if tiny else 512

    config.batch = ConfigDict({"global_rows": 4 if tiny else 8})

    config.optimizer = ConfigDict({"name": "adamw", "learning_rate": 2e-3, "weight_decay": 0.1})
    config.schedule = ConfigDict({"name": "wsd"})  # warm up, stay, then decay over the last fifth
    config.schedule.warmup_steps = config.steps // 10
    config.schedule.decay_steps = config.steps // 5

    config.checkpoint = ConfigDict({"every": 4 if tiny else 50, "keep": 2})
    config.evaluation = ConfigDict({"every": 4 if tiny else 100, "batches": 4})
    config.logging = ConfigDict({"every": 1 if tiny else 10, "sample_every": 4 if tiny else 200})
    config.logging.sample_prompts = ("def ", "import os\n", "The purpose of this module")
    return config
