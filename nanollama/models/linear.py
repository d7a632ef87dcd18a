"""Declaring a parameter with its logical axes, and multiplying by it: what every layer is made of.

`module` is the Linen module that the parameter belongs to. Letters as in `models.decoder`; I, O are a product's
input and output axes.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def normal(std: float) -> nn.initializers.Initializer:
    """Gaussian initial values."""
    return nn.initializers.normal(stddev=std)


def parameter(
    module: nn.Module, name: str, axes: tuple[str, ...], shape: tuple[int, ...], init: Any
) -> jax.Array:
    """A float32 parameter; `axes` are its logical axis names (`parallel.mesh.RULES`)."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def norm_scale(module: nn.Module, name: str, size: int) -> jax.Array:
    """The scale of an RMSNorm, [size], float32."""
    return parameter(module, name, ("norm",), (size,), nn.initializers.ones)


def linear(
    module: nn.Module,
    name: str,
    x_NI: jax.Array,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    *,
    std: float,
    inputs: int = 1,
    bias: bool = False,
) -> jax.Array:
    """x_NI times the parameter `name`, plus `name`_bias: [N, O] in x's dtype.

    The parameter keeps the axes of `shape`, of which the first `inputs` are multiplied; here both sides are
    flattened to matrices, because XLA:CPU contracts two batch axes badly in the weight gradients.
    """
    weight = parameter(module, name, axes, shape, normal(std)).astype(x_NI.dtype)
    y_NO = x_NI @ weight.reshape(math.prod(shape[:inputs]), -1)
    if bias:
        offset = parameter(module, f"{name}_bias", axes[inputs:], shape[inputs:], nn.initializers.zeros)
        y_NO += offset.reshape(-1).astype(x_NI.dtype)
    return y_NO
