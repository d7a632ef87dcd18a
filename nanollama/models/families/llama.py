"""Llama presets: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases (arXiv:2302.13971, 2307.09288).

Hidden and ffn sizes of our own presets from 23M up are multiples of 128. Parameter counts are in
`python -m nanollama.models`.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # about 3.1M with the quickstart's 8k vocabulary: trains on two CPU cores in minutes
    "llama-micro": dict(
        vocab_size=8192,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=True,
    ),
    "llama-23m": dict(
        vocab_size=16384,
        hidden_size=384,
        intermediate_size=1024,
        num_layers=10,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        tie_embeddings=True,
    ),
    "llama-42m": dict(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=9,
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
}
