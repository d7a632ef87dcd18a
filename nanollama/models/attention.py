"""The attention layers: projections, RoPE, key cache, and the call of `ops.attention.attend`.

Letters as in `models.decoder`. Knows nothing of the residual stream.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from nanollama.config import ModelConfig
from nanollama.models.linear import linear, norm_scale
from nanollama.ops.attention import MaskSpec, attend, slide
from nanollama.ops.norms import rms_norm
from nanollama.ops.rope import apply_rope
from nanollama.parallel.mesh import constrain


class Context(NamedTuple):
    """What every layer reads alike."""

    cos_BTC: jax.Array
    sin_BTC: jax.Array
    mask: MaskSpec  # of a layer that sees all of its document


def grouped_query_attention(
    module: nn.Module,
    m: ModelConfig,
    h_ND: jax.Array,
    cache_BSGK: tuple[jax.Array, jax.Array] | None,
    window: jax.Array | None,
    context: Context,
    *,
    backend: str,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Attention with G groups of query heads that share keys and values (arXiv:2305.13245).

    Returns what is added to the residual stream, [N, D], and the cache with this call's keys and values.
    window: int32 scalar, keys that a query sees; None for all.
    """
    (B, T), D, H, G, K = context.mask.first_key_BT.shape, m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim

    def project(name: str, heads: int, axis: str) -> jax.Array:
        y_NO = linear(module, name, h_ND, ("embed", axis, "head_dim"), (D, heads, K), std=m.init_std, bias=m.qkv_bias)
        return constrain(y_NO.reshape(B, T, heads, K), "batch", None, axis, None)

    q_BTHK = project("query", H, "heads")
    k_BTGK = project("key", G, "kv_heads")
    v_BTGK = project("value", G, "kv_heads")
    if m.qk_norm:
        q_BTHK = rms_norm(q_BTHK, norm_scale(module, "query_norm", K), m.norm_eps)
        k_BTGK = rms_norm(k_BTGK, norm_scale(module, "key_norm", K), m.norm_eps)
    q_BTHK = apply_rope(q_BTHK, context.cos_BTC, context.sin_BTC)
    k_BSGK, v_BSGK = apply_rope(k_BTGK, context.cos_BTC, context.sin_BTC), v_BTGK
    if cache_BSGK is not None:
        k_BSGK, v_BSGK = cache_BSGK = (
            _write(cache_BSGK[0], k_BSGK, context.mask.query_start),
            _write(cache_BSGK[1], v_BSGK, context.mask.query_start),
        )
    a_BTHK = attend(
        q_BTHK,
        k_BSGK.astype(h_ND.dtype),
        v_BSGK.astype(h_ND.dtype),
        context.mask if window is None else slide(context.mask, window),
        backend=backend,
    )
    residual_std = m.init_std * (2 * m.num_layers) ** -0.5
    a_NI = a_BTHK.reshape(B * T, H * K)
    out_ND = linear(module, "output", a_NI, ("heads", "head_dim", "embed"), (H, K, D), inputs=2, std=residual_std)
    return out_ND, cache_BSGK


def _write(cache_BSGK: jax.Array, new_BTGK: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache_BSGK, new_BTGK.astype(cache_BSGK.dtype), index, axis=1)
