"""Our parameters as published tensors and back, one tensor at a time, by the maps of `models.families`.

Owns layout (transposes, stacking over layers) and the check that a set of published tensors is exactly the one that
a model needs. Knows nothing of file formats: a source is anything with `tensors` (shapes, types) and `read(name)`.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from nanollama.config import ComputeConfig, ModelConfig
from nanollama.data.files import DataError
from nanollama.models.decoder import Decoder, init_params
from nanollama.models.families.published import Family, TensorMap

FLOATS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class TensorInfo(NamedTuple):
    """Of one published tensor."""

    shape: tuple[int, ...]
    dtype: str  # NumPy's name; or a format's own name of a type that `read` gives back as float32


class Source(Protocol):
    """Published tensors that can be read one by one."""

    where: str

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray: ...


class Tensor(NamedTuple):
    """One published tensor and the place of its values in ours."""

    name: str
    shape: tuple[int, ...]
    map: TensorMap
    at: tuple[int, ...]  # index along the leading axes of ours that the name counts


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each of the decoder's parameters, by path ("layers/query"); computes nothing."""
    return {path: box.value.shape for path, box in _parameters(model).items()}


def stacked_axes(model: ModelConfig) -> dict[str, int]:
    """How many leading axes of each parameter count layers and experts."""
    return {path: sum(name in ("layers", "expert") for name in box.names) for path, box in _parameters(model).items()}


def _parameters(model: ModelConfig) -> dict[str, nn.Partitioned]:
    decoder = Decoder(model, ComputeConfig())
    tree = jax.eval_shape(lambda: init_params(decoder, 0))
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): box for path, box in leaves}


def published_tensors(model: ModelConfig, family: Family) -> list[Tensor]:
    """Every tensor of the published model, grouped by the parameter of ours that holds it."""
    shapes = parameter_shapes(model)
    maps = family.tensors(model)
    if (named := {map.ours for map in maps}) != set(shapes):
        raise DataError(
            f"{family.model_type} has no names for {sorted(set(shapes) - named)}: this model has features that the "
            "family lacks. Set config.model.family to the one that has them."
        )
    return [tensor for map in maps for tensor in _tensors_of(map, shapes[map.ours])]


def _tensors_of(map: TensorMap, shape: tuple[int, ...]) -> Iterator[Tensor]:
    counted = re.findall(r"\{(\w+)\}", map.theirs)
    stacked, own = shape[: len(counted)], shape[len(counted) :]
    if map.inputs:
        inputs, outputs = own[: map.inputs], own[map.inputs :]
        theirs: tuple[int, ...] = (int(np.prod(outputs)), int(np.prod(inputs)))
    else:  # vectors, and the table of embeddings
        theirs = own if map.ours == "embedding" else (int(np.prod(own)),)
    for index in itertools.product(*(range(size) for size in stacked)):
        numbers = dict(zip(counted, index, strict=True))
        if "layer" in numbers:
            numbers["layer"] += map.first_layer
        yield Tensor(map.theirs.format(**numbers), theirs, map, index)


def check_tensors(source: Source, expected: list[Tensor], tied: bool, left_out: str = "") -> None:
    """Refuse a source that lacks a tensor, has another one, or one of another shape or type.

    A tied model may carry its output matrix a second time, and old Llamas carry RoPE's frequencies: both follow
    from the rest. left_out: pattern of names that may be there and are not read (`Family.left_out`).
    Errors: DataError names the tensors.
    """
    names = {tensor.name for tensor in expected}
    missing = [name for name in names if name not in source.tensors]
    if missing:
        raise DataError(f"{source.where}: lacks {_some(missing)}. The file is not whole, or not of this architecture.")
    extra = [
        name
        for name in source.tensors
        if name not in names and not _is_derived(name, tied) and not (left_out and re.fullmatch(left_out, name))
    ]
    if extra:
        raise DataError(
            f"{source.where}: has {_some(extra)}, which this architecture does not have. Leaving tensors out would "
            "change what the model computes."
        )
    for tensor in expected:
        info = source.tensors[tensor.name]
        if info.shape != tensor.shape:
            raise DataError(
                f"{source.where}: {tensor.name} has shape {list(info.shape)}, the configuration needs "
                f"{list(tensor.shape)}. The weights are of another model than the configuration."
            )
        if info.dtype not in FLOATS and not info.dtype.startswith("quantised"):
            raise DataError(
                f"{source.where}: {tensor.name} is {info.dtype}; supported: {', '.join(FLOATS)}. Convert it first."
            )


def _is_derived(name: str, tied: bool) -> bool:
    return (tied and name in ("lm_head.weight", "output.weight")) or name.endswith("rotary_emb.inv_freq")


class Parts(NamedTuple):
    """One of our parameters, as parts that are published tensors."""

    read: Callable[[tuple[int, ...]], np.ndarray]  # the part at an index of the first `stacked` axes, float32
    stacked: int

    @classmethod
    def of(cls, read: Callable[[], np.ndarray]) -> "Parts":
        """One part: the whole parameter."""
        return cls(lambda index: read(), 0)

    def whole(self, shape: tuple[int, ...]) -> np.ndarray:
        """All parts together."""
        parameter = np.empty(shape, np.float32)
        for index in np.ndindex(shape[: self.stacked]):
            parameter[index] = self.read(index)
        return parameter


def adopt(source: Source, expected: list[Tensor], model: ModelConfig) -> dict[str, Parts]:
    """How each parameter of ours is read; nothing is read before a part is asked for."""
    shapes = parameter_shapes(model)
    groups: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for tensor in expected:
        groups.setdefault(tensor.map.ours, {})[tensor.at] = tensor

    def reader(path: str, tensors: dict[tuple[int, ...], Tensor]) -> Parts:
        stacked = len(next(iter(tensors)))
        return Parts(lambda index: _adopted(source, tensors[index], shapes[path][stacked:]), stacked)

    return {path: reader(path, tensors) for path, tensors in groups.items()}


def _adopted(source: Source, tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    published = source.read(tensor.name)
    own = published.T if tensor.map.inputs else published
    return np.ascontiguousarray(own, np.float32).reshape(shape)


def publish(part: np.ndarray, tensor: Tensor, dtype: str, factor: float = 1.0) -> np.ndarray:
    """The published tensor out of the part of our parameter at `tensor.at`, times `factor`, rounded to nearest."""
    own = part if factor == 1.0 else part * np.float32(factor)
    if tensor.map.inputs:
        outputs, inputs = tensor.shape
        return np.ascontiguousarray(own.reshape(inputs, outputs).T.astype(FLOATS[dtype], copy=False))
    return own.reshape(tensor.shape).astype(FLOATS[dtype], copy=False)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more
