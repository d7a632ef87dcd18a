"""What a run cannot be is refused by field, before anything is built, and a config survives JSON."""

import dataclasses
import json
from typing import Any

import pytest
from tiny import MODEL, tiny_config

from nanollama.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    MoeConfig,
    PackedSetConfig,
    ScheduleConfig,
    as_dict,
    check,
    resolve,
)

EXPERTS = dataclasses.replace(MODEL, moe=MoeConfig(num_experts=4, experts_per_token=1, expert_size=32))
OF_RUN = {"initial_checkpoint": "runs/base"}


def lora(**fields: Any) -> dict[str, Any]:
    return {**OF_RUN, "lora": LoraConfig(**fields)}


@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 0}, "config.steps: 0 is not positive"),
    ({"checkpoint": CheckpointConfig(every=0)}, "config.checkpoint.every: 0 is not positive"),
    ({"data": DataConfig((), "absent", 32)}, "config.data.sets: is empty"),
    ({"data": DataConfig((PackedSetConfig("absent", weight=0.0),), "absent", 32)}, "config.data.sets[0].weight"),
    ({"model": dataclasses.replace(MODEL, num_layers=0)}, "config.model.num_layers: 0 is not positive"),
    ({"batch": BatchConfig(8, 3)}, "config.batch.micro_batches: 3 does not divide global_rows=8"),
    ({"batch": BatchConfig(8, -1)}, "config.batch.micro_batches: -1 does not divide"),
    ({"schedule": ScheduleConfig(warmup_steps=-1)}, "config.schedule: negative steps"),
    ({"schedule": ScheduleConfig(warmup_steps=600, decay_steps=401)}, "decay_steps=401 is more than steps=1000"),
    ({"schedule": ScheduleConfig(final_fraction=1.5)}, "config.schedule.final_fraction: 1.5 is not in [0, 1]"),
    ({"loss": LossConfig(balance_loss=0.01)}, "config.loss.balance_loss: the model has no experts"),
    ({"loss": LossConfig(bias_update_rate=-1.0)}, "config.loss.bias_update_rate: -1.0 is negative"),
    ({"model": EXPERTS, "batch": BatchConfig(8, 2), "loss": LossConfig(balance="batch", balance_loss=0.1)},
     "config.loss.balance: 'batch' with micro_batches=2"),
    ({"mesh": MeshConfig(data=0)}, "config.mesh"),
    ({"mesh": MeshConfig(data=-1, fsdp=-1)}, "-1 on at most one axis"),
    ({"mesh": MeshConfig(tensor=2), "determinism": "elastic"}, "config.mesh: tensor=2 with determinism='elastic'"),
    ({"lora": LoraConfig()}, "config.lora: is set without an initial_checkpoint"),
    (lora(rank=0), "config.lora.rank: 0 is not positive"),
    (lora(dropout=1.0), "config.lora.dropout: 1.0 is not in [0, 1)"),
    (lora(targets=(), train_rows_from=0), "config.lora.targets: is empty"),
    (lora(train_rows_from=128), "config.lora.train_rows_from: 128 is not an id below vocab_size=128"),
])  # fmt: skip
def test_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(dataclasses.replace(tiny_config(), **changes))
    assert message in str(refused.value)


@pytest.mark.parametrize("changes", [
    {}, {"schedule": ScheduleConfig(warmup_steps=600, decay_steps=400)}, {"batch": BatchConfig(8, 0)},
    {"schedule": ScheduleConfig("cosine", warmup_steps=600, decay_steps=600)},  # decay steps are WSD's
    {"model": EXPERTS, "loss": LossConfig(balance="batch", balance_loss=0.1)},
    lora(targets=(), train_rows_from=None), lora(train_rows_from=127),
])  # fmt: skip
def test_possible_ones_pass_and_survive_json(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(tiny_config(), **changes)
    check(config)
    assert resolve(json.loads(json.dumps(as_dict(config)))) == config


def test_unknown_and_ill_typed_fields_are_refused_with_the_nearest_name() -> None:
    values = as_dict(tiny_config())
    with pytest.raises(ConfigError, match=r"config\.optimizer\.learnig_rate.*learning_rate"):
        resolve(values | {"optimizer": {"learnig_rate": 1e-3}})
    with pytest.raises(ConfigError, match=r"config\.schedule\.name: 'wsb' is not one of wsd.*'wsd'"):
        resolve(values | {"schedule": {"name": "wsb"}})
    with pytest.raises(ConfigError, match=r"config\.steps: '10' is of type str"):
        resolve(values | {"steps": "10"})
    assert isinstance(resolve(values | {"seed": 3}), Config)
