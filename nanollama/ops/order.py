"""What must not be computed before something else is known, said so that XLA:CPU keeps to it. Pure."""

import jax
import jax.numpy as jnp

from nanollama.ops.device import device


def after(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, to the bit, which on CPU cannot be had before the floats `other` are there; elsewhere x itself.

    XLA:CPU drops `optimization_barrier` before it looks for common subexpressions. What a backward pass means to
    compute again it then keeps from the forward pass, of all layers at the peak, and an array that is read once more
    after its successor took its place is copied. So x is multiplied by a 1 that depends on a value of `other`
    (NaN if that is NaN). Rows cut over several devices are left alone: one value of them would have to be sent.
    """
    if device()[0] != "cpu" or (other.ndim and jax.sharding.get_abstract_mesh().size > 1):
        return x
    first = other[(0,) * other.ndim].astype(x.dtype)
    return x * jnp.where(jnp.isnan(first), first, jnp.ones_like(first))
