"""The safetensors format, one tensor at a time: a header in JSON, then the tensors' bytes.

Reading maps files into memory and copies nothing before a tensor is asked for; writing takes each tensor when its
turn comes. (The `safetensors` package writes only whole dicts.) Knows nothing of models.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nanollama.data.files import DataError, into_place, read_json, write_json
from nanollama.export.weights import TensorInfo

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_MEND = "Download or copy the file again."


class SafetensorsDirectory:
    """All tensors of a published model: of one file, or of the files that an index names. A `weights.Source`."""

    def __init__(self, directory: str | os.PathLike[str]):
        """Errors: DataError when there is no such file, one is damaged or truncated, or index and files disagree."""
        self.directory = Path(directory)
        self.where = str(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        index = self.directory / INDEX_FILE
        if index.is_file():
            of_tensor = _weight_map(index)
            for name in sorted(set(of_tensor.values())):
                self._open(self.directory / name)
            lost = sorted(set(of_tensor) - set(self.tensors))
            if lost:
                file = self.directory / of_tensor[lost[0]]
                raise DataError(f"{file}: lacks {lost[0]}, which {INDEX_FILE} puts there. {_MEND}")
        else:
            self._open(self.directory / SINGLE_FILE)

    def read(self, name: str) -> np.ndarray:
        """A view of the tensor's bytes on disk."""
        path, offset = self._places[name]
        info = self.tensors[name]
        return np.memmap(path, np.uint8, "r", offset, _bytes(info)).view(_numpy(info.dtype)).reshape(info.shape)

    def _open(self, path: Path) -> None:
        for name, (info, offset) in _read_header(path).items():
            if name in self.tensors:
                raise DataError(f"{path}: {name} is also in {self._places[name][0].name}. {_MEND}")
            self.tensors[name], self._places[name] = info, (path, offset)


def _weight_map(index: Path) -> dict[str, str]:
    """File of each tensor. Errors: DataError when the index is no such table, or leaves its folder."""
    found = read_json(index)
    table = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not all(isinstance(name, str) and "/" not in name for name in table.values()):
        raise DataError(f"{index}: has no weight_map of tensors to files beside it: damaged. {_MEND}")
    return table


def _read_header(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """(info, offset in the file) of each tensor, checked against the size of the file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give a folder with {SINGLE_FILE}, or {INDEX_FILE} and its files.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise DataError(f"{path}: truncated, or not safetensors: {size} bytes, a header of {length}. {_MEND}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise DataError(f"{path}: the header is not JSON: damaged, or not safetensors. {_MEND}") from error
    if not isinstance(header, dict):
        raise DataError(f"{path}: the header is no table of tensors: damaged, or not safetensors. {_MEND}")
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            info, begin, end = _read_entry(entry, f"{path}: {name}")
            last = 8 + length + end
            if last > size:
                raise DataError(f"{path}: truncated: {name} ends at byte {last}, the file at {size}. {_MEND}")
            found[name] = (info, 8 + length + begin)
    return found


def _read_entry(entry: Any, where: str) -> tuple[TensorInfo, int, int]:
    """(info, first byte, byte after the last) of what the header says of one tensor."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{where}: its entry in the header is not whole: {entry!r}: damaged. {_MEND}") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise DataError(f"{where}: shape {shape!r} or bytes {begin!r} to {end!r} are not whole numbers. {_MEND}")
    if dtype not in _TYPES:
        raise DataError(f"{where} is {dtype}; known: {', '.join(_TYPES)}. Convert it first.")
    info = TensorInfo(tuple(shape), _TYPES[dtype].name)
    if end - begin != _bytes(info):
        raise DataError(f"{where} has {end - begin} bytes, its shape needs {_bytes(info)}: damaged. {_MEND}")
    return info, begin, end


def write_safetensors(
    directory: str | os.PathLike[str],
    groups: Sequence[tuple[Callable[[], Any], list[tuple[str, TensorInfo]]]],
    cut: Callable[[Any, str], np.ndarray],
    *,
    shard_bytes: int,
    single: str = SINGLE_FILE,
) -> list[Path]:
    """Write tensors as one file, or as shards of about `shard_bytes` with an index; returns the files.

    single: the name of the file where there is only one.

    groups: (load, [(name, info)]): `load()` is called when the first tensor of its group is due, and its result
    handed to `cut(loaded, name)` for each; so no more than one group is in memory. A group is never in two files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(groups, shard_bytes)
    of_tensor: dict[str, str] = {}
    paths = []
    for number, shard in enumerate(shards, 1):
        name = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, cut)
        of_tensor |= {tensor: name for _, tensors in shard for tensor, _ in tensors}
        paths.append(directory / name)
    if len(shards) > 1:
        total = sum(_bytes(info) for _, tensors in groups for _, info in tensors)
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": of_tensor})
        paths.append(directory / INDEX_FILE)
    return paths


def _shards(groups: Sequence[Any], shard_bytes: int) -> list[list[Any]]:
    shards: list[list[Any]] = [[]]
    filled = 0
    for group in groups:
        size = sum(_bytes(info) for _, info in group[1])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(group)
        filled += size
    return shards


def _write_file(path: Path, shard: list[Any], cut: Callable[[Any, str], np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    names = {_numpy(dtype.name): name for name, dtype in _TYPES.items()}
    for _, tensors in shard:
        for name, info in tensors:
            header[name] = {
                "dtype": names[_numpy(info.dtype)],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + _bytes(info)],
            }
            offset += _bytes(info)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for load, tensors in shard:
            loaded = load()
            for name, info in tensors:
                array = np.ascontiguousarray(cut(loaded, name))
                if array.shape != info.shape or array.dtype != _numpy(info.dtype):
                    raise ValueError(f"{name}: {array.shape} {array.dtype} written as {info}")
                file.write(array.reshape(-1).view(np.uint8).data)
            del loaded
    into_place(temporary, path)


def _numpy(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _bytes(info: TensorInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64)) * _numpy(info.dtype).itemsize


def metadata_of(tensors: Mapping[str, TensorInfo]) -> str:
    """The one float type of all tensors, or float32 where they differ."""
    types = {info.dtype for info in tensors.values()}
    return types.pop() if len(types) == 1 else "float32"
