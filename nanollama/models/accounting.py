"""Parameters and FLOPs of a model, by formula. What MFU means here is written down once, in `mfu`.

XLA's cost analysis counts a scanned layer once, so formulas, checked by hand counts in the tests.
"""

from typing import NamedTuple

from nanollama.config import ModelConfig


class ParameterCount(NamedTuple):
    """Number of trainable values."""

    total: int
    embedding: int  # input table; also the output matrix when tied
    layers: int
    head: int  # output matrix when it is its own

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


class Flops(NamedTuple):
    """Floating-point operations per token; a multiply-add is two."""

    forward: float
    backward: float
    attention: float  # the causal score and value products, part of forward + backward

    @property
    def train(self) -> float:
        return self.forward + self.backward


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Exact parameter count of `Decoder(model)`."""
    D, F, K = model.hidden_size, model.intermediate_size, model.head_dim
    attention = D * K * (2 * model.num_heads + 2 * model.num_kv_heads)
    if model.qkv_bias:
        attention += K * (model.num_heads + 2 * model.num_kv_heads)
    if model.qk_norm:
        attention += 2 * K
    layers = model.num_layers * (attention + 3 * D * F + 2 * D)
    embedding = model.vocab_size * D
    head = 0 if model.tie_embeddings else embedding
    return ParameterCount(embedding + layers + head + D, embedding, layers, head)


def flops_per_token(model: ModelConfig, sequence_length: int) -> Flops:
    """FLOPs per token at this context length, for plain causal rows (documents not discounted)."""
    D, F, K = model.hidden_size, model.intermediate_size, model.head_dim
    layer = D * K * (2 * model.num_heads + 2 * model.num_kv_heads) + 3 * D * F
    matmul_parameters = model.num_layers * layer + model.vocab_size * D
    # scores and values: 2 products of T * H * K multiply-adds per query, half of them masked by causality
    attention = 2.0 * model.num_layers * sequence_length * model.num_heads * K
    forward = 2.0 * matmul_parameters + attention
    return Flops(forward, 2.0 * forward, 3.0 * attention)


def kv_cache_bytes(model: ModelConfig, sequence_length: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of one row."""
    return 2 * model.num_layers * sequence_length * model.num_kv_heads * model.head_dim * bytes_per_value


MFU_CONVENTION = (
    "MFU = 6 x (non-embedding + head) + causal attention FLOPs over dense peak; remat not counted"
)


def mfu(model: ModelConfig, sequence_length: int, tokens_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilisation in [0, 1] (arXiv:2204.02311, appendix B), by MFU_CONVENTION."""
    return flops_per_token(model, sequence_length).train * tokens_per_second / peak_flops
