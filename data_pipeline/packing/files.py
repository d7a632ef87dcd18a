"""Packing, third part: one file of packed records, written by its recipe and read back against it.

A recipe says which tokens of which documents each record of a file holds. It is decided from lengths alone before any
file is written, so files are made in as many processes as one likes, with the same bytes. Knows nothing of splits,
windows or text.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipeline.engine.stage import finished_file, mark_finished
from nanollama.data.files import DataError, sha256_file
from nanollama.data.format import Record, decode_record, encode_record
from nanollama.data.packed import WRITER_OPTIONS

HELD_TOKENS = 1 << 21  # of records held at once when they are written or read back
CHECKED_TOKENS = 1 << 23  # of records in one task, at most
_BUG = "This is a bug; please report it."


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The segments of consecutive records, P in R records."""

    documents: np.ndarray  # [P] uint32
    sources: np.ndarray  # [P] uint16
    shards: np.ndarray  # [P] uint32, which file of tokens the document is in
    places: np.ndarray  # [P] int64, of the segment's first token in that file
    lengths: np.ndarray  # [P] uint32, tokens
    first: np.ndarray  # [R + 1] int64, first segment of each record

    @property
    def records(self) -> int:
        """How many records it is for."""
        return len(self.first) - 1

    def cut(self, start: int, stop: int) -> "Recipe":
        """The recipe of records `start` to `stop`."""
        a, b = int(self.first[start]), int(self.first[stop])
        return Recipe(self.documents[a:b], self.sources[a:b], self.shards[a:b], self.places[a:b], self.lengths[a:b],
                      self.first[start:stop + 1] - a)

    @staticmethod
    def joined(parts: Sequence["Recipe"]) -> "Recipe":
        """One recipe after the other; of one or more."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts])
                   for name in ("documents", "sources", "shards", "places", "lengths")}
        counts = np.concatenate([np.diff(part.first) for part in parts])
        return Recipe(**columns, first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    def save(self, path: Path) -> None:
        """Write it; the name means that it is whole."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """What `save` wrote."""
        with np.load(path) as saved:
            return cls(**{field.name: saved[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class FileTask:
    """One file of records."""

    split: str
    path: str
    recipe: str  # path
    tokens: tuple[str, ...]  # files of tokens, by shard
    dtype: str  # of the tokens
    record_length: int
    records: int
    weight: int  # tokens

    @property
    def label(self) -> str:
        """For messages."""
        return Path(self.path).name


@dataclasses.dataclass(frozen=True)
class CheckTask:
    """Some records of a finished file, to be compared with the documents."""

    file: FileTask
    start: int
    stop: int

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.file.label} records {self.start} to {self.stop}"


class TokenStore:
    """Tokens of any place in the shards' files, memory-mapped."""

    OPEN = 1024  # files at once

    def __init__(self, paths: Sequence[str], dtype: str):
        self._paths, self._dtype = paths, np.dtype(dtype)
        self._open: dict[int, np.ndarray] = {}

    def get(self, recipe: Recipe) -> np.ndarray:
        """The tokens of all segments of `recipe`, end to end."""
        parts = [self._file(shard)[place:place + length] for shard, place, length in
                 zip(recipe.shards.tolist(), recipe.places.tolist(), recipe.lengths.tolist(), strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, self._dtype)

    def _file(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            if len(self._open) >= self.OPEN:
                self._open.pop(next(iter(self._open)))
            # a plain array: slices of np.memmap take ten times as long
            self._open[shard] = np.asarray(np.memmap(self._paths[shard], self._dtype, "r"))
        return self._open[shard]


def write_file(task: FileTask) -> dict[str, Any]:
    """Write one file unless it is there; returns {path, split, bytes, sha256, records}."""
    path = Path(task.path)
    if (known := finished_file(path)) is not None:
        return known
    recipe, store = Recipe.load(Path(task.recipe)), TokenStore(task.tokens, task.dtype)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
    for start, stop in _runs(0, recipe.records, task.record_length):
        part = recipe.cut(start, stop)
        tokens, starts, ends = store.get(part), _starts(part), _ends(part)[part.first]
        for record, (first, last) in enumerate(itertools.pairwise(part.first.tolist())):
            writer.write(encode_record(Record(tokens[ends[record]:ends[record + 1]], starts[first:last],
                                              part.documents[first:last], part.sources[first:last])))
    writer.close()
    os.replace(temporary, path)
    row = {"path": path.name, "split": task.split, "bytes": path.stat().st_size, "sha256": sha256_file(path),
           "records": recipe.records}
    mark_finished(path, row)
    return row


def check_tasks(file: FileTask) -> list[CheckTask]:
    """All records of a file, in parts."""
    step = max(1, CHECKED_TOKENS // file.record_length)
    return [CheckTask(file, start, min(start + step, file.records)) for start in range(0, file.records, step)]


def check_records(task: CheckTask) -> int:
    """Read records back and compare them with the recipe, and every token with its document; returns the tokens.

    Errors: DataError when a token is lost, repeated or changed, or a record is not the one that was planned.
    """
    recipe, store = Recipe.load(Path(task.file.recipe)), TokenStore(task.file.tokens, task.file.dtype)
    total = 0
    reader = ArrayRecordReader(task.file.path)
    try:
        if reader.num_records() != recipe.records:
            raise DataError(f"{task.file.label}: {reader.num_records()} records, {recipe.records} were planned. {_BUG}")
        for start, stop in _runs(task.start, task.stop, task.file.record_length):
            part = recipe.cut(start, stop)
            tokens = store.get(part)
            _compare([decode_record(data) for data in reader.read(start, stop)], part, tokens,
                     f"{task.file.label} records {start} to {stop}")
            if (longest := int(np.diff(_ends(part)[part.first]).max())) > task.file.record_length:
                raise DataError(f"{task.file.label} records {start} to {stop}: one of {longest} tokens, record length "
                                f"{task.file.record_length}. {_BUG}")
            total += len(tokens)
    finally:
        reader.close()
    return total


def _compare(found: list[Record], recipe: Recipe, tokens: np.ndarray, where: str) -> None:
    """Raises DataError unless `found` are the records of `recipe`, whose tokens are `tokens`, end to end."""
    ends = _ends(recipe)
    wanted = {"tokens": tokens, "starts": _starts(recipe), "documents": recipe.documents, "sources": recipe.sources}
    sizes = {"tokens": np.diff(ends[recipe.first]), "starts": np.diff(recipe.first)}
    for name, column in wanted.items():
        columns = [getattr(record, name) for record in found]
        same = name not in sizes or np.array_equal([len(one) for one in columns], sizes[name])
        if not same or not np.array_equal(np.concatenate(columns), column):
            raise DataError(f"{where}: their {name} are not those of the documents. {_BUG}")


def _ends(recipe: Recipe) -> np.ndarray:
    """[P + 1] tokens before each segment, and in all."""
    return np.concatenate([[0], np.cumsum(recipe.lengths, dtype=np.int64)])


def _starts(recipe: Recipe) -> np.ndarray:
    """[P] uint32, the first token of each segment within its record."""
    ends = _ends(recipe)
    return (ends[:-1] - np.repeat(ends[recipe.first[:-1]], np.diff(recipe.first))).astype(np.uint32)


def _runs(start: int, stop: int, record_length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of records that are held together."""
    step = max(1, HELD_TOKENS // record_length)
    return ((first, min(first + step, stop)) for first in range(start, stop, step))
