"""Rows of the embedding table for tokens, and on GPUs a gradient that has an order: `ops.embedding` on a mesh.

XLA cannot cut a sort over devices: each sums its own tokens for its own rows of the table, then these are added.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nanollama.ops.device import device
from nanollama.ops.embedding import sums_by_id
from nanollama.parallel.mesh import cuts_arrays, partition_spec


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """table_VD[tokens_BT], [B, T, D], on the mesh of the program being traced; tokens are within the table."""
    if device()[0] != "gpu":  # elsewhere scatter-adds have an order, and are fast
        return table_VD[tokens_BT]
    return ordered(len(table_VD), table_VD, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ordered(size: int, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """`look_up` with the gradient of GPUs, on any device."""
    return table_VD[tokens_BT]


def _forward(size: int, table_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, Any]:
    return table_VD[tokens_BT], (tokens_BT, jnp.zeros(0, table_VD.dtype))


def _backward(size: int, kept: tuple[jax.Array, jax.Array], gradient_BTD: jax.Array) -> tuple[jax.Array, None]:
    tokens_BT, like_table = kept
    mesh = jax.sharding.get_abstract_mesh()
    if not cuts_arrays(mesh):
        sums_VD = _sums(gradient_BTD, tokens_BT, size)
    else:
        gradient = partition_spec(("batch", None, "activation_embed"), gradient_BTD.shape, mesh)
        table = partition_spec(("vocab", "activation_embed"), (size, gradient_BTD.shape[2]), mesh)

        def on_one_device(gradient_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
            rows = size
            if table[0] is not None:
                rows //= jax.lax.axis_size(table[0])
                tokens_BT = tokens_BT - jax.lax.axis_index(table[0]) * rows
            sums_VD = _sums(gradient_BTD, tokens_BT, rows)
            return sums_VD if gradient[0] is None else jax.lax.psum(sums_VD, gradient[0])

        sums_VD = jax.shard_map(
            on_one_device,
            in_specs=(gradient, PartitionSpec(gradient[0], None)),
            out_specs=table,
            check_vma=False,  # a sort does not say how its result varies
        )(gradient_BTD, tokens_BT)
    return sums_VD.astype(like_table.dtype), None


ordered.defvjp(_forward, _backward)


def _sums(gradient_BTD: jax.Array, tokens_BT: jax.Array, rows: int) -> jax.Array:
    return sums_by_id(gradient_BTD.reshape(-1, gradient_BTD.shape[-1]), tokens_BT.reshape(-1), rows)
