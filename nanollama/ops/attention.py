"""Attention: one entry, `attend`, and its backends.

Masks are intervals (DESIGN law 13): query t sees keys [first_key, query's own index], which says causal,
documents and padding in one integer per query. Nothing here knows parameters or meshes. J is the head dim of
the values: K, but for latent attention (MLA), whose queries and keys are wider.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that exp(masked - max) is 0 and never NaN


class MaskSpec(NamedTuple):
    """Which keys each query sees: [first_key_BT[b, t], start + t], in key indices.

    query_start: None when queries and keys are the same positions (training, start = 0); an int32 scalar
    when the queries are the last written part of a longer key cache.
    """

    first_key_BT: jax.Array
    query_start: jax.Array | None = None


def slide(mask: MaskSpec, window: jax.Array | int) -> MaskSpec:
    """The mask of a layer whose queries see at most `window` keys, their own included (arXiv:2004.05150)."""
    start = 0 if mask.query_start is None else mask.query_start
    query_T = start + jnp.arange(mask.first_key_BT.shape[1])
    return mask._replace(first_key_BT=jnp.maximum(mask.first_key_BT, query_T - window + 1))


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGJ: jax.Array,
    mask: MaskSpec,
    *,
    backend: str = "auto",
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped KV heads (H a multiple of G), [B, T, H, J] in q's dtype.

    scale: what scores are multiplied by; None = K ** -0.5. Errors: ValueError when the backend is unknown or the
    shapes disagree.
    """
    T, H, S, G = q_BTHK.shape[1], q_BTHK.shape[2], k_BSGK.shape[1], k_BSGK.shape[2]
    if q_BTHK.shape[3] != k_BSGK.shape[3] or k_BSGK.shape[:3] != v_BSGJ.shape[:3]:
        raise ValueError(
            f"attend: shapes of q {q_BTHK.shape}, k {k_BSGK.shape} and v {v_BSGJ.shape} disagree: q and k share "
            "their head dim, k and v all but theirs"
        )
    if H % G:
        raise ValueError(f"attend: {H} query heads are not a multiple of {G} KV heads")
    if mask.query_start is None and T != S:
        raise ValueError(f"attend: {T} queries and {S} keys need mask.query_start")
    scale = q_BTHK.shape[3] ** -0.5 if scale is None else scale
    if backend == "reference":
        return attend_reference(q_BTHK, k_BSGK, v_BSGJ, mask, scale)
    if backend in ("auto", "xla_chunked"):
        return attend_chunked(q_BTHK, k_BSGK, v_BSGJ, mask, scale)
    raise ValueError(f"attend: unknown backend {backend!r}; known: auto, xla_chunked, reference")


def attend_reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, mask: MaskSpec, scale: float
) -> jax.Array:
    """The slow twin: repeats KV heads and builds the dense mask. For tests."""
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHJ = (jnp.repeat(x, groups, axis=2).astype(jnp.float32) for x in (k_BSGK, v_BSGJ))
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK.astype(jnp.float32), k_BSHK) * scale
    start = 0 if mask.query_start is None else mask.query_start
    key_S = jnp.arange(k_BSGK.shape[1])
    query_T = start + jnp.arange(q_BTHK.shape[1])
    seen_BTS = (key_S >= mask.first_key_BT[..., None]) & (key_S <= query_T[:, None])
    probabilities = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores_BHTS, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshj->bthj", probabilities, v_BSHJ).astype(q_BTHK.dtype)


def attend_chunked(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, mask: MaskSpec, scale: float
) -> jax.Array:
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
    outputs, lses = [], []
    for rows, keys in _blocks(q_BGRTK.shape[3], k_BGSK.shape[2], mask):
        k, v = k_BGSK[:, :, keys], v_BGSJ[:, :, keys]
        scores = _scores(q_BGRTK[:, :, :, rows], k, mask, rows)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        normaliser = weights.sum(axis=-1, keepdims=True)
        out = _product("bgqs,bgsj->bgqj", _fold(weights).astype(v.dtype), v).reshape(*weights.shape[:-1], -1)
        outputs.append((out / normaliser).astype(q_BGRTK.dtype))
        lses.append(highest + jnp.log(normaliser))
    out_BGRTJ, lse_BGRT1 = jnp.concatenate(outputs, axis=3), jnp.concatenate(lses, axis=3)
    return out_BGRTJ, (q_BGRTK, k_BGSK, v_BGSJ, mask, out_BGRTJ, lse_BGRT1)


def _blocked_backward(residuals: tuple[Any, ...], out_gradient_BGRTJ: jax.Array) -> tuple[Any, ...]:
    """Recomputes each block's weights from the logsumexp (arXiv:2205.14135, algorithm 4).

    Key and value gradients are summed as [K, S]: XLA:CPU multiplies rows^T x weights to [K, S] twice as fast
    as weights^T x rows to [S, K]. With the saved logsumexp it makes a third less work than plain autodiff.
    """
    q_BGRTK, k_BGSK, v_BGSJ, mask, out_BGRTJ, lse_BGRT1 = residuals
    dtype = q_BGRTK.dtype
    delta_BGRT1 = jnp.sum((out_BGRTJ * out_gradient_BGRTJ).astype(jnp.float32), axis=-1, keepdims=True)
    q_gradients = []
    k_gradient_BGKS = jnp.zeros(k_BGSK.swapaxes(2, 3).shape, jnp.float32)
    v_gradient_BGJS = jnp.zeros(v_BGSJ.swapaxes(2, 3).shape, jnp.float32)
    for rows, keys in _blocks(q_BGRTK.shape[3], k_BGSK.shape[2], mask):
        q, out_gradient = q_BGRTK[:, :, :, rows], out_gradient_BGRTJ[:, :, :, rows]
        k, v = k_BGSK[:, :, keys], v_BGSJ[:, :, keys]
        weights = jnp.exp(_scores(q, k, mask, rows) - lse_BGRT1[:, :, :, rows])
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


def _blocks(T: int, S: int, mask: MaskSpec) -> Iterator[tuple[slice, slice]]:
    """Query rows, and the keys they may see as far as is known when compiling."""
    size = min(max(64, T // 16), 256)  # 64 to 128 measured equal on CPU; more blocks only compile longer
    for low in range(0, T, size):
        high = min(low + size, T)
        yield slice(low, high), slice(0, high if mask.query_start is None else S)


def _scores(q_BGRTK: jax.Array, k_BGSK: jax.Array, mask: MaskSpec, rows: slice) -> jax.Array:
    """Masked scores of a block, [B, G, R, T, S] float32."""
    first_key_BT = mask.first_key_BT[:, rows]
    query_T = (0 if mask.query_start is None else mask.query_start) + jnp.arange(rows.start, rows.stop)
    key_S = jnp.arange(k_BGSK.shape[2])
    seen_BTS = (key_S >= first_key_BT[..., None]) & (key_S <= query_T[:, None])
    scores = _product("bgqk,bgsk->bgqs", _fold(q_BGRTK), k_BGSK).reshape(*q_BGRTK.shape[:-1], -1)
    return jnp.where(seen_BTS[:, None, None], scores, _MASKED)


def _fold(x_BGRTX: jax.Array) -> jax.Array:
    """The heads of a group as rows: [B, G, R * T, X]."""
    B, G, R, T, X = x_BGRTX.shape
    return x_BGRTX.reshape(B, G, R * T, X)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
