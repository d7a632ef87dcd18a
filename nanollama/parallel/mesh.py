"""The device mesh, and the one table from logical axis names to mesh axes.

A model names the axes of its parameters and activations ("heads", "ffn", ...); only this file knows where
they live. Changing the layout of a run is one line of its config (`config.mesh`).
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nanollama.config import ConfigError, MeshConfig
from nanollama.data.strict import nearest

# The fields of MeshConfig; neighbours along the last are nearest.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # each device along them has its own rows

# Logical axis -> mesh axes its dimension is cut over. None = whole on every device.
RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ("context", *BATCH_AXES),  # of rows, or of the pieces that `parallel.context` cuts them into
    "length": None,
    "embed": ("fsdp",),
    "activation_embed": None,
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": None,
    "ffn": ("tensor",),
    "expert": ("expert",),
    "router": None,  # the router's outputs, one per expert
    "latent": None,  # what latent attention compresses to
    "vocab": ("tensor",),
    "layers": ("stage",),
    "stage": ("stage",),  # what each pipeline stage works on
    "norm": None,
    "rank": None,  # of an adapter
    "added": None,  # rows of added tokens
}

# Dimensions that are replicated, not refused, where the mesh does not divide them: with more tensor shards
# than KV heads, each shard keeps all KV heads.
_REPLICATE_IF_INDIVISIBLE = {"kv_heads"}


def mesh_sizes(config: MeshConfig, count: int) -> dict[str, int]:
    """Devices along each of AXES, of `count` devices: -1 is what is left.

    Errors: ConfigError when the sizes do not fit `count`.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        if count % known:
            raise ConfigError(
                "config.mesh",
                f"{known} devices for the given axes do not divide the {count} there are",
                "Choose sizes whose product divides the number of devices.",
            )
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) > count:
        raise ConfigError(
            "config.mesh",
            f"{' x '.join(AXES)} = {' x '.join(map(str, sizes))} needs {math.prod(sizes)} devices, {count} are there",
            "Lower a size, or set one to -1 to take what is there.",
        )
    return dict(zip(AXES, sizes, strict=True))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with the axes of MeshConfig over `devices` (default: all). Errors: as `mesh_sizes`."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = tuple(mesh_sizes(config, len(devices)).values())
    chosen = np.asarray(devices[: math.prod(sizes)]).reshape(sizes)
    return Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device(mesh: Mesh) -> Mesh:
    """The mesh of just the first device: where elastic mode keeps the state."""
    return make_mesh(MeshConfig(data=1), [mesh.devices.flat[0]])


def shards(axis: str, mesh: Mesh | AbstractMesh) -> int:
    """Parts that RULES cut a logical axis into."""
    return math.prod(mesh.shape[name] for name in RULES[axis] or ())


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where an array with these logical axes and shape lives.

    Errors: KeyError on an axis that RULES lacks; ConfigError when a dimension does not divide over its mesh
    axes; ValueError when two dimensions would land on the same mesh axis.
    """
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise KeyError(f"logical axis {axis!r} is not in RULES. {nearest(axis, list(RULES))}")
        names = RULES[axis] if axis is not None else None
        parts = shards(axis, mesh) if axis is not None else 1
        if size % parts:
            if axis not in _REPLICATE_IF_INDIVISIBLE:
                raise ConfigError(
                    "config.mesh",
                    f"{'x'.join(names or ())}={parts} does not divide the {axis} dimension of {size}",
                    f"Use mesh sizes whose product divides {size}.",
                )
            names = None
        entries.append(names if parts > 1 else None)
    used = [name for names in entries if names for name in names]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} put two dimensions on one mesh axis: {entries}")
    return PartitionSpec(*entries)


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`partition_spec` as a NamedSharding on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Devices with rows of their own; `sizes`: devices along each axis, of those left out one."""
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over BATCH_AXES, positions whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, None))


def process_block(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the rows of a global batch that this process's devices need, as one of `count` equal blocks.

    Errors: ConfigError when its devices do not hold one such block.
    """
    shards = batch_shards(mesh.shape)
    slices = batch_sharding(mesh).addressable_devices_indices_map((shards, 1)).values()
    rows = {row for where in slices if where is not None for row in range(*where[0].indices(shards))}
    low, count = min(rows), len(rows)
    if rows != set(range(low, low + count)) or low % count or shards % count:
        raise ConfigError(
            "config.mesh",
            f"the devices of process {jax.process_index()} have the batch shards {sorted(rows)} of {shards}, no block",
            "Let the inner axes (tensor, context) divide the devices of a process, or the other way round.",
        )
    return low // count, shards // count


def cuts_arrays(mesh: AbstractMesh) -> bool:
    """Whether XLA cuts arrays over `mesh`: it has several devices, and no `shard_map` around has cut them already."""
    return not (mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's layout to RULES on the mesh set by `jax.set_mesh`; without a mesh, x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        for axis in axes:
            if axis is not None and axis not in RULES:
                raise KeyError(f"logical axis {axis!r} is not in RULES. {nearest(axis, list(RULES))}")
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
