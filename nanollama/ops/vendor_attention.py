"""Attention that others wrote: cuDNN's through `jax.nn`, and JAX's splash kernel for TPUs.

Each says in words what it cannot do; nothing here falls back.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from nanollama.kernels.flash import OUTPUT_NAME
from nanollama.ops.masks import MaskSpec

LANES = 128  # of a TPU's vector registers: splash cuts rows into multiples of it
_SPLASH_BLOCK = 512


def why_not_cudnn(q_BTHK: jax.Array, v_BSGJ: jax.Array, mask: MaskSpec) -> str:
    """Why cuDNN cannot compute this; empty where it can."""
    K, J = q_BTHK.shape[3], v_BSGJ.shape[3]
    if mask.documents or mask.folded:
        return "it knows no document boundaries: `jax.nn.dot_product_attention` would need a dense [T, T] mask"
    if mask.query_start is not None:
        return "queries are part of a key cache"
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {q_BTHK.dtype}"
    if K != J or K % 8 or K > 256:
        return f"head dims {K} and {J}: it needs one for keys and values, a multiple of 8 up to 256"
    return ""


def attend_cudnn(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, mask: MaskSpec, scale: float, implementation: Any = "cudnn"
) -> jax.Array:
    """Plain causal attention, with a window if the mask has one."""
    window = (mask.window - 1, 0) if mask.window else None
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGJ, scale=scale, is_causal=True, local_window_size=window, implementation=implementation
    )


def why_not_splash(q_BTHK: jax.Array, mask: MaskSpec) -> str:
    """Why splash attention cannot compute this; empty where it can."""
    T = q_BTHK.shape[1]
    if mask.query_start is not None:
        return "queries are part of a key cache"
    if mask.folded:
        return "the window differs between layers of one program, and it needs a static one"
    if T % LANES:
        return f"rows of {T} are not a multiple of {LANES}"
    return ""


def attend_splash(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, mask: MaskSpec, scale: float, interpret: bool = False
) -> jax.Array:
    """Segment ids are the first keys: two positions share a document when both begin at the same key."""
    _, T, H, _ = q_BTHK.shape
    masks = splash_attention_mask
    seen = masks.LocalMask((T, T), (mask.window - 1, 0), 0) if mask.window else masks.CausalMask((T, T))
    block = max(size for size in (LANES, 2 * LANES, _SPLASH_BLOCK) if T % size == 0)
    kernel = splash_attention_kernel.make_splash_mha(
        masks.MultiHeadMask([seen] * H),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=OUTPUT_NAME,
        interpret=interpret,
    )  # fmt: skip

    def one_row(q_HTK: jax.Array, k_GSK: jax.Array, v_GSJ: jax.Array, first_key_T: jax.Array) -> jax.Array:
        ids = splash_attention_kernel.SegmentIds(first_key_T, first_key_T) if mask.documents else None
        return kernel(q_HTK, k_GSK, v_GSJ, segment_ids=ids)

    q, k, v = (x.swapaxes(1, 2) for x in ((q_BTHK * scale).astype(q_BTHK.dtype), k_BSGK, v_BSGJ))
    return jax.vmap(one_row)(q, k, v, mask.first_key_BT).swapaxes(1, 2).astype(q_BTHK.dtype)
