"""Parameters and FLOPs of a model, by formula. What MFU means here is written down once, in `mfu`.

XLA's cost analysis counts a scanned layer once, so formulas, checked by hand counts in the tests.
"""

from typing import NamedTuple

from nanollama.config import ModelConfig
from nanollama.models.attention import cache_heads


class ParameterCount(NamedTuple):
    """Number of trainable values."""

    total: int
    embedding: int  # input table; also the output matrix when tied
    layers: int
    head: int  # output matrix when it is its own
    active: int  # of the total, those that one token uses: not the experts that it is not sent to

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


class _Values(NamedTuple):
    """Values of a part of a layer."""

    matrices: int  # multiplied with every token
    vectors: int = 0  # norms and biases
    idle: int = 0  # matrices of experts that a token is not sent to

    def __add__(self, other: "_Values") -> "_Values":  # type: ignore[override]
        return _Values(*(a + b for a, b in zip(self, other, strict=True)))


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Exact parameter count of `Decoder(model)`."""
    parts = _all_layers(model)
    layers = sum(parts)
    embedding = (model.vocab_size + model.vocab_padding) * model.hidden_size
    head = 0 if model.tie_embeddings else embedding
    total = embedding + layers + head + model.hidden_size
    return ParameterCount(total, embedding, layers, head, total - parts.idle)


def flops_per_token(model: ModelConfig, sequence_length: int) -> Flops:
    """FLOPs per token at this context length, for plain causal rows (documents not discounted).

    Of a mixture of experts, those of the experts that a token is sent to, and the router's.
    """
    columns = (model.vocab_size + model.vocab_padding) * model.hidden_size
    latent = model.latent
    value_dim = model.head_dim if latent is None else latent.v_head_dim
    keys = sum(_mean_keys(sequence_length, window) for window in _windows(model))
    attention = 2.0 * keys * model.num_heads * (model.head_dim + value_dim)  # scores, then values
    forward = 2.0 * (_all_layers(model).matrices + columns) + attention
    return Flops(forward, 2.0 * forward, 3.0 * attention)


def kv_cache_bytes(model: ModelConfig, sequence_length: int, bytes_per_value: int = 2) -> int:
    """Bytes of what one row keeps of its past: keys and values, or their latent and the shared rotated key."""
    per_token = sum(heads * size for heads, size in cache_heads(model))
    return model.num_layers * sequence_length * per_token * bytes_per_value


def _all_layers(model: ModelConfig) -> _Values:
    dense = model.num_layers if model.moe is None else model.moe.first_dense_layers
    total = _Values(0)
    for number in range(model.num_layers):
        ffn = _Values(3 * model.hidden_size * model.intermediate_size) if number < dense else _experts(model)
        total += _attention(model) + ffn + _Values(0, 2 * model.hidden_size)
    return total


def _attention(model: ModelConfig) -> _Values:
    D, H, G, K = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim
    if model.latent is None:
        bias = K * (H + 2 * G) if model.qkv_bias else 0
        return _Values(D * K * (2 * H + 2 * G), bias + (2 * K if model.qk_norm else 0))
    m = model.latent
    R, J, Q = m.kv_lora_rank, m.v_head_dim, m.q_lora_rank
    queries = D * Q + Q * H * K if Q else D * H * K
    keys_values = D * (R + m.qk_rope_head_dim) + R * H * (m.qk_nope_head_dim + J)
    return _Values(queries + keys_values + H * J * D, Q + R)


def _experts(model: ModelConfig) -> _Values:
    assert model.moe is not None
    D, moe = model.hidden_size, model.moe
    one = 3 * D * moe.expert_size
    always = D * moe.num_experts + 3 * D * moe.shared_size + (D if moe.shared_gate else 0)
    bias = moe.num_experts if moe.selection_bias else 0
    return _Values(always + one * moe.experts_per_token, bias, one * (moe.num_experts - moe.experts_per_token))


def _windows(model: ModelConfig) -> list[int]:
    """Keys that a query of each layer may see; 0 = all."""
    full = model.full_attention_layers if model.sliding_window else model.num_layers
    return [0 if number < full else model.sliding_window for number in range(model.num_layers)]


def _mean_keys(sequence_length: int, window: int) -> float:
    """Keys that a query sees on average: half of the row, less where a window w cuts: w - w^2 / 2T."""
    if not window or window >= sequence_length:
        return sequence_length / 2
    return window - window**2 / (2 * sequence_length)


MFU_CONVENTION = (
    "MFU = 6 x (non-embedding + head) + causal attention FLOPs over dense peak; remat not counted"
)


def mfu(model: ModelConfig, sequence_length: int, tokens_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilisation in [0, 1] (arXiv:2204.02311, appendix B), by MFU_CONVENTION."""
    return flops_per_token(model, sequence_length).train * tokens_per_second / peak_flops
