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
LANES = 128
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
            if len(self._open) > 8 * LANES:  # reading goes on in LANES shards at a time
                self._open.pop(next(iter(self._open)))
            start, stop = self._documents.first[shard:shard + 2]
            ends = np.cumsum(self._documents.tokens[start:stop], dtype=np.int64)
            self._open[shard] = (np.memmap(self._tasks[shard].tokens_path, self._dtype, "r"), ends)
        tokens, ends = self._open[shard]
        index = document - int(self._documents.first[shard])
        return tokens[int(ends[index - 1]) if index else 0:int(ends[index])]


def load_documents(tasks: list[ShardTask], validation_fraction: float) -> Documents:
    """The documents of all shards, each with its split.

    Held out are the documents whose place is below the fraction; in a corpus so small that there is none, the
    lowest, but for a corpus of one document, which is trained on. A text equal to a derived one follows the first of
    those: equal texts are in one split, and derived texts are where their origin is.
    """
    names = ("tokens", "source", "place", "bytes", "characters")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    derived: dict[str, float] = {}
    for task in tasks:
        table = pyarrow.parquet.read_table(task.table_path, columns=["sha256", "place", "derived"])
        for row in table.filter(table.column("derived")).to_pylist():
            derived.setdefault(row["sha256"], row["place"])
    texts = pyarrow.array(derived, pyarrow.string())
    places = np.fromiter(derived.values(), np.float64, len(derived))
    for task in tasks:
        table = pyarrow.parquet.read_table(task.table_path, columns=[*names, "sha256"])
        for name in names:
            columns[name].append(table.column(name).to_numpy())
        if derived:
            found = pyarrow.compute.index_in(table.column("sha256"), value_set=texts).fill_null(-1).to_numpy()
            columns["place"][-1] = np.where(found >= 0, places[found], columns["place"][-1])
    count = sum(len(column) for column in columns["tokens"])
    if count >= 1 << 32:
        raise DataError(
            f"{count} documents, a packed set holds at most {(1 << 32) - 1}. Pack the corpus in parts.")
    whole = {name: np.concatenate(columns[name]) for name in names}
    validation = whole["place"] < validation_fraction
    if validation_fraction > 0 and not validation.any() and count > 1:
        validation = whole["place"] == whole["place"].min()
    return Documents(
        tokens=whole["tokens"], sources=whole["source"], validation=validation, bytes=whole["bytes"],
        characters=whole["characters"], first=np.cumsum([0, *(len(column) for column in columns["tokens"])]),
        record=np.zeros(count, np.uint32), segment=np.zeros(count, np.uint32))


def interleaved(first: np.ndarray) -> np.ndarray:
    """All documents, [N] indices, in an order that goes through up to LANES parts of the corpus side by side.

    Sources follow one another in a corpus. Windows that hold some of each pack better (long documents fill what
    short ones leave) and records of one source do not lie together; reading stays sequential in each part.
    """
    edges = first[np.unique(np.linspace(0, len(first) - 1, min(len(first), LANES + 1)).round().astype(int))]
    counts = np.diff(edges)
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return np.argsort(places, kind="stable")


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
    chosen = interleaved(documents.first)
    chosen = chosen[documents.validation[chosen] == (split == "validation")]
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
