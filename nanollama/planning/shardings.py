"""The table parameters x mesh axes: where each parameter lives."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from nanollama.config import Config
from nanollama.parallel.mesh import partition_spec
from nanollama.planning.memory import Sizes
from nanollama.training.optim import make_optimizer
from nanollama.training.state import abstract_state, logical_axes


def table(config: Config, sizes: Sizes) -> str:
    """One line per parameter: shape, logical axes, the mesh axes that cut each dimension, bytes on one device."""
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    params = jax.tree_util.tree_leaves_with_path(abstract_state(config, make_optimizer(config)).params)
    axes = jax.tree.leaves(logical_axes(config.model, config.lora), is_leaf=lambda leaf: isinstance(leaf, tuple))
    rows = [("parameter", "shape", "logical axes", *sizes, "MiB a device")]
    for (path, array), names in zip(params, axes, strict=True):
        spec = partition_spec(names, array.shape, mesh)
        cuts = {axis: str(dimension) for dimension, entry in enumerate(spec)
                for axis in ((entry,) if isinstance(entry, str) else entry or ())}  # fmt: skip
        shards = math.prod(sizes[axis] for axis in cuts)
        rows.append((
            jax.tree_util.keystr(path, simple=True, separator="/"),
            "x".join(map(str, array.shape)),
            " ".join(names),
            *(f"dim {cuts[axis]}" if axis in cuts and sizes[axis] > 1 else "-" for axis in sizes),
            f"{math.prod(array.shape) * array.dtype.itemsize / shards / 2**20:,.2f}",
        ))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    mesh_line = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{config.name} on {mesh_line}; 'dim n': that dimension is cut, '-': whole", *lines])
