"""The protocol of a source: what it reads, in parts that processes can share, each a stream in a fixed order."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from data_pipeline.text.documents import Bad, Document

State = dict[str, Any]  # plain JSON: where a reader stands


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One thing read: name (no absolute path, so that manifests agree between machines), size and hash."""

    path: str
    bytes: int
    sha256: str


class Reader(Protocol):
    """One pass through a part. Iterate it once."""

    bytes_read: int  # raw bytes gone through so far

    def __iter__(self) -> Iterator[Document | Bad]:
        """The rows, in an order that is the same on every run."""
        ...

    def state(self) -> State:
        """Where it stands after the row it gave last: `Part.open` goes on from there."""
        ...


class Part(Protocol):
    """A piece of a dataset that one process reads from its start to its end. Picklable."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def bytes(self) -> int:
        """Raw bytes to go through; 0: unknown."""
        ...

    def inputs(self) -> list[Input]:
        """Everything that decides what it gives."""
        ...

    def open(self, state: State | None = None) -> Reader:
        """A reader at the start, or where another one stood."""
        ...


class Source(Protocol):
    """A dataset's text."""

    def parts(self) -> Sequence[Part]:
        """Its parts in their order; the same whatever the number of processes."""
        ...


def read_all(source: Source) -> Iterator[Document | Bad]:
    """Every row of `source`, in order."""
    for part in source.parts():
        yield from part.open()
