"""The GGUF format (version 2 and 3), read strictly: metadata, and tensors dequantised one at a time to float32.

Owns the container. How blocks are dequantised is the package `gguf`'s business. Knows nothing of models.
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from nanollama.data.files import DataError
from nanollama.export.weights import TensorInfo

try:
    import gguf
except ImportError as error:
    raise DataError("reading GGUF needs one more package: pip install 'nanollama[gguf]'") from error

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MEND = "Download or copy the file again."


class GgufFile:
    """A GGUF file: `metadata` by key, `tensors` by name (shape as NumPy has it), `read(name)`. A `weights.Source`."""

    def __init__(self, path: str | os.PathLike[str]):
        """Errors: DataError when it is no GGUF, truncated, or a tensor is of an unknown type."""
        self.path = Path(path)
        self.where = str(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[int, int, Any]] = {}  # name -> (offset, bytes, type)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file. --source is a .gguf file.")
        self._data = np.memmap(self.path, np.uint8, "r")
        self._at = 0
        self._read_header()

    def read(self, name: str) -> np.ndarray:
        """The tensor's values, float32."""
        offset, size, kind = self._places[name]
        values: np.ndarray = gguf.quants.dequantize(self._data[offset : offset + size], kind)
        return values.reshape(self.tensors[name].shape)

    def _read_header(self) -> None:
        if bytes(self._take(4)) != b"GGUF":
            raise DataError(f"{self.where}: does not begin with GGUF: not such a file. Give a .gguf file.")
        version, tensors, entries = self._numbers("IQQ")
        if version not in (2, 3):
            raise DataError(f"{self.where}: GGUF version {version}; versions 2 and 3 can be read. Convert it again.")
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._numbers("I")[0])
        described = [self._describe() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in described:
            self._place(name, shape, kind, start + offset)

    def _describe(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        shape = tuple(self._numbers("Q")[0] for _ in range(self._numbers("I")[0]))
        kind, offset = self._numbers("IQ")
        return name, shape[::-1], kind, offset  # GGUF names the fastest axis first

    def _place(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> None:
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise DataError(f"{self.where}: {name} is of unknown type {number}. Convert it to F16.") from error
        if shape[-1] % block:
            raise DataError(f"{self.where}: {name} has rows of {shape[-1]}, no multiple of {block}: damaged. {_MEND}")
        size = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        if offset + size > len(self._data):
            raise DataError(
                f"{self.where}: truncated: {name} ends at byte {offset + size}, the file at {len(self._data)}. {_MEND}"
            )
        dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind.name, f"quantised {kind.name}")
        self.tensors[name], self._places[name] = TensorInfo(shape, dtype), (offset, size, kind)

    def _take(self, size: int) -> np.ndarray:
        if self._at + size > len(self._data):
            raise DataError(f"{self.where}: truncated inside the header, at byte {len(self._data)}. {_MEND}")
        self._at += size
        return self._data[self._at - size : self._at]

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")).tobytes())

    def _string(self) -> str:
        try:
            return self._take(self._numbers("Q")[0]).tobytes().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where}: a text before byte {self._at} is not UTF-8: damaged. {_MEND}") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._numbers("IQ")
            if element in (_STRING, _ARRAY):
                return [self._value(element) for _ in range(count)]
            return list(self._numbers(f"{count}{self._scalar(element)}"))
        return self._numbers(self._scalar(kind))[0]

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise DataError(f"{self.where}: metadata of type {kind} before byte {self._at}: damaged. {_MEND}")
        return _SCALARS[kind]
