"""Mistral: Llama with a sliding window in every layer (arXiv:2310.06825). Parameters: `python -m nanollama.models`."""

from typing import Any

from nanollama.models.families.published import (
    DENSE_DEFAULTS,
    DENSE_FIELDS,
    DENSE_REQUIRED,
    Family,
)
from nanollama.models.families.tensors import decoder_tensors

FAMILIES = {
    "mistral": Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        fields=DENSE_FIELDS,
        tensors=decoder_tensors,
        defaults={**DENSE_DEFAULTS, "max_position_embeddings": 131_072, "sliding_window": 4096},
        required=DENSE_REQUIRED,
        windows="all_layers",
    )
}

SIZES_7B: dict[str, Any] = dict(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=32_768,
)

PRESETS: dict[str, dict[str, Any]] = {
    "mistral-7b": dict(**SIZES_7B, family="mistral", sliding_window=4096),  # v0.1
}
