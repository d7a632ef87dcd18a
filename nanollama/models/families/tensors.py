"""Published tensor names of the layers that families share. Knows nothing of a config.json."""

from typing import NamedTuple

from nanollama.config import ModelConfig, MoeConfig
from nanollama.models.decoder import stacks
from nanollama.models.families.published import TensorMap

_BLOCK = "model.layers.{layer}."
_ATTENTION = _BLOCK + "self_attn."


class ExpertNames(NamedTuple):
    """What a family calls the parts of its mixture of experts."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"
    bias: str = "gate.e_score_correction_bias"


def decoder_tensors(model: ModelConfig, names: ExpertNames | None = None) -> list[TensorMap]:
    """Names of the whole decoder: the same in Llama, Mistral, Qwen2 and Qwen3, and but for the experts everywhere."""
    maps = [TensorMap("embedding", "model.embed_tokens.weight")]
    extras: list[TensorMap] = []
    for stack in stacks(model):
        parts = [("attention_norm", _BLOCK + "input_layernorm.weight", 0)]
        parts += _latent(model) if model.latent else _grouped_query()
        parts.append(("mlp_norm", _BLOCK + "post_attention_layernorm.weight", 0))
        if stack.experts and model.moe is not None:
            parts += _experts(model.moe, names or ExpertNames())
        else:
            parts += _feed_forward("", _BLOCK + "mlp.")
        for found, group in ((maps, parts), (extras, _attention_vectors(model))):
            found += [TensorMap(f"{stack.name}/{ours}", theirs, inputs, stack.low) for ours, theirs, inputs in group]
    maps += [TensorMap("final_norm", "model.norm.weight"), *extras]
    if not model.tie_embeddings:
        maps.append(TensorMap("head", "lm_head.weight", inputs=1))
    return maps


Part = tuple[str, str, int]  # our name within a stack, theirs, and `TensorMap.inputs`


def _grouped_query() -> list[Part]:
    parts = [(name, f"{_ATTENTION}{name[0]}_proj.weight", 1) for name in ("query", "key", "value")]
    return [*parts, ("output", _ATTENTION + "o_proj.weight", 2)]


def _attention_vectors(model: ModelConfig) -> list[Part]:
    parts: list[Part] = []
    if model.qkv_bias:
        parts += [(f"{name}_bias", f"{_ATTENTION}{name[0]}_proj.bias", 0) for name in ("query", "key", "value")]
    if model.qk_norm:
        parts += [(f"{name}_norm", f"{_ATTENTION}{name[0]}_norm.weight", 0) for name in ("query", "key")]
    return parts


def _latent(model: ModelConfig) -> list[Part]:
    assert model.latent is not None
    parts = [
        ("key_value_down", _ATTENTION + "kv_a_proj_with_mqa.weight", 1),
        ("latent_norm", _ATTENTION + "kv_a_layernorm.weight", 0),
        ("key_value_up", _ATTENTION + "kv_b_proj.weight", 1),
        ("output", _ATTENTION + "o_proj.weight", 2),
    ]
    if not model.latent.q_lora_rank:
        return [*parts, ("query", _ATTENTION + "q_proj.weight", 1)]
    return [
        *parts,
        ("query_down", _ATTENTION + "q_a_proj.weight", 1),
        ("query_latent_norm", _ATTENTION + "q_a_layernorm.weight", 0),
        ("query_up", _ATTENTION + "q_b_proj.weight", 1),
    ]


def _feed_forward(prefix: str, theirs: str) -> list[Part]:
    return [(f"{prefix}{name}", f"{theirs}{name}_proj.weight", 1) for name in ("gate", "up", "down")]


def _experts(moe: MoeConfig, names: ExpertNames) -> list[Part]:
    block = f"{_BLOCK}{names.block}."
    expert = block + "experts.{expert}."
    parts = [
        ("router", block + "gate.weight", 1),
        ("expert_gate", f"{expert}{names.gate}.weight", 1),
        ("expert_up", f"{expert}{names.up}.weight", 1),
        ("expert_down", f"{expert}{names.down}.weight", 1),
    ]
    if moe.selection_bias:
        parts.append(("router_bias", block + names.bias, 0))
    if moe.shared_size:
        parts += _feed_forward("shared_", f"{block}{names.shared}.")
    if moe.shared_gate:
        parts.append(("shared_router", f"{block}{names.shared_gate}.weight", 1))
    return parts
