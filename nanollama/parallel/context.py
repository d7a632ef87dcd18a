"""Context parallelism: rows cut into pieces along their positions, one pair of pieces per row on each device.

A row of T positions becomes 2C pieces, C the mesh's `context` size. Device j has pieces j and 2C - 1 - j: under causal
attention an early piece sees few keys and a late one many, so every pair is the same work. Everything but attention
treats a piece as a row. Attention gathers the keys and values of the whole row (`models.mesh_attention`), so documents
and windows mean what they mean on one device. Knows nothing of models.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nanollama.config import ConfigError
from nanollama.parallel.mesh import constrain


def size() -> int:
    """Devices along `context` in the mesh of the program being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get("context", 1)


def check_length(length: int, count: int) -> None:
    """Refuse a row length that cannot be cut for `count` devices along `context`."""
    if count > 1 and length % (2 * count):
        raise ConfigError(
            "config.mesh.context", f"{count} devices with 2 pieces each do not divide sequence_length={length}",
            f"Use a multiple of {2 * count}, or fewer devices.",
        )  # fmt: skip


def to_pieces(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """[B, T] arrays -> [C * B * 2, T / 2C]: for each device, for each row, its early and its late piece."""
    count = size()
    return {name: constrain(_cut(x_BT, count), "batch", None) for name, x_BT in arrays.items()}


def to_rows(x_P: jax.Array) -> jax.Array:
    """The inverse of `to_pieces`: [C * B * 2, T / 2C] -> [B, T]."""
    count, length = size(), x_P.shape[1]
    early_late = x_P.reshape(count, -1, 2, length)  # [C, B, 2, T / 2C]
    in_order = jnp.concatenate([early_late[:, :, 0], early_late[::-1, :, 1]])  # [2C, B, T / 2C]
    return in_order.swapaxes(0, 1).reshape(-1, 2 * count * length)


def starts(rows: int, length: int) -> jax.Array:
    """[C * B * 2] int32: the position in its row of each piece's first token; `rows` pieces of `length`."""
    count = size()
    device, late = jnp.arange(rows) // (rows // count), jnp.arange(rows) % 2
    return (jnp.where(late == 1, 2 * count - 1 - device, device) * length).astype(jnp.int32)


def split_rows(x_P: jax.Array, micro_batches: int, *, pieces: bool) -> jax.Array:
    """[B, ...] -> [M, B / M, ...]: micro-batch m has the rows m::M (or their pieces), where they are."""
    count, pair = (size(), 2) if pieces else (1, 1)
    x = x_P.reshape(count, -1, micro_batches, pair, *x_P.shape[1:])
    return jnp.moveaxis(x, 2, 0).reshape(micro_batches, -1, *x_P.shape[1:])


def join_rows(x_MP: jax.Array, *, pieces: bool) -> jax.Array:
    """The inverse of `split_rows`."""
    count, pair = (size(), 2) if pieces else (1, 1)
    x = x_MP.reshape(x_MP.shape[0], count, -1, pair, *x_MP.shape[2:])
    return jnp.moveaxis(x, 0, 2).reshape(-1, *x_MP.shape[2:])


def row_sums(x_P: jax.Array, axis: int = 0) -> jax.Array:
    """Sums over the pieces of each row: an axis of C * B * 2 becomes one of B."""
    count = size()
    x_P = jnp.moveaxis(x_P, axis, 0)
    per_row = x_P.reshape(count, -1, 2, *x_P.shape[1:]).sum(axis=(0, 2))
    return jnp.moveaxis(per_row, 0, axis)


def gather_rows(x_pieces: jax.Array) -> jax.Array:
    """Inside `shard_map`: this device's pieces [b * 2, T / 2C, ...] -> its rows whole, [b, T, ...]."""
    b = x_pieces.shape[0] // 2
    gathered = jax.lax.all_gather(x_pieces.reshape(b, 2, *x_pieces.shape[1:]), "context")  # [C, b, 2, T / 2C, ...]
    in_order = jnp.concatenate([gathered[:, :, 0], gathered[::-1, :, 1]])  # [2C, b, T / 2C, ...]
    return jnp.moveaxis(in_order, 0, 1).reshape(b, -1, *x_pieces.shape[2:])


def _cut(x_BT: jax.Array, count: int) -> jax.Array:
    B, T = x_BT.shape
    pieces = x_BT.reshape(B, 2 * count, T // (2 * count))
    pairs = jnp.stack([pieces[:, :count], pieces[:, ::-1][:, :count]], axis=2)  # [B, C, 2, T / 2C]
    return pairs.swapaxes(0, 1).reshape(B * count * 2, -1)
