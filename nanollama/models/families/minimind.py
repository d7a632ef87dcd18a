"""MiniMind2, dense and with experts (github.com/jingyaogong/minimind): a small Llama for Chinese and English.

Its own config.json (model_type "minimind") is read; what is written computes the same and needs no code of the
model's own: the dense one is a Llama, the one with experts a Qwen2-MoE (see `families.qwen_moe.without_gate`).
MiniMind3 is published as Qwen3 and Qwen3-MoE, which are read as such.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nanollama.config import ConfigError, ModelConfig, MoeConfig
from nanollama.models.families.published import DENSE_DEFAULTS, DENSE_FIELDS, Exported, Family
from nanollama.models.families.qwen_moe import without_gate
from nanollama.models.families.tensors import ExpertNames, decoder_tensors

_EXPERTS = ("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "scoring_func", "norm_topk_prob")


def _read(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not values["use_moe"]:
        return {}
    if values["scoring_func"] != "softmax":
        raise ConfigError(f"{where}: scoring_func", f"{values['scoring_func']!r}", "Only 'softmax' is known.")
    if values["n_shared_experts"] not in (0, 1):
        raise ConfigError(f"{where}: n_shared_experts", f"{values['n_shared_experts']}", "Supported: 0 or 1.")
    width = values.get("intermediate_size")  # of the dense layers, and of each expert
    return {
        "moe.num_experts": values["n_routed_experts"],
        "moe.experts_per_token": values["num_experts_per_tok"],
        "moe.expert_size": width,
        "moe.shared_size": values["n_shared_experts"] * width,
        # one expert alone is weighted by its probability
        "moe.normalize": values["norm_topk_prob"] and values["num_experts_per_tok"] > 1,
    }


def _exported(model: ModelConfig) -> Exported:
    if model.moe is None:
        return Exported(dataclasses.replace(model, family="llama"))
    return without_gate(model)


FAMILIES = {
    "minimind": Family(
        model_type="minimind",
        architecture="MiniMindForCausalLM",
        fields=DENSE_FIELDS,
        tensors=lambda model: decoder_tensors(model, ExpertNames(shared="shared_experts.0")),
        defaults={
            **DENSE_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "max_position_embeddings": 32_768,
            "use_moe": False,
            "num_experts_per_tok": 2,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": True,
        },
        required={"hidden_act": "silu", "dropout": 0.0, "inference_rope_scaling": False},
        special=frozenset({"use_moe", *_EXPERTS}),
        read=_read,
        exported=_exported,
        # of the auxiliary loss; and which attention kernel torch is to use
        ignored=frozenset({"aux_loss_alpha", "seq_aux", "flash_attn"}),
    )
}

_MINIMIND = dict(
    vocab_size=6400,
    num_heads=8,
    num_kv_heads=2,
    rope_theta=1e6,
    max_position_embeddings=32_768,
    tie_embeddings=True,
)

PRESETS: dict[str, dict[str, Any]] = {
    "minimind-26m": dict(**_MINIMIND, hidden_size=512, intermediate_size=1408, num_layers=8, head_dim=64),
    "minimind-104m": dict(**_MINIMIND, hidden_size=768, intermediate_size=2048, num_layers=16, head_dim=96),
    "minimind-145m-moe": dict(
        **_MINIMIND,
        family="minimind",
        hidden_size=640,
        intermediate_size=1728,
        num_layers=8,
        head_dim=80,
        moe=MoeConfig(num_experts=4, experts_per_token=2, expert_size=1728, shared_size=1728),
    ),
}
