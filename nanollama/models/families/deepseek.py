"""DeepSeek: DeepSeekMoE (arXiv:2401.06066), V2 (latent attention, arXiv:2405.04434) and V3 (arXiv:2412.19437).

DeepSeekMoE 16B is published with code of its own (model_type "deepseek"), which is read; it is written as a
Qwen2-MoE, which computes the same (`families.qwen_moe.without_gate`). V3's modules for predicting several tokens have
no part in the next one: they are left out. deepseek-moe-7b is ours: V3 in small, sizes in multiples of 256.
"""

import functools
from collections.abc import Mapping
from typing import Any

from nanollama.config import ConfigError, LatentConfig, ModelConfig, MoeConfig, RopeScaling
from nanollama.models.families.published import DENSE_DEFAULTS, DENSE_FIELDS, DENSE_REQUIRED, Family
from nanollama.models.families.qwen_moe import without_gate
from nanollama.models.families.tensors import decoder_tensors

_EXPERTS = {
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "moe_intermediate_size": "moe.expert_size",
    "first_k_dense_replace": "moe.first_dense_layers",
}
_LATENT = {
    "kv_lora_rank": "latent.kv_lora_rank",
    "qk_rope_head_dim": "latent.qk_rope_head_dim",
    "qk_nope_head_dim": "latent.qk_nope_head_dim",
    "v_head_dim": "latent.v_head_dim",
}
_WITH_LATENT = {**{k: v for k, v in DENSE_FIELDS.items() if k != "head_dim"}, **_EXPERTS, **_LATENT}
_REQUIRED = {**DENSE_REQUIRED, "attention_bias": False, "moe_layer_freq": 1, "pretraining_tp": 1}
_SPECIAL = frozenset({"q_lora_rank", "n_shared_experts", "n_group", "topk_group", "topk_method", "scoring_func"})
# of the auxiliary loss and of how it was trained; sums of other fields, which transformers writes
_IGNORED = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "output_router_logits", "head_dim", "qk_head_dim"})


def _shared(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"moe.shared_size": (values.get("n_shared_experts") or 0) * values.get("moe_intermediate_size", 0)}


def _expect(values: Mapping[str, Any], field: str, known: tuple[str, ...], where: str) -> str:
    value: str = values.get(field, known[0])
    if value not in known:
        raise ConfigError(f"{where}: {field}", f"{value!r}", f"Supported: {', '.join(known)}.")
    return value


def _read_latent(values: Mapping[str, Any], where: str, *, version: int) -> dict[str, Any]:
    _expect(values, "scoring_func", ("softmax",) if version == 2 else ("sigmoid",), where)
    methods = ("greedy", "group_limited_greedy") if version == 2 else ("noaux_tc",)
    grouped = _expect(values, "topk_method", methods, where) != "greedy"
    return {
        **_shared(values),
        "moe.groups": values.get("n_group", 1) if grouped else 1,
        "moe.groups_per_token": values.get("topk_group", 1) if grouped else 1,
        "latent.q_lora_rank": values.get("q_lora_rank", 0),
        "head_dim": values.get("qk_rope_head_dim", 0) + values.get("qk_nope_head_dim", 0),
    }


