"""What must not be computed before something else is known, said so that XLA:CPU keeps to it. Pure."""

import jax
import jax.numpy as jnp

from nanollama.ops.device import device


def after(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, to the bit, whose elements on CPU cannot be had before those of `other`, floats, are; elsewhere x itself.

    other: broadcasts to x. XLA:CPU drops `optimization_barrier` before it looks for common subexpressions. What a
    backward pass means to compute again it then keeps from the forward pass, of all layers at the peak, and an array
    that is read once more after its successor took its place is copied. So x is multiplied by a 1 that depends on
    `other` (NaN where that is NaN).
    """
    if device()[0] != "cpu":
        return x
    return x * jnp.where(jnp.isnan(other), other, jnp.ones_like(other)).astype(x.dtype)
