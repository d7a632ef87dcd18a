"""Declaring a parameter with its logical axes, and multiplying by it: what every layer is made of.

`module` is the Linen module that the parameter belongs to. Letters as in `models.decoder`; I, O are a product's
input and output axes.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanollama.config import LoraConfig, ModelConfig
from nanollama.models import lora as loras
from nanollama.ops import products
from nanollama.ops.fp8 import fp8_matmul


def normal(std: float) -> nn.initializers.Initializer:
    """Gaussian initial values."""
    return nn.initializers.normal(stddev=std)


def residual_std(m: ModelConfig) -> float:
    """Of the weights whose products are added to the residual stream: smaller, as 2 L are added (GPT-2)."""
    return m.init_std * (2 * m.num_layers) ** -0.5


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
    dropout: loras.Dropout | None,
    inputs: int = 1,
    bias: bool = False,
) -> jax.Array:
    """x_NI times the parameter `name`, plus `name`_bias: [N, O] in x's dtype.

    The parameter keeps the axes of `shape`, of which the first `inputs` are multiplied; here both sides are
    flattened to matrices, because XLA:CPU contracts two batch axes badly in the weight gradients.
    """
    weight = parameter(module, name, axes, shape, normal(std)).astype(x_NI.dtype)
    y_NO = matmul(module, x_NI, weight.reshape(math.prod(shape[:inputs]), -1))
    if bias:
        offset = parameter(module, f"{name}_bias", axes[inputs:], shape[inputs:], nn.initializers.zeros)
        y_NO += offset.reshape(-1).astype(x_NI.dtype)
    low_rank = adapter(module, name, axes, shape, x_NI.dtype, inputs=inputs)
    if low_rank is not None:
        x_NR = dropped(module, name, x_NI, dropout) @ low_rank.a.reshape(x_NI.shape[1], -1)
        y_NO += x_NR @ low_rank.b.reshape(x_NR.shape[1], -1)
    return y_NO


class Adapter(NamedTuple):
    """What is added to a weight [*stacked, *inputs, *outputs] is A B (`models.lora`); the scale is in B."""

    a: jax.Array  # [*stacked, *inputs, R]
    b: jax.Array  # [*stacked, R, *outputs]


def adapter(
    module: nn.Module,
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: Any,
    *,
    inputs: int = 1,
    stacked: int = 0,
) -> Adapter | None:
    """The adapter of the weight `name`, in `dtype`, where `module.lora` has one for it; else None.

    axes, shape: the weight's; its first `stacked` axes are as many weights apart (experts), the next `inputs` are
    multiplied. Who multiplies by the weight adds (x A) B, with x through `dropped`.
    """
    lora: LoraConfig | None = getattr(module, "lora", None)
    if lora is None or not loras.is_target(name, lora):
        if module.has_variable("params", name + loras.A):  # else they would be left out without a word
            raise ValueError(f"{name} has an adapter, and the Decoder was made without it: give it the run's lora.")
        return None
    cut = stacked + inputs
    bound = math.prod(shape[stacked:cut]) ** -0.5  # as the peft package begins: Kaiming, a = sqrt(5)
    a = parameter(
        module, name + loras.A, (*axes[:cut], "rank"), (*shape[:cut], lora.rank), symmetric_uniform(bound)
    )
    b = parameter(
        module,
        name + loras.B,
        (*axes[:stacked], "rank", *axes[cut:]),
        (*shape[:stacked], lora.rank, *shape[cut:]),
        nn.initializers.zeros,
    )
    return Adapter(a.astype(dtype), (b * loras.scale(lora)).astype(dtype))


def dropped(module: nn.Module, name: str, x_NI: jax.Array, dropout: loras.Dropout | None) -> jax.Array:
    """The input of the adapter of `name`: with dropout in training, which is where there are seeds for it."""
    lora: LoraConfig | None = getattr(module, "lora", None)
    if lora is None or dropout is None:
        return x_NI
    kept_NI = dropout.mask(name, x_NI.shape[1], lora.dropout)
    return jnp.where(kept_NI, x_NI / (1 - lora.dropout), 0).astype(x_NI.dtype)


def symmetric_uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform initial values in [-bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def matmul(module: nn.Module, x_NI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """x times a weight of the layers, as the module's compute settings want it."""
    if module.compute.fp8:
        return checkpoint_name(fp8_matmul(x_NI, weight_IO), products.PRODUCT_NAME)
    return products.matmul(x_NI, weight_IO)
