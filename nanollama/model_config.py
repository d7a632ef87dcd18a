"""What an architecture is: its frozen dataclasses and their checks. `nanollama.config` has the rest of a run.

Imports only the standard library, so that models can be used where ml_collections is absent.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from nanollama.data.strict import FieldError

ConfigError = FieldError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched to reach further than they were trained (`ops.rope`)."""

    type: Literal["linear", "ntk", "dynamic_ntk", "yarn", "llama3"]
    factor: float  # new length / original length
    original_length: int = 0  # positions trained before scaling; all but linear and ntk need it
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original_length / this are divided by factor
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original_length / this are kept
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this over original_length are kept
    beta_slow: float = 1.0  # yarn: dimensions that turn less often than this are divided by factor
    attention_factor: float = 0.0  # yarn: scale of cos and sin; 0 = 0.1 ln(factor) + 1
    mscale_all_dim: float = 0.0  # yarn with latent attention: scores times (0.1 this ln(factor) + 1)^2; 0 = not scaled
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in place of the feed-forward of every layer but the first ones (`ops.moe`)."""

    num_experts: int  # routed experts of a layer
    experts_per_token: int
    expert_size: int  # ffn width of one routed expert
    shared_size: int = 0  # ffn width of what every token takes beside them: all shared experts as one; 0 = none
    shared_gate: bool = False  # a sigmoid of the token scales the shared expert; Qwen2-MoE
    first_dense_layers: int = 0  # this many first layers have a dense feed-forward of intermediate_size
    scoring: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits; sigmoid: DeepSeek V3
    normalize: bool = True  # the chosen experts' weights sum to 1, before `scale`
    scale: float = 1.0  # of the chosen experts' weights; DeepSeek
    groups: int = 1  # experts are chosen only from the best groups of neighbours; DeepSeek
    groups_per_token: int = 1
    selection_bias: bool = False  # a bias per expert decides who is chosen, not how much it weighs; DeepSeek V3


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention: keys and values are made from one small latent per token (arXiv:2405.04434)."""

    kv_lora_rank: int  # width of the latent, which is what the cache holds
    qk_rope_head_dim: int  # rotated dims of a head; all heads share one rotated key
    qk_nope_head_dim: int  # dims without rotation; head_dim is the sum of both
    v_head_dim: int
    q_lora_rank: int = 0  # width of the queries' latent; 0 = queries straight from the residual stream
    rope_interleaved: bool = True  # pair i is dims (2i, 2i + 1), as DeepSeek publishes; False: (i, i + half)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture: everything that decides the parameters' shapes and the function they compute."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = "llama"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 0  # positions the model is good for, written on export; 0 = as trained
    norm_eps: float = 1e-5
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # RMSNorm over each query and key head, before RoPE; Qwen3
    sliding_window: int = 0  # keys a query sees, itself included; 0 = all
    full_attention_layers: int = 0  # with a sliding window: this many first layers see all keys
    moe: MoeConfig | None = None  # None: a dense feed-forward everywhere
    latent: LatentConfig | None = None  # None: grouped-query attention
    tie_embeddings: bool = False
    vocab_padding: int = 0  # rows of embedding and head past vocab_size, so that they divide; never predicted
    init_std: float = 0.02


