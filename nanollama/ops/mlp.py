"""Feed-forward functions. Pure: no parameters declared here, no mesh."""

import jax
import jax.numpy as jnp

from nanollama.ops.order import after


@jax.custom_vjp
def swiglu(gate_NF: jax.Array, up_NF: jax.Array) -> jax.Array:
    """The gated activation of SwiGLU (arXiv:2002.05202): silu(gate) * up, in float32, returned in gate's dtype.

    The backward pass keeps gate and up in their own dtype and nothing else.
    """
    return swiglu_reference(gate_NF, up_NF)


def swiglu_reference(gate_NF: jax.Array, up_NF: jax.Array) -> jax.Array:
    """The formula; the twin whose gradient autodiff finds."""
    gate32_NF = gate_NF.astype(jnp.float32)
    return (gate32_NF * jax.nn.sigmoid(gate32_NF) * up_NF.astype(jnp.float32)).astype(gate_NF.dtype)


def _forward(gate_NF: jax.Array, up_NF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu_reference(gate_NF, up_NF), (gate_NF, up_NF)


def _backward(kept: tuple[jax.Array, jax.Array], gradient_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate_NF = after(kept[0], gradient_NF)  # else its sigmoid and silu are kept from the forward pass
    gate, up, gradient = (x.astype(jnp.float32) for x in (gate_NF, kept[1], gradient_NF))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    gate_gradient = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
    return gate_gradient.astype(kept[0].dtype), (gradient * silu).astype(kept[1].dtype)


swiglu.defvjp(_forward, _backward)
