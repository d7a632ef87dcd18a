"""Rotary position embedding (arXiv:2104.09864), half-rotation layout: pair i is dims (i, i + K/2)."""

import jax
import jax.numpy as jnp


def rope_tables(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos, sin of position * theta^(-2i/K), each [B, T, K/2], float32 (bfloat16 would round 257 to 256)."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions_BT.astype(jnp.float32)[..., None] * theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTHK: jax.Array, cos_BTC: jax.Array, sin_BTC: jax.Array) -> jax.Array:
    """Rotate each pair of every head by its position's angle; C = K/2. Dtype of x is kept."""
    left, right = jnp.split(x_BTHK, 2, axis=-1)
    cos, sin = cos_BTC[:, :, None], sin_BTC[:, :, None]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BTHK.dtype)
