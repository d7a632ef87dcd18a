"""The protocol of a source: what it reads, and a stream of documents and bad rows in a fixed order."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from data_pipeline.documents import Bad, Document


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One thing read: name (no absolute path, so that manifests agree between machines), size and hash."""

    path: str
    bytes: int
    sha256: str


class Source(Protocol):
    """A dataset's text. `read` may be called more than once and gives the same stream each time."""

    total_bytes: int  # raw bytes that `read` will go through; 0: unknown
    bytes_read: int  # raw bytes gone through so far

    def inputs(self) -> list[Input]:
        """Everything that decides what `read` gives."""
        ...

    def read(self) -> Iterator[Document | Bad]:
        """The rows, in an order that is the same on every run."""
        ...