def _write_shared(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None
    return {"n_shared_experts": model.moe.shared_size // model.moe.expert_size}


def _write_latent(model: ModelConfig, *, version: int) -> dict[str, Any]:
    assert model.moe is not None and model.latent is not None
    groups, method = model.moe.groups, "noaux_tc"
    if version == 2:
        method = "group_limited_greedy" if groups > 1 else "greedy"
    return {
        **_write_shared(model),
        "n_group": groups,
        "topk_group": model.moe.groups_per_token,
        "topk_method": method,
        "scoring_func": "softmax" if version == 2 else "sigmoid",
        "q_lora_rank": model.latent.q_lora_rank or None,
    }


FAMILIES = {
    "deepseek": Family(
        model_type="deepseek",
        architecture="DeepseekForCausalLM",
        fields={**DENSE_FIELDS, **_EXPERTS, "norm_topk_prob": "moe.normalize"},
        tensors=decoder_tensors,
        defaults={**DENSE_DEFAULTS, "max_position_embeddings": 2048, "norm_topk_prob": False},
        required={**_REQUIRED, "scoring_func": "softmax"},
        special=frozenset({"n_shared_experts"}),
        ignored=_IGNORED - {"head_dim"},
        read=lambda values, where: _shared(values),
        exported=without_gate,
    ),
    "deepseek_v2": Family(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        fields={**_WITH_LATENT, "routed_scaling_factor": "moe.scale"},
        tensors=decoder_tensors,
        defaults={**DENSE_DEFAULTS, "max_position_embeddings": 2048, "routed_scaling_factor": 1.0},
        required={**_REQUIRED, "mlp_bias": False, "norm_topk_prob": False},
        ours={"moe.normalize": False},
        special=_SPECIAL,
        ignored=_IGNORED,
        read=functools.partial(_read_latent, version=2),
        write=functools.partial(_write_latent, version=2),
    ),
    "deepseek_v3": Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        fields={
            **_WITH_LATENT,
            "routed_scaling_factor": "moe.scale",
            "norm_topk_prob": "moe.normalize",
            "rope_interleave": "latent.rope_interleaved",
        },
        tensors=decoder_tensors,
        defaults={
            **DENSE_DEFAULTS,
            "max_position_embeddings": 4096,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "rope_interleave": True,
        },
        required=_REQUIRED,
        ours={"moe.scoring": "sigmoid", "moe.selection_bias": True},
        special=_SPECIAL,
        ignored=_IGNORED | {"num_nextn_predict_layers", "num_mtp_layers"},
        read=functools.partial(_read_latent, version=3),
        write=lambda model: {**_write_latent(model, version=3), "num_nextn_predict_layers": 0},
        left_out=lambda model: rf"model\.layers\.{model.num_layers}\..*",
    ),
}

_V3 = dict(scoring="sigmoid", selection_bias=True)

PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-moe-7b": dict(
        family="deepseek_v3",
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        head_dim=192,
        moe=MoeConfig(64, 6, 768, shared_size=1536, first_dense_layers=1, scale=1.0, **_V3),  # type: ignore[arg-type]
        latent=LatentConfig(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128),
    ),
    "deepseek-moe-16b": dict(
        family="deepseek",
        vocab_size=102_400,
        hidden_size=2048,
        intermediate_size=10_944,
        num_layers=28,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        norm_eps=1e-6,
        max_position_embeddings=4096,
        moe=MoeConfig(64, 6, 1408, shared_size=2816, first_dense_layers=1, normalize=False),
    ),
    "deepseek-v2-lite": dict(
        family="deepseek_v2",
        vocab_size=102_400,
        hidden_size=2048,
        intermediate_size=10_944,
        num_layers=27,
        num_heads=16,
        num_kv_heads=16,
        head_dim=192,
        norm_eps=1e-6,
        max_position_embeddings=163_840,
        rope_scaling=RopeScaling("yarn", 40.0, 4096, attention_factor=1.0, mscale_all_dim=0.707),
        moe=MoeConfig(64, 6, 1408, shared_size=2816, first_dense_layers=1, normalize=False),
        latent=LatentConfig(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128),
    ),
    "deepseek-v3": dict(
        family="deepseek_v3",
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=18_432,
        num_layers=61,
        num_heads=128,
        num_kv_heads=128,
        head_dim=192,
        norm_eps=1e-6,
        max_position_embeddings=163_840,
        rope_scaling=RopeScaling("yarn", 40.0, 4096, attention_factor=1.0, mscale_all_dim=1.0),
        moe=MoeConfig(
            256, 8, 2048, shared_size=2048, first_dense_layers=3, scale=2.5, groups=8, groups_per_token=4,
            scoring="sigmoid", selection_bias=True,
        ),
        latent=LatentConfig(512, 64, 128, 128, q_lora_rank=1536),
    ),
}  # fmt: skip
