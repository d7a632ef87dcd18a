"""Normalisation. Pure functions: no parameters declared here, no mesh."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis (arXiv:1910.07467), computed in float32, returned in x's dtype.

    x: [..., D]; scale_D: [D].
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale_D).astype(x.dtype)
