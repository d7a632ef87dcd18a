"""Attention: one entry, `attend`, and its backends.

Masks are intervals (DESIGN law 13): query t sees keys [first_key, query's own index], which says causal,
documents and padding in one integer per query. Nothing here knows parameters or meshes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that exp(masked - max) is 0 and never NaN
_CHUNK = 64  # query rows per block; 64 measured best at T=512 on CPU (docs/decisions.md)


class MaskSpec(NamedTuple):
    """Which keys each query sees: [first_key_BT[b, t], start + t], in key indices.

    query_start: None when queries and keys are the same positions (training, start = 0); an int32 scalar
    when the queries are the last written part of a longer key cache.
    """

    first_key_BT: jax.Array
    query_start: jax.Array | None = None


def attend(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: MaskSpec, *, backend: str = "auto"
) -> jax.Array:
    """Softmax attention with grouped KV heads (H a multiple of G), [B, T, H, K] in q's dtype.

    Errors: ValueError when the backend is unknown or the shapes disagree.
    """
    T, H, S, G = q_BTHK.shape[1], q_BTHK.shape[2], k_BSGK.shape[1], k_BSGK.shape[2]
    if H % G:
        raise ValueError(f"attend: {H} query heads are not a multiple of {G} KV heads")
    if mask.query_start is None and T != S:
        raise ValueError(f"attend: {T} queries and {S} keys need mask.query_start")
    if backend == "reference":
        return attend_reference(q_BTHK, k_BSGK, v_BSGK, mask)
    if backend in ("auto", "xla_chunked"):
        return attend_chunked(q_BTHK, k_BSGK, v_BSGK, mask)
    raise ValueError(f"attend: unknown backend {backend!r}; known: auto, xla_chunked, reference")


def attend_reference(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: MaskSpec) -> jax.Array:
    """The slow twin: repeats KV heads and builds the dense mask. For tests."""
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = (jnp.repeat(x, groups, axis=2).astype(jnp.float32) for x in (k_BSGK, v_BSGK))
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK.astype(jnp.float32), k_BSHK) * q_BTHK.shape[-1] ** -0.5
    start = 0 if mask.query_start is None else mask.query_start
    key_S = jnp.arange(k_BSGK.shape[1])
    query_T = start + jnp.arange(q_BTHK.shape[1])
    seen_BTS = (key_S >= mask.first_key_BT[..., None]) & (key_S <= query_T[:, None])
    probabilities = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores_BHTS, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", probabilities, v_BSHK).astype(q_BTHK.dtype)


def attend_chunked(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: MaskSpec) -> jax.Array:
    """Blocks of query rows, each over just the keys that causality allows; scores are never whole.

    Head-major, with the R = H/G query heads of a KV head folded into rows, so that each block is two
    batched matrix products. The backward pass recomputes a block's scores.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGRTK = (q_BTHK * K**-0.5).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    block = jax.checkpoint(_block)
    outputs = []
    for low in range(0, T, _CHUNK):
        high = min(low + _CHUNK, T)
        if mask.query_start is None:
            keys, values, start = k_BGSK[:, :, :high], v_BGSK[:, :, :high], jnp.int32(low)
        else:
            keys, values, start = k_BGSK, v_BGSK, mask.query_start + low
        outputs.append(block(q_BGRTK[:, :, :, low:high], keys, values, mask.first_key_BT[:, low:high], start))
    out_BGRTK = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _block(
    q_BGRTK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, first_key_BT: jax.Array, start: jax.Array
) -> jax.Array:
    B, G, R, T, K = q_BGRTK.shape
    S = k_BGSK.shape[2]
    rows = q_BGRTK.reshape(B, G, R * T, K)
    scores = jnp.einsum("bgqk,bgsk->bgqs", rows, k_BGSK, preferred_element_type=jnp.float32)
    key_S = jnp.arange(S)
    seen_BTS = (key_S >= first_key_BT[..., None]) & (key_S <= (start + jnp.arange(T))[:, None])
    scores = jnp.where(seen_BTS[:, None, None], scores.reshape(B, G, R, T, S), _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    normaliser = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bgqs,bgsk->bgqk",
        weights.astype(v_BGSK.dtype).reshape(B, G, R * T, S),
        v_BGSK,
        preferred_element_type=jnp.float32,
    )
    return (out.reshape(B, G, R, T, K) / normaliser).astype(q_BGRTK.dtype)
