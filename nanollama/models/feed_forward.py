"""The feed-forward layers. Letters as in `models.decoder`. Knows nothing of the residual stream."""

import flax.linen as nn
import jax

from nanollama.config import ModelConfig
from nanollama.models.linear import linear
from nanollama.ops.mlp import swiglu


def gated_feed_forward(module: nn.Module, m: ModelConfig, h_ND: jax.Array) -> jax.Array:
    """SwiGLU (arXiv:2002.05202): (silu(h gate) * (h up)) down, [N, D]."""
    D, F = m.hidden_size, m.intermediate_size
    gate_NF = linear(module, "gate", h_ND, ("embed", "ffn"), (D, F), std=m.init_std)
    up_NF = linear(module, "up", h_ND, ("embed", "ffn"), (D, F), std=m.init_std)
    residual_std = m.init_std * (2 * m.num_layers) ** -0.5
    return linear(module, "down", swiglu(gate_NF, up_NF), ("ffn", "embed"), (F, D), std=residual_std)
