"""The attention layers: projections, RoPE, key cache, and the call of `ops.attention.attend`.

Letters as in `models.decoder`. Knows nothing of the residual stream.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanollama.config import ModelConfig
from nanollama.models.linear import linear, norm_scale, residual_std
from nanollama.models.lora import Dropout
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
    seeds_BT: jax.Array | None  # of adapters' dropout, in training


def cache_heads(m: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, head dim) of what the cache holds per token as keys, and as values."""
    if m.latent is not None:
        return (1, m.latent.kv_lora_rank), (1, m.latent.qk_rope_head_dim)
    return (m.num_kv_heads, m.head_dim), (m.num_kv_heads, m.head_dim)


def attention(
    module: nn.Module,
    m: ModelConfig,
    h_ND: jax.Array,
    cache_BSGK: tuple[jax.Array, jax.Array] | None,
    window: jax.Array | None,
    context: Context,
    dropout: Dropout | None,
    *,
    backend: str,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Attention with grouped queries, or with latents where the model has them.

    Returns what is added to the residual stream, [N, D], and the cache with this call's keys and values.
    window: int32 scalar, keys that a query sees; None for all.
    """
    project = _grouped_query if m.latent is None else _latent
    q_BTHK, kept = project(module, m, h_ND, context, dropout)
    if cache_BSGK is not None:
        start = context.mask.query_start
        kept = cache_BSGK = (_write(cache_BSGK[0], kept[0], start), _write(cache_BSGK[1], kept[1], start))
    k_BSGK, v_BSGJ = kept[0].astype(h_ND.dtype), kept[1].astype(h_ND.dtype)
    scale = None
    if m.latent is not None:
        k_BSGK, v_BSGJ = _keys_and_values(module, m, k_BSGK, v_BSGJ, dropout)
        scale = m.head_dim**-0.5 * score_scale(m.rope_scaling)
    a_BTHJ = attend(
        q_BTHK,
        k_BSGK,
        v_BSGJ,
        context.mask if window is None else slide(context.mask, window),
        backend=backend,
        scale=scale,
    )
    H, J = a_BTHJ.shape[2:]
    axes, shape = ("heads", "head_dim", "embed"), (H, J, m.hidden_size)
    a_NO = a_BTHJ.reshape(-1, H * J)
    return linear(module, "output", a_NO, axes, shape, inputs=2, std=residual_std(m), dropout=dropout), cache_BSGK


Projected = tuple[jax.Array, tuple[jax.Array, jax.Array]]  # queries, rotated; what the cache holds of this call


def _grouped_query(
    module: nn.Module, m: ModelConfig, h_ND: jax.Array, context: Context, dropout: Dropout | None
) -> Projected:
    """G groups of query heads that share keys and values (arXiv:2305.13245): keys and values are kept."""
    (B, T), D, H, G, K = context.mask.first_key_BT.shape, m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim

    def project(name: str, heads: int, axis: str) -> jax.Array:
        axes, shape = ("embed", axis, "head_dim"), (D, heads, K)
        y_NO = linear(module, name, h_ND, axes, shape, std=m.init_std, dropout=dropout, bias=m.qkv_bias)
        return constrain(y_NO.reshape(B, T, heads, K), "batch", None, axis, None)

    q_BTHK = project("query", H, "heads")
    k_BTGK = project("key", G, "kv_heads")
    v_BTGK = project("value", G, "kv_heads")
    if m.qk_norm:
        q_BTHK = rms_norm(q_BTHK, norm_scale(module, "query_norm", K), m.norm_eps)
        k_BTGK = rms_norm(k_BTGK, norm_scale(module, "key_norm", K), m.norm_eps)
    q_BTHK = apply_rope(q_BTHK, context.cos_BTC, context.sin_BTC)
    return q_BTHK, (apply_rope(k_BTGK, context.cos_BTC, context.sin_BTC), v_BTGK)


def _latent(
    module: nn.Module, m: ModelConfig, h_ND: jax.Array, context: Context, dropout: Dropout | None
) -> Projected:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1).

    Kept per token: a latent of R = kv_lora_rank values, which keys and values of all heads are made from, and one
    rotated key, which all heads share. P = dims of a head without rotation.
    """
    assert m.latent is not None
    latent, (B, T) = m.latent, context.mask.first_key_BT.shape
    D, H, K, R, P = m.hidden_size, m.num_heads, m.head_dim, latent.kv_lora_rank, latent.qk_nope_head_dim

    def project(name: str, x_NI: jax.Array, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
        return linear(module, name, x_NI, axes, shape, std=m.init_std, dropout=dropout)

    def rotate(x_BTHC: jax.Array) -> jax.Array:
        return apply_rope(x_BTHC, context.cos_BTC, context.sin_BTC, interleaved=latent.rope_interleaved)

    if latent.q_lora_rank:
        rank = latent.q_lora_rank
        low_NR = project("query_down", h_ND, ("embed", "latent"), (D, rank))
        low_NR = rms_norm(low_NR, norm_scale(module, "query_latent_norm", rank), LATENT_NORM_EPS)
        q_NO = project("query_up", low_NR, ("latent", "heads", "head_dim"), (rank, H, K))
    else:
        q_NO = project("query", h_ND, ("embed", "heads", "head_dim"), (D, H, K))
    q_BTHK = constrain(q_NO.reshape(B, T, H, K), "batch", None, "heads", None)
    q_BTHK = jnp.concatenate([q_BTHK[..., :P], rotate(q_BTHK[..., P:])], axis=-1)

    width = R + latent.qk_rope_head_dim
    down_NR = project("key_value_down", h_ND, ("embed", "latent"), (D, width))
    latent_NR = rms_norm(down_NR[:, :R], norm_scale(module, "latent_norm", R), LATENT_NORM_EPS)
    return q_BTHK, (latent_NR.reshape(B, T, 1, R), rotate(down_NR[:, R:].reshape(B, T, 1, -1)))


def _keys_and_values(
    module: nn.Module, m: ModelConfig, latent_BS1R: jax.Array, shared_BS1C: jax.Array, dropout: Dropout | None
) -> tuple[jax.Array, jax.Array]:
    """Those of all heads, from what `_latent` keeps. J = v_head_dim."""
    assert m.latent is not None
    B, S, _, R = latent_BS1R.shape
    H, P, J = m.num_heads, m.latent.qk_nope_head_dim, m.latent.v_head_dim
    axes, shape = ("latent", "heads", "head_dim"), (R, H, P + J)
    latent_SR = latent_BS1R.reshape(B * S, R)
    up_SO = linear(module, "key_value_up", latent_SR, axes, shape, std=m.init_std, dropout=dropout)
    up_BSHX = constrain(up_SO.reshape(B, S, H, P + J), "batch", None, "heads", None)
    shared_BSHC = jnp.broadcast_to(shared_BS1C, (B, S, H, shared_BS1C.shape[-1]))
    return jnp.concatenate([up_BSHX[..., :P], shared_BSHC], axis=-1), up_BSHX[..., P:]


def _write(cache_BSGK: jax.Array, new_BTGK: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache_BSGK, new_BTGK.astype(cache_BSGK.dtype), index, axis=1)
