"""Qwen2 and Qwen2.5 (QKV bias, arXiv:2412.15115) and Qwen3 (QK-norm, no bias, arXiv:2505.09388), dense.

Presets are the published models. Parameter counts are in `python -m nanollama.models`.
"""

from typing import Any

from nanollama.models.families.published import (
    DENSE_DEFAULTS,
    DENSE_FIELDS,
    DENSE_REQUIRED,
    Family,
)
from nanollama.models.families.tensors import decoder_tensors

_DEFAULTS = {**DENSE_DEFAULTS, "max_position_embeddings": 32_768}

FAMILIES = {
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        fields=DENSE_FIELDS,
        tensors=decoder_tensors,
        defaults=_DEFAULTS,
        required=DENSE_REQUIRED,
        ours={"qkv_bias": True},
        windows="last_layers",
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        fields=DENSE_FIELDS,
        tensors=decoder_tensors,
        defaults={**_DEFAULTS, "head_dim": 128},
        required={**DENSE_REQUIRED, "attention_bias": False},
        ours={"qk_norm": True},
        windows="last_layers",
    ),
}

_QWEN2 = dict(family="qwen2", qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, max_position_embeddings=32_768)
_QWEN3 = dict(family="qwen3", qk_norm=True, rope_theta=1e6, norm_eps=1e-6, max_position_embeddings=40_960)

PRESETS: dict[str, dict[str, Any]] = {
    "qwen-0.5b": dict(
        **_QWEN2,
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        tie_embeddings=True,
    ),
    "qwen-1.5b": dict(
        **_QWEN2,
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        tie_embeddings=True,
    ),
    "qwen-7b": dict(
        **_QWEN2,
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
    ),
    "qwen3-0.6b": dict(
        **_QWEN3,
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=True,
    ),
    "qwen3-1.7b": dict(
        **_QWEN3,
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=True,
    ),
    "qwen3-4b": dict(
        **_QWEN3,
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=True,
    ),
    "qwen3-8b": dict(
        **_QWEN3,
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    ),
}
