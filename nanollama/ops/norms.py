"""Normalisation. Pure functions: no parameters declared here, no mesh."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis (arXiv:1910.07467), computed in float32, returned in x's dtype.

    x: [..., D]; scale_D: [D]. The backward pass keeps x in its own dtype and computes the rest again: autodiff would
    keep two float32 arrays of x's size.
    """
    return rms_norm_reference(x, scale_D, eps)


def rms_norm_reference(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """The formula; the twin whose gradient autodiff finds."""
    x32 = x.astype(jnp.float32)
    return (x32 * _inverse(x32, eps) * scale_D).astype(x.dtype)


def _inverse(x32: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)


def _forward(x: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rms_norm_reference(x, scale_D, eps), (x, scale_D)


def _backward(eps: float, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale_D = kept
    x32, gradient32 = x.astype(jnp.float32), gradient.astype(jnp.float32)
    inverse = _inverse(x32, eps)
    normal = x32 * inverse
    scaled = gradient32 * scale_D
    x_gradient = inverse * (scaled - normal * jnp.mean(scaled * normal, axis=-1, keepdims=True))
    scale_gradient_D = jnp.sum(gradient32 * normal, axis=tuple(range(x.ndim - 1)))
    return x_gradient.astype(x.dtype), scale_gradient_D.astype(scale_D.dtype)


rms_norm.defvjp(_forward, _backward)
