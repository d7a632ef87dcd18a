"""Matrix products in 8-bit floats with current scaling: e4m3 for values, e5m2 for gradients (arXiv:2209.05433).

Each operand is divided by its own largest magnitude, so that it fills the format, just before the product. Written as
convert, scale, multiply: XLA turns that pattern into fp8 products on GPUs that have them; elsewhere it is emulated,
with the same rounding of operands. The backward pass keeps the 8-bit operands only.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nanollama.ops.products import product

VALUES, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2
Quantised = tuple[jax.Array, jax.Array]  # the 8-bit array, and the float32 scale it is to be multiplied by


def quantise(x: jax.Array, dtype: Any) -> Quantised:
    """x / scale in 8 bits, scale = largest |x| / largest of dtype; all zeros have a scale of 1."""
    largest = float(jnp.finfo(dtype).max)
    amax = jnp.max(jnp.abs(x.astype(jnp.float32)))
    scale = jnp.where(amax > 0, amax / largest, 1.0)
    low = jnp.clip(x.astype(jnp.float32) / scale, -largest, largest)  # a quotient may round beyond, and would be NaN
    return low.astype(dtype), scale


@jax.custom_vjp
def fp8_matmul(x_NI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """x weight, [N, O] in x's dtype, of operands rounded to e4m3; gradients of e5m2-rounded cotangents."""
    return _forward(x_NI, weight_IO)[0]


def _forward(x_NI: jax.Array, weight_IO: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    x, weight = quantise(x_NI, VALUES), quantise(weight_IO, VALUES)
    types = jnp.zeros((0,), x_NI.dtype), jnp.zeros((0,), weight_IO.dtype)
    return _product(x, weight, x_NI.dtype, (1, 0)), (x, weight, types)


def _backward(kept: tuple[Any, ...], gradient_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight, (like_x, like_weight) = kept
    gradient = quantise(gradient_NO, GRADIENTS)
    x_gradient = _product(gradient, weight, like_x.dtype, (1, 1))
    return x_gradient, _product(x, gradient, like_weight.dtype, (0, 0))


fp8_matmul.defvjp(_forward, _backward)


def _product(left: Quantised, right: Quantised, dtype: Any, contracted: tuple[int, int]) -> jax.Array:
    """The product over the given axes, of the operands as `dtype` holds them.

    Behind a barrier as a pair: XLA joins products that share an operand (query, key and value do), and weights
    beside each other, each with a scale of its own, are no longer the pattern that it knows.
    """
    pair = jax.lax.optimization_barrier((left[0], right[0]))
    a, b = (x.astype(dtype) * scale.astype(dtype) for x, (_, scale) in zip(pair, (left, right), strict=True))
    return product(a, b, (((contracted[0],), (contracted[1],)), ((), ())))
