"""Packing, second half: token files to packed records, their files, and the proof that no token is lost.

Owns the order of records and documents on disk. One process, streaming: memory is a window of documents and a
few integers per document. Knows nothing of text.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipeline.bestfit import Piece, plan
from data_pipeline.pack_tokens import ShardTask
from nanollama.data.files import DataError, sha256_file
from nanollama.data.format import Record, decode_record, encode_record
from nanollama.data.packed import DOCUMENTS_FILE, WRITER_OPTIONS

SPLITS = ("train", "validation")
WINDOW_DOCUMENTS = 10_000
WINDOW_RECORDS = 2_000  # a window also holds this much text: its last record is the one with room left over
FILE_BYTES = 256_000_000  # of tokens in one file, before compression
READ_RECORDS = 1_000


@dataclasses.dataclass
class Documents:
    """What is known of each document, in corpus order; the index is the `doc` of the records."""

    tokens: np.ndarray  # [N] uint32
    sources: np.ndarray  # [N] uint16
    validation: np.ndarray  # [N] bool
    bytes: np.ndarray  # [N] uint64
    characters: np.ndarray  # [N] uint64
    first: np.ndarray  # [shards + 1] first document of each shard
    record: np.ndarray  # [N] uint32, first record within the split; filled by `write_split`
    segment: np.ndarray  # [N] uint32, segment within that record; filled by `write_split`


class TokenStore:
    """Tokens of any document, from the memory-mapped shard files."""

    def __init__(self, tasks: list[ShardTask], documents: Documents, dtype: np.dtype):
        self._tasks, self._documents, self._dtype = tasks, documents, dtype
        self._shard = -1
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def get(self, document: int) -> np.ndarray:
        """All tokens of a document, as a view."""
        shard = int(np.searchsorted(self._documents.first, document, "right")) - 1
        if shard not in self._open:
            if len(self._open) > 64:  # windows go through the shards in order
                self._open.pop(next(iter(self._open)))
            start, stop = self._documents.first[shard:shard + 2]
            ends = np.cumsum(self._documents.tokens[start:stop], dtype=np.int64)
            self._open[shard] = (np.memmap(self._tasks[shard].tokens_path, self._dtype, "r"), ends)
        tokens, ends = self._open[shard]
        index = document - int(self._documents.first[shard])
        return tokens[int(ends[index - 1]) if index else 0:int(ends[index])]


def load_documents(tasks: list[ShardTask]) -> Documents:
    """The documents of all shards. A text that is held out anywhere is held out everywhere."""
    names = ("tokens", "source", "validation", "bytes", "characters")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    held_out: set[str] = set()
    digests: list[pyarrow.ChunkedArray] = []
    for task in tasks:
        table = pyarrow.parquet.read_table(task.table_path, columns=[*names, "sha256"])
        for name in names:
            columns[name].append(table.column(name).to_numpy())
        held_out.update(table.column("sha256").filter(table.column("validation")).to_pylist())
        digests.append(table.column("sha256"))
    values = pyarrow.array(sorted(held_out), pyarrow.string())
    validation = [pyarrow.compute.is_in(column, value_set=values).to_numpy() for column in digests]
    count = sum(len(column) for column in columns["tokens"])
    if count >= 1 << 32:
        raise DataError(
            f"{count} documents, a packed set holds at most {(1 << 32) - 1}. Pack the corpus in parts.")
    whole = {name: np.concatenate(columns[name]) for name in names}
    return Documents(
        tokens=whole["tokens"], sources=whole["source"], validation=np.concatenate(validation).astype(bool),
        bytes=whole["bytes"], characters=whole["characters"],
        first=np.cumsum([0, *(len(column) for column in columns["tokens"])]),
        record=np.zeros(count, np.uint32), segment=np.zeros(count, np.uint32))


def windows(lengths: np.ndarray, record_length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of documents that are packed together."""
    start, tokens = 0, 0
    for index, length in enumerate(lengths.tolist()):
        tokens += length
        if index + 1 - start >= WINDOW_DOCUMENTS and tokens >= WINDOW_RECORDS * record_length:
            yield start, index + 1
            start, tokens = index + 1, 0
    if start < len(lengths):
        yield start, len(lengths)