def check_model(model: ModelConfig, where: str = "config.model") -> None:
    """Refuse impossible architectures; also for models that come from elsewhere (`where` names the source)."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    check_positive({f"{where}.{name}": getattr(model, name) for name in (*sizes, "rope_theta", "norm_eps")})
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"{where}.num_kv_heads",
            f"{model.num_kv_heads} does not divide num_heads={model.num_heads}",
            f"Use a divisor of {model.num_heads}.",
        )
    if model.head_dim % 2:
        raise ConfigError(
            f"{where}.head_dim", f"{model.head_dim} is odd", "RoPE rotates pairs: use an even number."
        )
    for name in ("max_position_embeddings", "sliding_window", "full_attention_layers", "vocab_padding"):
        if getattr(model, name) < 0:
            raise ConfigError(f"{where}.{name}", f"{getattr(model, name)} is negative", "Use 0 or more.")
    if model.full_attention_layers and not model.sliding_window:
        raise ConfigError(
            f"{where}.full_attention_layers",
            "is set without a sliding_window",
            "Set sliding_window, or leave both 0.",
        )
    if model.moe is not None:
        _check_moe(model.moe, model.num_layers, f"{where}.moe")
    if model.latent is not None:
        _check_latent(model, model.latent, where)
    if model.rope_scaling is not None:
        _check_scaling(model.rope_scaling, model.latent is not None, f"{where}.rope_scaling")


def _check_moe(moe: MoeConfig, num_layers: int, where: str) -> None:
    check_positive({
        f"{where}.{name}": getattr(moe, name)
        for name in ("num_experts", "experts_per_token", "expert_size", "scale", "groups", "groups_per_token")
    })
    for name in ("shared_size", "first_dense_layers"):
        if getattr(moe, name) < 0:
            raise ConfigError(f"{where}.{name}", f"{getattr(moe, name)} is negative", "Use 0 or more.")
    if moe.first_dense_layers >= num_layers:
        raise ConfigError(
            f"{where}.first_dense_layers",
            f"{moe.first_dense_layers} leaves no layer of {num_layers} with experts",
            "Lower it, or leave out moe.",
        )
    if moe.num_experts % moe.groups:
        raise ConfigError(
            f"{where}.groups", f"{moe.groups} does not divide num_experts={moe.num_experts}", "Use a divisor."
        )
    if moe.groups_per_token > moe.groups:
        raise ConfigError(
            f"{where}.groups_per_token", f"{moe.groups_per_token} of {moe.groups} groups", "Use at most all groups."
        )
    if moe.groups > 1 and moe.scoring == "sigmoid" and moe.num_experts // moe.groups < 2:
        raise ConfigError(
            f"{where}.groups",
            f"{moe.groups} groups of {moe.num_experts} experts have one expert each",
            "A group is judged by its two best experts: use groups of two or more.",
        )
    reachable = moe.num_experts // moe.groups * moe.groups_per_token
    if moe.experts_per_token > reachable:
        raise ConfigError(
            f"{where}.experts_per_token",
            f"{moe.experts_per_token} is more than the {reachable} experts that a token can reach",
            "Lower it, or raise num_experts or groups_per_token.",
        )
    if moe.shared_gate and not moe.shared_size:
        raise ConfigError(f"{where}.shared_gate", "is set without a shared expert", "Set shared_size, or turn it off.")


def _check_latent(model: ModelConfig, latent: LatentConfig, where: str) -> None:
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    check_positive({f"{where}.latent.{name}": getattr(latent, name) for name in sizes})
    if latent.q_lora_rank < 0:
        raise ConfigError(f"{where}.latent.q_lora_rank", f"{latent.q_lora_rank} is negative", "Use 0 or more.")
    if latent.qk_rope_head_dim % 2:
        raise ConfigError(
            f"{where}.latent.qk_rope_head_dim",
            f"{latent.qk_rope_head_dim} is odd",
            "RoPE rotates pairs: use an even number.",
        )
    if model.head_dim != latent.qk_rope_head_dim + latent.qk_nope_head_dim:
        raise ConfigError(
            f"{where}.head_dim",
            f"{model.head_dim} is not qk_rope_head_dim={latent.qk_rope_head_dim} + "
            f"qk_nope_head_dim={latent.qk_nope_head_dim}",
            "With latent attention a query or key head is both parts together.",
        )
    if model.num_kv_heads != model.num_heads:
        raise ConfigError(
            f"{where}.num_kv_heads",
            f"{model.num_kv_heads} with latent attention",
            f"Every query head has keys of its own: use num_heads={model.num_heads}.",
        )
    for name in ("qkv_bias", "qk_norm"):
        if getattr(model, name):
            raise ConfigError(f"{where}.{name}", "is set with latent attention", "Turn it off, or leave out latent.")


def _check_scaling(scaling: RopeScaling, latent: bool, scaled: str) -> None:
    if scaling.mscale_all_dim and not (latent and scaling.type == "yarn"):
        raise ConfigError(
            f"{scaled}.mscale_all_dim",
            f"{scaling.mscale_all_dim} without yarn and latent attention",
            "Leave it 0: only DeepSeek's attention scales its scores by it.",
        )
    if scaling.factor < 1:
        raise ConfigError(
            f"{scaled}.factor", f"{scaling.factor} is below 1", "Give new length / original length."
        )
    if scaling.type not in ("linear", "ntk"):
        check_positive({f"{scaled}.original_length": scaling.original_length})
    if scaling.type == "llama3" and not 0 < scaling.low_frequency_factor < scaling.high_frequency_factor:
        raise ConfigError(
            f"{scaled}.low_frequency_factor",
            f"{scaling.low_frequency_factor} is not in (0, high_frequency_factor={scaling.high_frequency_factor})",
            "Use the published numbers, 1 and 4.",
        )
    if scaling.type == "yarn" and not 0 < scaling.beta_slow < scaling.beta_fast:
        raise ConfigError(
            f"{scaled}.beta_slow",
            f"{scaling.beta_slow} is not between 0 and beta_fast={scaling.beta_fast}",
            "Use the paper's numbers, 1 and 32.",
        )


def check_positive(fields: Mapping[str, float]) -> None:
    """Refuse numbers that are 0 or below; `fields` maps their names, for the message, to them."""
    for field, value in fields.items():
        if value <= 0:
            raise ConfigError(field, f"{value} is not positive", "Give a number above 0.")
