"""Mixtral: Mistral with a mixture of experts in every layer (arXiv:2401.04088)."""

from collections.abc import Mapping
from typing import Any

from nanollama.config import MoeConfig
from nanollama.models.families.mistral import SIZES_7B
from nanollama.models.families.published import DENSE_DEFAULTS, DENSE_FIELDS, DENSE_REQUIRED, Family
from nanollama.models.families.tensors import ExpertNames, decoder_tensors


def _read(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    del where
    return {"intermediate_size": values.get("intermediate_size")}  # there are no dense layers; one name has both


FAMILIES = {
    "mixtral": Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        fields={
            **DENSE_FIELDS,
            "intermediate_size": "moe.expert_size",
            "num_local_experts": "moe.num_experts",
            "num_experts_per_tok": "moe.experts_per_token",
        },
        tensors=lambda model: decoder_tensors(model, ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")),
        defaults={
            **DENSE_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131_072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        required={**DENSE_REQUIRED, "router_jitter_noise": 0.0},
        windows="all_layers",
        ignored=frozenset({"router_aux_loss_coef", "output_router_logits"}),
        read=_read,
    )
}

PRESETS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": dict(**SIZES_7B, family="mixtral", rope_theta=1e6, moe=MoeConfig(8, 2, 14_336)),
}
