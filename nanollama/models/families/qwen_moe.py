"""Qwen1.5-MoE and Qwen2-MoE (a gated shared expert beside the routed ones), Qwen3-MoE (arXiv:2505.09388, QK-norm).

Presets are the published models. Also the form in which models of other families are written that have a shared
expert without a gate, and whose own format transformers cannot load: see `without_gate`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nanollama.config import ConfigError, ModelConfig, MoeConfig
from nanollama.models.families.published import DENSE_DEFAULTS, DENSE_FIELDS, DENSE_REQUIRED, Exported, Family
from nanollama.models.families.tensors import ExpertNames, decoder_tensors

_FIELDS = {
    **DENSE_FIELDS,
    "num_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "moe_intermediate_size": "moe.expert_size",
    "norm_topk_prob": "moe.normalize",
}
_DEFAULTS = {**DENSE_DEFAULTS, "max_position_embeddings": 32_768, "norm_topk_prob": False}
_REQUIRED = {**DENSE_REQUIRED, "decoder_sparse_step": 1}
# of the auxiliary loss, and of windows that are off
_IGNORED = frozenset({"router_aux_loss_coef", "output_router_logits", "sliding_window", "max_window_layers"})


def _read(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    dense = values.get("mlp_only_layers", [])
    if list(dense) != list(range(len(dense))):
        raise ConfigError(f"{where}: mlp_only_layers", f"{dense}", "Supported: only the first layers, [0, 1, ...].")
    return {"moe.first_dense_layers": len(dense)}


def _write(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None
    return {"mlp_only_layers": list(range(model.moe.first_dense_layers))}


FAMILIES = {
    "qwen2_moe": Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        fields={
            **_FIELDS,
            "shared_expert_intermediate_size": "moe.shared_size",
            "qkv_bias": "qkv_bias",
        },
        tensors=lambda model: decoder_tensors(model, ExpertNames(shared="shared_expert")),
        defaults={**_DEFAULTS, "qkv_bias": True},
        required=_REQUIRED,
        ours={"moe.shared_gate": True},
        windows="never",
        ignored=_IGNORED,
        special=frozenset({"mlp_only_layers"}),
        read=_read,
        write=_write,
    ),
    "qwen3_moe": Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        fields=_FIELDS,
        tensors=decoder_tensors,
        defaults=_DEFAULTS,
        required={**_REQUIRED, "attention_bias": False},
        ours={"qk_norm": True},
        aliases={"num_local_experts": "num_experts"},  # as transformers 5 saves it
        windows="never",
        ignored=_IGNORED,
        special=frozenset({"mlp_only_layers"}),
        read=_read,
        write=_write,
    ),
}


def without_gate(model: ModelConfig) -> Exported:
    """A model with an ungated shared expert, as a Qwen2-MoE: the same to the last bit.

    A gate of zeros lets sigmoid(0) = 1/2 of the shared expert through, so twice its output matrix is written: both
    are powers of two, which no rounding touches.
    """
    assert model.moe is not None
    if not model.moe.shared_size:
        raise ConfigError(
            "config.model.moe.shared_size", "is 0", "Write it as family 'qwen3_moe' or 'mixtral', which need none."
        )
    moe = dataclasses.replace(model.moe, shared_gate=True)
    factors = {"layers/shared_router": 0.0, "layers/shared_down": 2.0}
    return Exported(dataclasses.replace(model, family="qwen2_moe", moe=moe), factors)


PRESETS: dict[str, dict[str, Any]] = {
    "qwen-moe": dict(  # Qwen1.5-MoE-A2.7B
        family="qwen2_moe",
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_position_embeddings=8192,
        qkv_bias=True,
        moe=MoeConfig(60, 4, 1408, shared_size=5632, shared_gate=True, normalize=False),
    ),
    "qwen3-30b-moe": dict(  # Qwen3-30B-A3B
        family="qwen3_moe",
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_position_embeddings=40_960,
        qk_norm=True,
        moe=MoeConfig(128, 8, 768),
    ),
}
