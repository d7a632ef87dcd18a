"""`ops.attention.attend` on a mesh: kernels that XLA cannot cut run whole on each device's rows and heads.

XLA partitions its own operations; a Pallas or cuDNN call it would feed with whole arrays on every device. Here each
device gets its rows (mesh axes of "batch") and its heads ("heads", "kv_heads") and calls the kernel on them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nanollama.ops import attention
from nanollama.ops.masks import MaskSpec
from nanollama.parallel import context
from nanollama.parallel.mesh import cuts_arrays, partition_spec

PARTITIONED_BY_XLA = ("xla_chunked", "reference")


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGJ: jax.Array,
    mask: MaskSpec,
    *,
    backend: str = "auto",
    scale: float | None = None,
) -> jax.Array:
    """As `ops.attention.attend`, on the mesh of the program being traced. Positions are whole on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mask.pieces:
        return _attend_pieces(q_BTHK, k_BSGK, v_BSGJ, mask, backend, scale)
    backend = attention.resolve(q_BTHK, k_BSGK, v_BSGJ, mask, backend)
    if backend in PARTITIONED_BY_XLA or not cuts_arrays(mesh):
        return attention.attend(q_BTHK, k_BSGK, v_BSGJ, mask, backend=backend, scale=scale)
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    queries = partition_spec(("batch", None, "heads", None), q_BTHK.shape, mesh)
    keys = partition_spec(("batch", None, "kv_heads", None), k_BSGK.shape, mesh)
    rows, head_axes = PartitionSpec(queries[0], None), queries[2]

    def on_one_device(
        q: jax.Array, k: jax.Array, v: jax.Array, first_key_BT: jax.Array, start_B: jax.Array
    ) -> jax.Array:
        if head_axes is not None and keys[2] is None:
            k, v = _heads_of(q, k, v, head_axes, H, G)
        start = None if mask.query_start is None else start_B
        local = dataclasses.replace(mask, first_key_BT=first_key_BT, query_start=start)
        return attention.attend(q, k, v, local, backend=backend, scale=scale)

    return jax.shard_map(
        on_one_device,
        in_specs=(queries, keys, keys, rows, PartitionSpec(queries[0])),
        out_specs=queries,
        check_vma=False,  # kernels do not say how their results vary
    )(q_BTHK, k_BSGK, v_BSGJ, mask.first_key_BT, mask.starts())


def _attend_pieces(
    q_PTHK: jax.Array, k_PTGK: jax.Array, v_PTGJ: jax.Array, mask: MaskSpec, backend: str, scale: float | None
) -> jax.Array:
    """Rows are pairs of pieces: each device gathers the keys and values of its rows, and attends with its queries."""
    mesh = jax.sharding.get_abstract_mesh()
    H, G = q_PTHK.shape[2], k_PTGK.shape[2]
    queries = partition_spec(("batch", None, "heads", None), q_PTHK.shape, mesh)
    keys = partition_spec(("batch", None, "kv_heads", None), k_PTGK.shape, mesh)
    head_axes = queries[2]

    def on_one_device(q: jax.Array, k: jax.Array, v: jax.Array, first_key_PT: jax.Array) -> jax.Array:
        if head_axes is not None and keys[2] is None:
            k, v = _heads_of(q, k, v, head_axes, H, G)
        k, v = context.gather_rows(k), context.gather_rows(v)
        device, count, piece = jax.lax.axis_index("context"), context.size(), q.shape[1]
        out = []
        for late, number in ((0, device), (1, 2 * count - 1 - device)):
            seen = k.shape[1] if late else k.shape[1] // 2  # early pieces lie in the first half of their rows
            local = dataclasses.replace(
                mask, first_key_BT=first_key_PT[late::2], query_start=number * piece, pieces=False
            )
            out.append(attention.attend(q[late::2], k[:, :seen], v[:, :seen], local, backend=backend, scale=scale))
        return jnp.stack(out, axis=1).reshape(-1, *out[0].shape[1:])

    return jax.shard_map(
        on_one_device,
        in_specs=(queries, keys, keys, PartitionSpec(queries[0], None)),
        out_specs=queries,
        check_vma=False,  # kernels do not say how their results vary
    )(q_PTHK, k_PTGK, v_PTGJ, mask.first_key_BT)


def _heads_of(
    q: jax.Array, k: jax.Array, v: jax.Array, head_axes: Any, H: int, G: int
) -> tuple[jax.Array, jax.Array]:
    """Of all KV heads, which are here, those of this device's query heads."""
    first = jax.lax.axis_index(head_axes) * q.shape[2]
    heads = (first + jnp.arange(q.shape[2])) * G // H
    if H // G % q.shape[2] == 0:  # one KV head serves them all
        heads = heads[:1]
    return k[:, :, heads], v[:, :, heads]