def write_split(split: str, documents: Documents, store: TokenStore, record_length: int, directory: Path,
                report: Any) -> list[dict[str, Any]]:
    """Write the records of one split, fill documents.record and .segment; returns its files' rows."""
    chosen = np.flatnonzero(documents.validation == (split == "validation"))
    writer = _RecordWriter(directory, split, max(1, FILE_BYTES // (4 * record_length)))
    for start, stop in windows(documents.tokens[chosen], record_length):
        members = chosen[start:stop]
        for pieces in plan(documents.tokens[members].tolist(), record_length):
            for segment, piece in enumerate(pieces):
                if piece.start == 0:
                    documents.record[members[piece.item]] = writer.records
                    documents.segment[members[piece.item]] = segment
            writer.write(encode_record(_record(pieces, members, documents, store)))
        report(int(documents.tokens[members].sum()))
    return writer.finish()


def _record(pieces: list[Piece], members: np.ndarray, documents: Documents, store: TokenStore) -> Record:
    rows = [int(members[piece.item]) for piece in pieces]
    parts = [store.get(row)[piece.start:piece.stop] for row, piece in zip(rows, pieces, strict=True)]
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return Record(np.concatenate(parts), starts.astype(np.uint32), np.array(rows, np.uint32),
                  documents.sources[rows])


class _RecordWriter:
    """Numbered ArrayRecord files of one split."""

    def __init__(self, directory: Path, split: str, per_file: int):
        self.directory, self.split, self.per_file = directory, split, per_file
        self.records = 0
        self._files: list[dict[str, Any]] = []
        self._writer: ArrayRecordWriter | None = None

    def write(self, data: bytes) -> None:
        if self._writer is None:
            self._path = self.directory / f"{self.split}-{len(self._files):05d}.array_record"
            self._writer, self._first = ArrayRecordWriter(str(self._path), WRITER_OPTIONS), self.records
        self._writer.write(data)
        self.records += 1
        if self.records - self._first >= self.per_file:
            self.finish()

    def finish(self) -> list[dict[str, Any]]:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._files.append({
                "path": self._path.name, "split": self.split, "bytes": self._path.stat().st_size,
                "sha256": sha256_file(self._path), "records": self.records - self._first
            })
        return self._files


def check_split(split: str, files: list[dict[str, Any]], directory: Path, documents: Documents,
                store: TokenStore, record_length: int) -> tuple[int, int]:
    """Read the written records back and compare every token with its document; returns (records, tokens).

    Errors: DataError when a token is lost, repeated, changed, or in the wrong split.
    """
    reached = np.zeros(len(documents.tokens), np.int64)
    records = tokens = 0
    for data in _read_back([directory / file["path"] for file in files]):
        record = decode_record(data)
        stops = np.append(record.starts[1:], len(record.tokens))
        for start, stop, row in zip(record.starts.tolist(),
                                    stops.tolist(),
                                    record.documents.tolist(),
                                    strict=True):
            expected = store.get(row)[reached[row]:reached[row] + stop - start]
            if not np.array_equal(expected, record.tokens[start:stop]):
                raise DataError(
                    f"{split} record {records}: tokens {start}..{stop} are not the next of document {row}. "
                    "This is a bug; please report it.")
            reached[row] += stop - start
        if len(record.tokens) > record_length:
            raise DataError(
                f"{split} record {records}: {len(record.tokens)} tokens, record length {record_length}.")
        records += 1
        tokens += len(record.tokens)
    wanted = np.where(documents.validation == (split == "validation"), documents.tokens, 0)
    if not np.array_equal(reached, wanted):
        row = int(np.flatnonzero(reached != wanted)[0])
        raise DataError(
            f"{split}: {int(wanted.sum()):,} tokens in, {tokens:,} in records; first document that differs: "
            f"{row} ({wanted[row]} tokens, {reached[row]} found). This is a bug; please report it.")
    return records, tokens


def _read_back(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        reader = ArrayRecordReader(str(path))
        try:
            count = reader.num_records()
            for start in range(0, count, READ_RECORDS):
                yield from reader.read(start, min(start + READ_RECORDS, count))
        finally:
            reader.close()


def write_documents(tasks: list[ShardTask], documents: Documents, sources: list[str],
                    directory: Path) -> dict[str, Any]:
    """docs.parquet: one row a document, from token back to source. Returns its row for the manifest."""
    path = directory / DOCUMENTS_FILE
    writer: pyarrow.parquet.ParquetWriter | None = None
    try:
        for shard, task in enumerate(tasks):
            table = pyarrow.parquet.read_table(task.table_path)
            start, stop = (int(edge) for edge in documents.first[shard:shard + 2])
            split = np.where(documents.validation[start:stop], "validation", "train")
            rows = pyarrow.table({
                "doc": pyarrow.array(np.arange(start, stop, dtype=np.uint32)),
                "doc_id": table.column("doc_id"),
                "source": pyarrow.array(sources).take(table.column("source").combine_chunks()),
                "split": pyarrow.array(split.tolist(), pyarrow.string()),
                "record": pyarrow.array(documents.record[start:stop]),
                "segment": pyarrow.array(documents.segment[start:stop]), "tokens": table.column("tokens"),
                "bytes": table.column("bytes"), "characters": table.column("characters"),
                "sha256": table.column("sha256"), "meta": table.column("meta")
            })
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(path, rows.schema, compression="zstd")
            writer.write_table(rows)
    finally:
        if writer is not None:
            writer.close()
    return {"path": DOCUMENTS_FILE, "split": None, "bytes": path.stat().st_size, "sha256": sha256_file(path),
            "records": len(documents.tokens)}
