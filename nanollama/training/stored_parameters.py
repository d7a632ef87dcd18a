"""Single parameters of a checkpoint, for what must not hold the whole model: exports, imports, adapters.

Knows how a step folder stores an array. Whether the folder is whole is `training.checkpoint`'s to say.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts  # what Orbax stores arrays with

from nanollama.training.checkpoint import CheckpointError, find_step_folder, saved_arrays


def parameter_infos(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, type) of each parameter by its path, "layers/query"; `path` as in `restore_params`. Reads none."""
    saved = saved_arrays(find_step_folder(path))["params"]
    return {
        jax.tree_util.keystr(name, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for name, leaf in jax.tree_util.tree_leaves_with_path(saved)
    }


Read = Callable[[tuple[int, ...]], np.ndarray]  # of a parameter, the part at an index of its stacked axes


def parameter_reader(folder: str | Path, name: str, stacked: int) -> Read:
    """Reads one parameter ("layers/query") of a step folder part by part, by an index of its first `stacked` axes.

    stacked: 0 for the whole, at the index (). A part costs as much memory as the chunks it lies in: itself, where it
    is large (`training.checkpoint`); small ones share a chunk, which is kept until a part outside of it is asked for.
    """
    key = ".".join(["params", *name.split("/")])
    store = {"driver": "ocdbt", "base": (Path(folder).absolute() / "state").as_uri() + "/", "path": key + "/"}
    try:
        array = ts.open({"driver": "zarr", "kvstore": store}, read=True, open=True).result()
    except ValueError as error:
        raise CheckpointError(f"{folder}: {name} cannot be read: {error}. Is the folder whole?") from error
    sizes = [size or 1 for size in (array.chunk_layout.read_chunk.shape or ())[:stacked]]
    kept: dict[tuple[int, ...], np.ndarray] = {}

    def read(index: tuple[int, ...]) -> np.ndarray:
        corner = tuple(at // size * size for at, size in zip(index, sizes, strict=True))
        if corner not in kept:
            kept.clear()
            ends = (min(at + size, end) for at, size, end in zip(corner, sizes, array.shape, strict=False))
            span = tuple(slice(at, end) for at, end in zip(corner, ends, strict=True))
            kept[corner] = np.asarray(array[span].read().result())
        inside = tuple(at - start for at, start in zip(index, corner, strict=True))
        part: np.ndarray = kept[corner][inside]
        return part

    return read
