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
    low_frequency_factor: float = (
        1.0  # llama3: wavelengths above original_length / this are divided by factor
    )
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original_length / this are kept
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this over original_length are kept
    beta_slow: float = 1.0  # yarn: dimensions that turn less often than this are divided by factor
    attention_factor: float = 0.0  # yarn: scale of cos and sin; 0 = 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions


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
    tie_embeddings: bool = False
    init_std: float = 0.02


def check_model(model: ModelConfig, where: str = "config.model") -> None:
    """Refuse impossible architectures; also for models that come from elsewhere (`where` names the source)."""
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    )
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
    for name in ("max_position_embeddings", "sliding_window", "full_attention_layers"):
        if getattr(model, name) < 0:
            raise ConfigError(f"{where}.{name}", f"{getattr(model, name)} is negative", "Use 0 or more.")
    if model.full_attention_layers and not model.sliding_window:
        raise ConfigError(
            f"{where}.full_attention_layers",
            "is set without a sliding_window",
            "Set sliding_window, or leave both 0.",
        )
    scaling, scaled = model.rope_scaling, f"{where}.rope_scaling"
    if scaling is None:
        return
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
