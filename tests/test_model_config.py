"""Impossible architectures are refused by field, before anything is built."""

import dataclasses
from typing import Any

import pytest

from nanollama.model_config import ConfigError, LatentConfig, ModelConfig, MoeConfig, RopeScaling, check_model

MOE = MoeConfig(num_experts=8, experts_per_token=2, expert_size=32)
LATENT = LatentConfig(kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16
)


def test_good_ones_pass() -> None:
    check_model(dataclasses.replace(MODEL, moe=MOE, latent=LATENT))


@pytest.mark.parametrize(("change", "field"), [
    (dict(experts_per_token=9), "moe.experts_per_token"),
    (dict(num_experts=0), "moe.num_experts"),
    (dict(expert_size=-1), "moe.expert_size"),
    (dict(shared_size=-1), "moe.shared_size"),
    (dict(first_dense_layers=2), "moe.first_dense_layers"),
    (dict(groups=3), "moe.groups"),
    (dict(groups=8, scoring="sigmoid"), "moe.groups"),
    (dict(groups=2, groups_per_token=3), "moe.groups_per_token"),
    (dict(groups=4, groups_per_token=1, experts_per_token=3), "moe.experts_per_token"),
    (dict(shared_gate=True), "moe.shared_gate"),
    (dict(scale=0.0), "moe.scale"),
])  # fmt: skip
def test_moe_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        check_model(dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, **change)))


@pytest.mark.parametrize(("change", "field"), [
    (dict(latent=dataclasses.replace(LATENT, kv_lora_rank=0)), "latent.kv_lora_rank"),
    (dict(latent=dataclasses.replace(LATENT, q_lora_rank=-1)), "latent.q_lora_rank"),
    (dict(latent=dataclasses.replace(LATENT, qk_rope_head_dim=7)), "latent.qk_rope_head_dim"),
    (dict(head_dim=24), "head_dim"),
    (dict(num_kv_heads=1), "num_kv_heads"),
    (dict(qk_norm=True), "qk_norm"),
    (dict(latent=None, rope_scaling=RopeScaling("yarn", 2.0, 32, mscale_all_dim=1.0)), "mscale_all_dim"),
])  # fmt: skip
def test_latent_attention_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        check_model(dataclasses.replace(MODEL, **{"latent": LATENT, **change}))
