"""Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases (arXiv:2302.13971, 2307.09288, 2407.21783).

Our own presets are llama-micro to nanollama-1b; their hidden and ffn sizes are multiples of 256, which GGUF's k-quants
need. The others are the published models: Llama 3.2 (1b, 3b), Llama 2 (7b, 13b), Llama 3.1 (8b). Parameter counts are
in `python -m nanollama.models`.
"""

from typing import Any

from nanollama.config import RopeScaling
from nanollama.models.families.published import (
    DENSE_DEFAULTS,
    DENSE_FIELDS,
    DENSE_REQUIRED,
    Family,
)
from nanollama.models.families.tensors import decoder_tensors

FAMILIES = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        fields=DENSE_FIELDS,
        tensors=decoder_tensors,
        defaults={**DENSE_DEFAULTS, "max_position_embeddings": 2048},
        required={**DENSE_REQUIRED, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    )
}


def _llama3_scaling(factor: float) -> RopeScaling:
    return RopeScaling(
        "llama3", factor, original_length=8192, low_frequency_factor=1.0, high_frequency_factor=4.0
    )


_LLAMA3: dict[str, Any] = dict(
    vocab_size=128_256, num_kv_heads=8, rope_theta=500_000.0, max_position_embeddings=131_072
)

PRESETS: dict[str, dict[str, Any]] = {
    # about 3.8M with the quickstart's 8k vocabulary: trains on two CPU cores in minutes
    "llama-micro": dict(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=True,
    ),
    "llama-23m": dict(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1024,
        num_layers=6,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        tie_embeddings=True,
    ),
    "llama-42m": dict(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        tie_embeddings=True,
    ),
    "llama-124m": dict(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=16,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        tie_embeddings=True,
    ),
    "nanollama-1b": dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        tie_embeddings=False,
    ),
    "llama-1b": dict(
        **_LLAMA3,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        head_dim=64,
        rope_scaling=_llama3_scaling(32.0),
        tie_embeddings=True,
    ),
    "llama-3b": dict(
        **_LLAMA3,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=28,
        num_heads=24,
        head_dim=128,
        rope_scaling=_llama3_scaling(32.0),
        tie_embeddings=True,
    ),
    "llama-7b": dict(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama-8b": dict(
        **_LLAMA3,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        head_dim=128,
        rope_scaling=_llama3_scaling(8.0),
    ),
    "llama-13b": dict(
        vocab_size=32_000,
        hidden_size=5120,
        intermediate_size=13_824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        max_position_embeddings=4096,
    ),
}
