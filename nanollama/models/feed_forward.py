"""The feed-forward layers: dense, and mixtures of experts. Letters as in `models.decoder` and `ops.moe`.

Knows nothing of the residual stream.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanollama.config import ComputeConfig, ModelConfig, MoeConfig
from nanollama.models.linear import adapter, linear, normal, parameter, residual_std
from nanollama.models.lora import Dropout
from nanollama.models.mesh_experts import mix
from nanollama.ops import moe as ops
from nanollama.ops.mlp import swiglu

ROUTERS = "routers"  # the Linen collection in which layers leave their `RouterSums`


def gated_feed_forward(
    module: nn.Module,
    m: ModelConfig,
    h_ND: jax.Array,
    dropout: Dropout | None,
    *,
    width: int = 0,
    prefix: str = "",
) -> jax.Array:
    """SwiGLU (arXiv:2002.05202): (silu(h gate) * (h up)) down, [N, D]. width: 0 = the model's intermediate_size."""
    D, F = m.hidden_size, width or m.intermediate_size
    gate_NF = linear(module, f"{prefix}gate", h_ND, ("embed", "ffn"), (D, F), std=m.init_std, dropout=dropout)
    up_NF = linear(module, f"{prefix}up", h_ND, ("embed", "ffn"), (D, F), std=m.init_std, dropout=dropout)
    h_NF, std = swiglu(gate_NF, up_NF), residual_std(m)
    return linear(module, f"{prefix}down", h_NF, ("ffn", "embed"), (F, D), std=std, dropout=dropout)


def mixture_of_experts(
    module: nn.Module,
    m: ModelConfig,
    moe: MoeConfig,
    h_ND: jax.Array,
    real_BT: jax.Array,
    dropout: Dropout | None,
    compute: ComputeConfig,
) -> jax.Array:
    """The chosen experts' outputs, weighted, plus the shared expert's, [N, D].

    real_BT: bool, the tokens that count in the router's sums, which are left in the collection ROUTERS.
    """
    D, E, F = m.hidden_size, moe.num_experts, moe.expert_size
    router_DE = parameter(module, "router", ("embed", "router"), (D, E), normal(m.init_std))
    bias_E = None
    if moe.selection_bias:
        bias_E = parameter(module, "router_bias", ("router",), (E,), nn.initializers.zeros)
    logits_NE = jnp.dot(h_ND.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    routing = ops.route(logits_NE, moe, bias_E)

    def stacked(name: str, axes: tuple[str, ...], shape: tuple[int, ...], std: float) -> jax.Array:
        axes, shape = ("expert", *axes), (E, *shape)
        weight = parameter(module, name, axes, shape, normal(std)).astype(h_ND.dtype)
        low_rank = adapter(module, name, axes, shape, h_ND.dtype, stacked=1)
        # Merged on the spot: the grouped products know nothing of adapters. No dropout.
        return weight if low_rank is None else weight + low_rank.a @ low_rank.b

    experts = ops.Experts(
        stacked("expert_gate", ("embed", "ffn"), (D, F), m.init_std),
        stacked("expert_up", ("embed", "ffn"), (D, F), m.init_std),
        stacked("expert_down", ("ffn", "embed"), (F, D), residual_std(m)),
    )
    y_ND, dropped_NJ = mix(
        h_ND, routing, experts, path=compute.moe, factor=compute.moe_capacity, real_N=real_BT.reshape(-1)
    )
    sums = ops.router_sums(routing, real_BT, dropped_NJ)
    module.sow(ROUTERS, "sums", sums, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    if moe.shared_size:
        y_ND = y_ND + _shared_expert(module, m, moe, h_ND, dropout)
    return y_ND


def _shared_expert(
    module: nn.Module, m: ModelConfig, moe: MoeConfig, h_ND: jax.Array, dropout: Dropout | None
) -> jax.Array:
    """What every token takes beside its own experts (arXiv:2401.06066); gated in Qwen2-MoE."""
    y_ND = gated_feed_forward(module, m, h_ND, dropout, width=moe.shared_size, prefix="shared_")
    if not moe.shared_gate:
        return y_ND
    gate_D1 = parameter(module, "shared_router", ("embed", "router"), (m.hidden_size, 1), normal(m.init_std))
    return jax.nn.sigmoid(h_ND @ gate_D1.astype(h_ND.dtype)) * y_ND
