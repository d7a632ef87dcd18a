"""Matrix products of activations with weights, by what the device does best. Pure: no parameters, no mesh.

XLA:CPU of jaxlib 0.10 multiplies bfloat16 matrices to float32 twice as fast as to bfloat16 (4,096 x 256 by 688, AVX-512
with bfloat16: 340 and 154 GFLOP/s a core; x w and g w^T alike, x^T g is the same in both). From 0.11 on both are fast.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanollama.ops.device import device

Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

PRODUCT_NAME = "product"  # of products with a hand-written gradient, which remat's policies for products do not see
_WIDE_IS_FAST = jax.__version_info__ < (0, 11)


def matmul(x_NI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """x weight, [N, O] in x's dtype, which both operands have."""
    if not rounds_afterwards(x_NI.dtype):
        return x_NI @ weight_IO
    return checkpoint_name(_rounded(x_NI, weight_IO), PRODUCT_NAME)


def rounds_afterwards(dtype: Any) -> bool:
    """Whether products of this dtype are made in float32 and then rounded, on the device that is traced for."""
    return _WIDE_IS_FAST and dtype == jnp.bfloat16 and device()[0] == "cpu"


def product(left: jax.Array, right: jax.Array, dimensions: Dimensions) -> jax.Array:
    """`lax.dot_general` of operands of one dtype, with its result in that dtype."""
    wide = jnp.float32 if rounds_afterwards(left.dtype) else None
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=wide).astype(left.dtype)


@jax.custom_vjp
def _rounded(x_NI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    return product(x_NI, weight_IO, (((1,), (0,)), ((), ())))


def _forward(x_NI: jax.Array, weight_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded(x_NI, weight_IO), (x_NI, weight_IO)


def _backward(kept: tuple[jax.Array, jax.Array], gradient_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_NI, weight_IO = kept
    x_gradient_NI = product(gradient_NO, weight_IO, (((1,), (1,)), ((), ())))
    return x_gradient_NI, product(x_NI, gradient_NO, (((0,), (0,)), ((), ())))


_rounded.defvjp(_forward, _backward)
