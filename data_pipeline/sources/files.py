"""Files as documents: JSON lines, plain text, Parquet, Arrow, WARC, Python code; .gz or .zst; globs and URLs.

Owns how a file's rows become documents or bad rows, and where a reader stands among them. Order: files sorted by
name, rows as they stand. Knows nothing of filters or of what is done with the documents.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from data_pipeline.sources.base import Input, State
from data_pipeline.sources.conversations import needed_names
from data_pipeline.sources.dataset import DatasetConfig, format_of, layout_of
from data_pipeline.sources.python_code import decode_source, docstrings
from data_pipeline.sources.remote import FileRef
from data_pipeline.sources.rows import bounded, row_document
from data_pipeline.sources.streams import BrokenStream, TooLong, read_blocks, read_whole, split_rows
from data_pipeline.sources.warc import WarcRecord, extractor, read_records
from data_pipeline.text.documents import Bad, Document, Place, iso_date, make_document, text_digest
from nanollama.data.files import DataError
from nanollama.data.strict import nearest

PART_BYTES = 64_000_000  # small files are read together, up to about this much as they are stored


@dataclasses.dataclass(frozen=True)
class FileSource:
    """The documents of a list of files; names are unique and become part of the ids."""

    dataset: DatasetConfig
    files: tuple[FileRef, ...]

    def parts(self) -> list["FilePart"]:
        """Files in their order, small ones together."""
        parts: list[list[FileRef]] = []
        size = 0
        for file in self.files:
            if not parts or size + file.bytes > PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(file)
            size += file.bytes
        return [FilePart(self.dataset, tuple(files)) for files in parts]


@dataclasses.dataclass(frozen=True)
class FilePart:
    """Some files of a dataset."""

    dataset: DatasetConfig
    files: tuple[FileRef, ...]

    @property
    def name(self) -> str:
        """First file, and how many more."""
        more = len(self.files) - 1
        return f"{self.dataset.name} {self.files[0].name}{f' and {more} more' if more else ''}"

    @property
    def bytes(self) -> int:
        """Of all files, as they are stored."""
        return sum(file.bytes for file in self.files)

    def inputs(self) -> list[Input]:
        """Name, size and hash of each file."""
        return [Input(file.name, file.bytes, file.sha256()) for file in self.files]

    def open(self, state: State | None = None) -> "FileReader":
        """See Part."""
        return FileReader(self.dataset, self.files, state)


class FileReader:
    """One pass through some files. A row's number in its file is where the reader stands."""

    def __init__(self, dataset: DatasetConfig, files: tuple[FileRef, ...], state: State | None = None):
        self.dataset, self.files = dataset, files
        self.bytes_read = 0
        self._file: int = state["file"] if state else 0
        self._row: int = state["row"] if state else 0

    def state(self) -> State:
        """See Reader."""
        return {"file": self._file, "row": self._row}

    def __iter__(self) -> Iterator[Document | Bad]:
        readers = {
            "jsonl": self._json_lines, "json": self._json_list, "text": self._text, "parquet": self._parquet,
            "arrow": self._arrow, "warc": self._warc, "code": self._code, "docstrings": self._code
        }
        read = readers[format_of(self.dataset)]
        self.bytes_read = sum(file.bytes for file in self.files[:self._file])
        while self._file < len(self.files):
            start = self._row
            self.files[self._file].check()
            for number, item in read(self.files[self._file], start):
                self._row = number
                yield item
            self._file, self._row = self._file + 1, 0

    def _report(self, count: int) -> None:
        self.bytes_read += count

    def _json_lines(self, file: FileRef, start: int) -> Iterator[tuple[int, Document | Bad]]:
        rows = split_rows(read_blocks(file.location, self._report), b"\n", self.dataset.max_line_bytes)
        for number, raw in rows:
            if number <= start:
                continue
            place = Place(file.name, f":{number}", file.location)
            if (bad := self._unreadable(raw, place, "line")) is not None:
                yield number, bad
            elif isinstance(raw, bytes) and raw.strip():  # an empty line is no row
                yield number, self._json_row(raw, file.name, number, place)

    def _json_list(self, file: FileRef, start: int) -> Iterator[tuple[int, Document | Bad]]:
        """A file that is one JSON list of objects; held whole, so max_line_bytes is its limit."""
        place = Place(file.name, "", file.location)
        raw = read_whole(file.location, self.dataset.max_line_bytes, self._report)
        if (bad := self._unreadable(raw, place, "file")) is None:
            try:
                rows = json.loads(raw)  # type: ignore[arg-type]
                if not isinstance(rows, list):
                    bad = Bad(place, "not a JSON list", f"{type(rows).__name__}; for one object a line use "
                              "format: jsonl")
            except (ValueError, RecursionError) as error:
                bad = Bad(place, "broken JSON", f"{error}"[:200])
        if bad is not None:
            if not start:
                yield 1, bad
            return
        for number, row in enumerate(rows[start:], start=start + 1):
            place = Place(file.name, f"[{number}]", file.location)
            yield number, (row_document(self.dataset, row, f"{file.name}:{number}", place)
                           if isinstance(row, dict) else Bad(place, "not a JSON object", f"{type(row).__name__}"))

    def _json_row(self, raw: bytes, name: str, number: int, place: Place) -> Document | Bad:
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Bad(place, "not UTF-8", f"byte {error.start} of the line is 0x{raw[error.start]:02x}{_other(raw)}")
        except (ValueError,
                RecursionError) as error:  # also integers of thousands of digits and 1,000 nested lists
            return Bad(place, "broken JSON", f"{error}"[:200])
        if not isinstance(row, dict):
            return Bad(place, "not a JSON object", f"{type(row).__name__}")
        return row_document(self.dataset, row, f"{name}:{number}", place)

    def _text(self, file: FileRef, start: int) -> Iterator[tuple[int, Document | Bad]]:
        limit = self.dataset.max_line_bytes
        if self.dataset.separator is None:
            yield from self._whole_file(file, start, lambda raw: raw.decode("utf-8"))
            return
        for number, raw in split_rows(read_blocks(file.location, self._report),
                                      self.dataset.separator.encode(), limit):
            if number <= start:
                continue
            place = Place(file.name, f", document {number}", file.location)
            if (bad := self._unreadable(raw, place, "document")) is not None:
                yield number, bad
            elif isinstance(raw, bytes) and raw.strip():  # nothing between two separators is no row
                yield number, self._decoded(raw, f"{file.name}:{number}", place, lambda raw: raw.decode("utf-8"))

    def _code(self, file: FileRef, start: int) -> Iterator[tuple[int, Document | Bad]]:
        if format_of(self.dataset) == "code":
            yield from self._whole_file(file, start, decode_source)
            return
        for number, row in self._whole_file(file, start, decode_source):
            if isinstance(row, Document):
                try:
                    prose = docstrings(row.text)
                except ValueError as error:
                    yield number, Bad(row.place, "does not parse as Python", str(error)[:200])
                    continue
                meta = {"derived_from": text_digest(row.encoded).hex()
                        }  # packing keeps it in the split of the code
                row = make_document(row.id, prose, meta, row.place) if prose else Bad(
                    row.place, "no docstring")
            yield number, row

    def _whole_file(self, file: FileRef, start: int, decode: Any) -> Iterator[tuple[int, Document | Bad]]:
        if start:
            return
        place = Place(file.name, "", file.location)
        raw = read_whole(file.location, self.dataset.max_line_bytes, self._report)
        if (bad := self._unreadable(raw, place, "document")) is not None:
            yield 1, bad
        elif isinstance(raw, bytes):
            yield 1, self._decoded(raw, file.name, place, decode)

    def _decoded(self, raw: bytes, identity: str, place: Place, decode: Any) -> Document | Bad:
        try:
            return make_document(identity, decode(raw), {}, place)
        except UnicodeDecodeError as error:
            return Bad(place, "not UTF-8", f"byte {error.start} is 0x{raw[error.start]:02x}{_other(raw)}")
        except ValueError as error:
            return Bad(place, "unknown encoding", str(error)[:200])

    def _unreadable(self, raw: Any, place: Place, what: str) -> Bad | None:
        if isinstance(raw, TooLong):
            return Bad(place, f"{what} over max_line_bytes",
                       f"more than {self.dataset.max_line_bytes:,} bytes")
        if isinstance(raw, BrokenStream):
            return Bad(place, "file cut off or damaged", f"{raw}; the rest of the file is lost")
        return None

    def _parquet(self, file: FileRef, start: int) -> Iterator[tuple[int, Document | Bad]]:
        number = 0
        try:
            with file.open() as stream, pyarrow.parquet.ParquetFile(stream) as table:
                columns = self._columns(table.schema_arrow, file)
                groups: list[int] = []
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if not groups and number + rows <= start:  # read before
                        number += rows
                    else:
                        groups.append(group)
                for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=columns,
                                                use_threads=False):
                    yield from self._rows(batch, number, start, file)
                    number += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            yield number + 1, self._cut(file, number, error)
        self.bytes_read += file.bytes

    def _arrow(self, file: FileRef, start: int) -> Iterator[tuple[int, Document | Bad]]:
        """Arrow IPC: the file format, or the stream format as Hugging Face `datasets` caches it."""
        number = 0
        try:
            with file.open() as stream:
                for batch in _arrow_batches(stream):
                    columns = self._columns(batch.schema, file)
                    for part in range(0, batch.num_rows, 256):
                        piece = batch.slice(part, 256).select(columns)
                        if number + piece.num_rows > start:
                            yield from self._rows(piece, number, start, file)
                        number += piece.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            yield number + 1, self._cut(file, number, error)
        self.bytes_read += file.bytes

    def _cut(self, file: FileRef, number: int, error: Exception) -> Bad:
        return Bad(Place(file.name, f", row {number + 1}", file.location), "file cut off or damaged",
                   str(error)[:200])

    def _rows(self, batch: pyarrow.RecordBatch, before: int, start: int,
              file: FileRef) -> Iterator[tuple[int, Document | Bad]]:
        for index in range(max(0, start - before), batch.num_rows):
            number = before + index + 1
            place = Place(file.name, f", row {number}", file.location)
            try:
                row = {column: batch.column(column)[index].as_py() for column in batch.schema.names}
            except UnicodeDecodeError as error:
                yield number, Bad(place, "not UTF-8", str(error)[:200])
                continue
            yield number, bounded(self.dataset, row_document(self.dataset, row, f"{file.name}:{number}", place))

    def _columns(self, schema: pyarrow.Schema, file: FileRef) -> list[str]:
        """The columns to read: text, id, and the wanted (or every unnested) fields beside them."""
        dataset = self.dataset
        needed = [dataset.text_field] if dataset.rows == "text" else _conversation_columns(dataset, schema)
        needed += [dataset.id_field] if dataset.id_field is not None else []
        for field in needed:
            if field not in schema.names:
                raise DataError(f"dataset {dataset.name}: {file.location} has no column {field!r}. "
                                f"{nearest(field, schema.names)} Set text_field, fields or id_field; or leave the "
                                "file out, where the others are as the mixture says.")
        needed += [name for name in (dataset.date_field, "year") if name in schema.names]
        plain = [field.name for field in schema if not pyarrow.types.is_nested(field.type)]
        wanted = plain if dataset.meta_fields is None else [
            name for name in dataset.meta_fields if name in schema.names
        ]
        return list(dict.fromkeys([*needed, *wanted]))

    def _warc(self, file: FileRef, start: int) -> Iterator[tuple[int, Document | Bad]]:
        extract = extractor(self.dataset.name)
        for number, record in enumerate(read_records(read_blocks(file.location, self._report),
                                                     self.dataset.max_line_bytes), start=1):
            if number <= start:
                continue
            place = Place(file.name, f", record {number}", file.location)
            if (bad := self._unreadable(record, place, "document")) is not None:
                yield number, bad
            elif isinstance(record, WarcRecord):
                try:
                    row = extract(record)
                except ValueError as error:
                    yield number, Bad(place, str(error))
                    continue
                if row is not None:  # no page: a request, an image, a redirect
                    identity = record.identity or f"{file.name}:{number}"
                    yield number, make_document(identity, row, record.meta, place,
                                                iso_date(record.meta.get("date")))


def _other(raw: bytes) -> str:
    """What bytes that are no UTF-8 are by their start, where that is known."""
    kinds = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip: name the file .gz",
             b"\x28\xb5\x2f\xfd": "zstd: name the file .zst"}
    return next((f"; it looks like {name}" for mark, name in kinds.items() if raw.startswith(mark)), "")


def _arrow_batches(stream: Any) -> Iterator[pyarrow.RecordBatch]:
    start = stream.read(6)
    stream.seek(0)
    if start == b"ARROW1":
        with pyarrow.ipc.open_file(stream) as table:
            for index in range(table.num_record_batches):
                yield table.get_batch(index)
    else:
        with pyarrow.ipc.open_stream(stream) as table:
            yield from table


def _conversation_columns(dataset: DatasetConfig, schema: pyarrow.Schema) -> list[str]:
    names = layout_of(dataset)
    needed = needed_names(dataset.rows, dataset.layout or "")
    return [name for field, name in names.items() if field in needed or name in schema.names]
