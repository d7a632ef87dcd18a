"""The attention layers: projections, RoPE, key cache, and the call of `ops.attention.attend`.

Letters as in `models.decoder`. Knows nothing of the residual stream.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanollama.config import ModelConfig
from nanollama.models.linear import linear, norm_scale
from nanollama.models.mesh_attention import attend
from nanollama.ops.masks import MaskSpec, slide
from nanollama.ops.norms import rms_norm
from nanollama.ops.rope import apply_rope, score_scale
from nanollama.parallel.mesh import constrain

LATENT_NORM_EPS = 1e-6  # DeepSeek's norms of latents have this one, whatever the model's norm_eps


class Context(NamedTuple):
    """What every layer reads alike."""

    cos_BTC: jax.Array
    sin_BTC: jax.Array
    mask: MaskSpec  # of a layer that sees all of its document
    real_BT: jax.Array  # bool, tokens that count in a router's sums


def cache_heads(m: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, head dim) of what the cache holds per token as keys, and as values."""
    if m.latent is not None:
        return (1, m.latent.kv_lora_rank), (1, m.latent.qk_rope_head_dim)
    return (m.num_kv_heads, m.head_dim), (m.num_kv_heads, m.head_dim)


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


def latent_attention(
    module: nn.Module,
    m: ModelConfig,
    h_ND: jax.Array,
    cache_BSGK: tuple[jax.Array, jax.Array] | None,
    window: jax.Array | None,
    context: Context,
    *,
    backend: str,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1). Arguments and results as above.

    Per token the cache holds a latent of R = kv_lora_rank values, which keys and values of all heads are made from, and
    one rotated key, which all heads share. P = dims of a head without rotation, J = v_head_dim.
    """
    assert m.latent is not None
    latent, (B, T) = m.latent, context.mask.first_key_BT.shape
    D, H, K, R = m.hidden_size, m.num_heads, m.head_dim, latent.kv_lora_rank
    P, J = latent.qk_nope_head_dim, latent.v_head_dim

    def rotate(x_BTHC: jax.Array) -> jax.Array:
        return apply_rope(x_BTHC, context.cos_BTC, context.sin_BTC, interleaved=latent.rope_interleaved)

    if latent.q_lora_rank:
        rank = latent.q_lora_rank
        low_NR = linear(module, "query_down", h_ND, ("embed", "latent"), (D, rank), std=m.init_std)
        low_NR = rms_norm(low_NR, norm_scale(module, "query_latent_norm", rank), LATENT_NORM_EPS)
        q_NO = linear(module, "query_up", low_NR, ("latent", "heads", "head_dim"), (rank, H, K), std=m.init_std)
    else:
        q_NO = linear(module, "query", h_ND, ("embed", "heads", "head_dim"), (D, H, K), std=m.init_std)
    q_BTHK = constrain(q_NO.reshape(B, T, H, K), "batch", None, "heads", None)
    q_BTHK = jnp.concatenate([q_BTHK[..., :P], rotate(q_BTHK[..., P:])], axis=-1)

    width = R + latent.qk_rope_head_dim
    down_NR = linear(module, "key_value_down", h_ND, ("embed", "latent"), (D, width), std=m.init_std)
    latent_NR = rms_norm(down_NR[:, :R], norm_scale(module, "latent_norm", R), LATENT_NORM_EPS)
    latent_BS1R, shared_BS1C = latent_NR.reshape(B, T, 1, R), rotate(down_NR[:, R:].reshape(B, T, 1, -1))
    if cache_BSGK is not None:
        latent_BS1R, shared_BS1C = cache_BSGK = (
            _write(cache_BSGK[0], latent_BS1R, context.mask.query_start),
            _write(cache_BSGK[1], shared_BS1C, context.mask.query_start),
        )
    S = latent_BS1R.shape[1]
    latent_SR = latent_BS1R.reshape(B * S, R).astype(h_ND.dtype)
    up_SO = linear(module, "key_value_up", latent_SR, ("latent", "heads", "head_dim"), (R, H, P + J), std=m.init_std)
    up_BSHX = constrain(up_SO.reshape(B, S, H, P + J), "batch", None, "heads", None)
    shared_BSHC = jnp.broadcast_to(shared_BS1C.astype(h_ND.dtype), (B, S, H, latent.qk_rope_head_dim))
    a_BTHJ = attend(
        q_BTHK,
        jnp.concatenate([up_BSHX[..., :P], shared_BSHC], axis=-1),
        up_BSHX[..., P:],
        context.mask if window is None else slide(context.mask, window),
        backend=backend,
        scale=K**-0.5 * score_scale(m.rope_scaling),
    )
    residual_std = m.init_std * (2 * m.num_layers) ** -0.5
    a_NI = a_BTHJ.reshape(B * T, H * J)
    out_ND = linear(module, "output", a_NI, ("heads", "head_dim", "embed"), (H, J, D), inputs=2, std=residual_std)
    return out_ND, cache_BSGK


def _write(cache_BSGK: jax.Array, new_BTGK: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache_BSGK, new_BTGK.astype(cache_BSGK.dtype), index, axis=1)
