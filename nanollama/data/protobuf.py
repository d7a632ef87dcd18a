"""The fields of a protobuf message, read without its schema: what SentencePiece's model files are made of.

Owns the wire format (protobuf.dev/programming-guides/encoding). Knows no message.
"""

import dataclasses
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field: its number, its value (bytes also of fixed-size numbers), and all its bytes in the message."""

    number: int
    value: int | bytes
    encoded: bytes


def fields(message: bytes) -> Iterator[Field]:
    """The fields of `message`, in order. Raises ValueError where it is none, or ends inside one."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield Field(key >> 3, value, message[start:at])
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"byte {start} starts no field: damaged")
        first, at = at, at + size
        if at > len(message):
            raise ValueError("ends inside a field: truncated")
        yield Field(key >> 3, message[first:at], message[start:at])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("ends inside a field: truncated")
