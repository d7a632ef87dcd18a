"""Feed-forward functions. Pure: no parameters declared here, no mesh."""

import jax


def swiglu(gate_NF: jax.Array, up_NF: jax.Array) -> jax.Array:
    """The gated activation of SwiGLU (arXiv:2002.05202): silu(gate) * up."""
    return jax.nn.silu(gate_NF) * up_NF
