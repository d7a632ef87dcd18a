"""Rotary position embedding (arXiv:2104.09864), half-rotation layout: pair i is dims (i, i + K/2).

Owns the frequencies, and how they are stretched to reach beyond the trained length. C = K/2 pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nanollama.config import RopeScaling


def rope_tables(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos, sin of position * frequency, each [B, T, K/2], float32 (bfloat16 would round 257 to 256).

    With dynamic NTK each document has the frequencies of its own length, so that a packed document is rotated
    as it would be alone; while sampling, of the length so far.
    """
    positions = positions_BT.astype(jnp.float32)[..., None]
    if scaling is not None and scaling.type == "dynamic_ntk":
        angles = positions * _dynamic_ntk(positions_BT, head_dim, theta, scaling)
        return jnp.cos(angles), jnp.sin(angles)
    frequencies_C, amplitude = frequencies(head_dim, theta, scaling)
    angles = positions * frequencies_C
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def apply_rope(x_BTHK: jax.Array, cos_BTC: jax.Array, sin_BTC: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate each pair of every head by its position's angle; C = K/2. Dtype of x is kept.

    interleaved: pair i comes in as dims (2i, 2i + 1). It goes out as (i, i + K/2) all the same: queries and keys that
    are both rotated so have the same products.
    """
    left, right = (x_BTHK[..., 0::2], x_BTHK[..., 1::2]) if interleaved else jnp.split(x_BTHK, 2, axis=-1)
    cos, sin = cos_BTC[:, :, None], sin_BTC[:, :, None]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BTHK.dtype)


def score_scale(scaling: RopeScaling | None) -> float:
    """What latent attention's scores are multiplied by beside K ** -0.5 (DeepSeek V2, appendix on YaRN)."""
    if scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, float32 [K/2], and the factor of cos and sin (1 but for YaRN).

    linear: arXiv:2306.15595. ntk: theta grows so that the slowest pair is stretched by `factor`. yarn:
    arXiv:2309.00071. llama3: as published with Llama 3.1. Errors: ValueError on a type that depends on the
    length (dynamic_ntk) or is unknown.
    """
    exponents = np.arange(0, head_dim, 2) / head_dim
    plain_C = theta**-exponents
    amplitude = 1.0
    if scaling is None:
        scaled_C = plain_C
    elif scaling.type == "linear":
        scaled_C = plain_C / scaling.factor
    elif scaling.type == "ntk":
        scaled_C = (theta * scaling.factor ** (head_dim / (head_dim - 2))) ** -exponents
    elif scaling.type == "yarn":
        scaled_C = _yarn(plain_C, head_dim, theta, scaling)
        amplitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    elif scaling.type == "llama3":
        scaled_C = _llama3(plain_C, scaling)
    else:
        raise ValueError(f"rope: scaling {scaling.type!r} has no fixed frequencies")
    return scaled_C.astype(np.float32), amplitude


def _yarn(plain_C: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Pairs that turn often are kept, pairs that turn rarely divided by factor, a linear ramp between."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp_C = np.clip((np.arange(len(plain_C)) - low) / max(high - low, 0.001), 0, 1)
    return plain_C / scaling.factor * ramp_C + plain_C * (1 - ramp_C)


def _llama3(plain_C: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Wavelengths beyond the original length are divided by factor, short ones kept, a smooth step between."""
    turns_C = scaling.original_length * plain_C / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep_C = np.clip((turns_C - low) / (high - low), 0, 1)
    return plain_C / scaling.factor * (1 - keep_C) + plain_C * keep_C


def _dynamic_ntk(positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """[B, T, K/2] frequencies; theta grows with the length of the document that a position belongs to."""
    original = scaling.original_length
    length_BT = jnp.maximum(_document_length(positions_BT), original).astype(jnp.float32)
    stretch_BT = scaling.factor * length_BT / original - (scaling.factor - 1)
    theta_BT = theta * stretch_BT ** (head_dim / (head_dim - 2))
    exponents_C = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return theta_BT[..., None] ** -exponents_C


def _document_length(positions_BT: jax.Array) -> jax.Array:
    """Highest position + 1 of the run of rising positions (the document) that each token is in."""
    T = positions_BT.shape[1]
    falls_BT = positions_BT[:, 1:] <= positions_BT[:, :-1]
    last_BT = jnp.pad(falls_BT, ((0, 0), (0, 1)), constant_values=True)
    end_BT = jax.lax.cummin(jnp.where(last_BT, jnp.arange(T), T - 1), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, end_BT, axis=1) + 1
