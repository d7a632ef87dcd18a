"""Attention by blocks of query rows in plain XLA: what CPUs run, and every device where nothing better fits.

Skips what causality and a static window exclude when compiling. Letters as in `ops.attention`.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanollama.kernels.flash import LSE_NAME, OUTPUT_NAME
from nanollama.ops.masks import MaskSpec
from nanollama.ops.order import after

_MASKED = -1e30  # finite, so that exp(masked - max) is 0 and never NaN


def attend_chunked(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, mask: MaskSpec, scale: float) -> jax.Array:
    """Blocks of query rows, each over just the keys that causality allows; scores are never whole.

    Head-major, with the R = H/G query heads of a KV head folded into rows, so that each block is two
    batched matrix products.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGRTK = (q_BTHK * scale).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    out_BGRTJ = _blocked(q_BGRTK, k_BSGK.transpose(0, 2, 1, 3), v_BSGJ.transpose(0, 2, 1, 3), mask)
    return out_BGRTJ.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


@jax.custom_vjp
def _blocked(q_BGRTK: jax.Array, k_BGSK: jax.Array, v_BGSJ: jax.Array, mask: MaskSpec) -> jax.Array:
    return _blocked_forward(q_BGRTK, k_BGSK, v_BGSJ, mask)[0]


def _blocked_forward(
    q_BGRTK: jax.Array, k_BGSK: jax.Array, v_BGSJ: jax.Array, mask: MaskSpec
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Output, and what the backward pass needs: the inputs, the output, and each row's logsumexp."""
    outputs: list[jax.Array] = []
    lses: list[jax.Array] = []
    for rows, keys in _blocks(q_BGRTK.shape[3], k_BGSK.shape[2], mask):
        q = _in_turn(q_BGRTK[:, :, :, rows], outputs)
        k, v = k_BGSK[:, :, keys], v_BGSJ[:, :, keys]
        scores = _scores(q, k, mask, rows, keys)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        normaliser = weights.sum(axis=-1, keepdims=True)
        out = _product("bgqs,bgsj->bgqj", _fold(weights).astype(v.dtype), v).reshape(*weights.shape[:-1], -1)
        outputs.append((out / normaliser).astype(q_BGRTK.dtype))
        lses.append(highest + jnp.log(normaliser))
    out_BGRTJ = checkpoint_name(jnp.concatenate(outputs, axis=3), OUTPUT_NAME)
    lse_BGRT1 = checkpoint_name(jnp.concatenate(lses, axis=3), LSE_NAME)
    return out_BGRTJ, (q_BGRTK, k_BGSK, v_BGSJ, mask, out_BGRTJ, lse_BGRT1)


def _blocked_backward(residuals: tuple[Any, ...], out_gradient_BGRTJ: jax.Array) -> tuple[Any, ...]:
    """Recomputes each block's weights from the logsumexp (arXiv:2205.14135, algorithm 4).

    Key and value gradients are summed as [K, S]: XLA:CPU multiplies rows^T x weights to [K, S] twice as fast
    as weights^T x rows to [S, K]. With the saved logsumexp it makes a third less work than plain autodiff.
    """
    q_BGRTK, k_BGSK, v_BGSJ, mask, out_BGRTJ, lse_BGRT1 = residuals
    q_BGRTK = after(q_BGRTK, out_gradient_BGRTJ[..., :1])  # else every block's scores are kept from the forward pass
    dtype = q_BGRTK.dtype
    delta_BGRT1 = jnp.sum((out_BGRTJ * out_gradient_BGRTJ).astype(jnp.float32), axis=-1, keepdims=True)
    q_gradients: list[jax.Array] = []
    k_gradient_BGKS = jnp.zeros(k_BGSK.swapaxes(2, 3).shape, jnp.float32)
    v_gradient_BGJS = jnp.zeros(v_BGSJ.swapaxes(2, 3).shape, jnp.float32)
    for rows, keys in _blocks(q_BGRTK.shape[3], k_BGSK.shape[2], mask):
        q = _in_turn(q_BGRTK[:, :, :, rows], q_gradients)
        out_gradient = _in_turn(out_gradient_BGRTJ[:, :, :, rows], q_gradients)
        k, v = k_BGSK[:, :, keys], v_BGSJ[:, :, keys]
        weights = jnp.exp(_scores(q, k, mask, rows, keys) - lse_BGRT1[:, :, :, rows])
        weights_gradient = _product("bgqj,bgsj->bgqs", _fold(out_gradient), v).reshape(weights.shape)
        scores_gradient = _fold(weights * (weights_gradient - delta_BGRT1[:, :, :, rows])).astype(dtype)
        q_gradients.append(_product("bgqs,bgsk->bgqk", scores_gradient, k).reshape(q.shape).astype(dtype))
        k_gradient_BGKS = k_gradient_BGKS.at[:, :, :, keys].add(_product("bgqk,bgqs->bgks", _fold(q), scores_gradient))
        v_gradient_BGJS = v_gradient_BGJS.at[:, :, :, keys].add(
            _product("bgqj,bgqs->bgjs", _fold(out_gradient), _fold(weights).astype(dtype))
        )
    k_gradient, v_gradient = (x.swapaxes(2, 3).astype(dtype) for x in (k_gradient_BGKS, v_gradient_BGJS))
    return jnp.concatenate(q_gradients, axis=3), k_gradient, v_gradient, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _in_turn(x_BGRTX: jax.Array, done: list[jax.Array]) -> jax.Array:
    """x of the next block, which waits for the last block done.

    XLA:CPU schedules breadth first: left alone it multiplies the scores of all blocks, then masks all, and so on. Each
    pass then finds its block in memory and no longer in a cache, and all scores are there at once. One layer of 8 x
    512 tokens, forward and backward, on two cores: 33.8 -> 25.5 ms, working memory 162 -> 45 MiB, the same bits.
    """
    return after(x_BGRTX, done[-1][:, :, :, : x_BGRTX.shape[3], :1]) if done else x_BGRTX


def _blocks(T: int, S: int, mask: MaskSpec) -> Iterator[tuple[slice, slice]]:
    """Query rows, and the keys they may see as far as is known when compiling."""
    size = min(max(64, T // 16), 256)  # 64 to 128 measured equal on CPU; more blocks only compile longer
    for low in range(0, T, size):
        high = min(low + size, T)
        if mask.query_start is None:
            yield slice(low, high), slice(max(0, low - mask.window + 1) if mask.window else 0, high)
        else:
            yield slice(low, high), slice(0, S)


def _scores(q_BGRTK: jax.Array, k_BGSK: jax.Array, mask: MaskSpec, rows: slice, keys: slice) -> jax.Array:
    """Masked scores of a block, [B, G, R, T, S] float32."""
    key_S = jnp.arange(keys.start, keys.stop)
    seen_BTS = (key_S >= mask.first_keys(rows)[..., None]) & (key_S <= mask.query_keys(rows)[..., None])
    scores = _product("bgqk,bgsk->bgqs", _fold(q_BGRTK), k_BGSK).reshape(*q_BGRTK.shape[:-1], -1)
    # Added, and made before, not inside the passes over the scores: comparing there again for every head took 14 % of
    # attention's time on CPU. A score plus -1e30 is -1e30.
    mask_BTS = jax.lax.optimization_barrier(jnp.where(seen_BTS, 0.0, _MASKED))
    return scores + mask_BTS[:, None, None]


def _fold(x_BGRTX: jax.Array) -> jax.Array:
    """The heads of a group as rows: [B, G, R * T, X]."""
    B, G, R, T, X = x_BGRTX.shape
    return x_BGRTX.reshape(B, G, R * T, X)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
