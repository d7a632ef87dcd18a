"""Local files as documents: JSON lines, plain text, Parquet, Python code; plain, .gz or .zst; globs.

Owns how a file's rows become documents or bad rows. Order: files sorted by name, rows as they stand. Knows
nothing of filters or of what is done with the documents.
"""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_pipeline.config import PACKAGE_METADATA, PYTHON_STDLIB, DatasetConfig, format_of, layout_of, paths_of
from data_pipeline.conversations import needed_names, read_conversation, text_of
from data_pipeline.documents import Bad, BadText, Document, Place, make_document, scalar_meta, text_digest
from data_pipeline.sources.base import Input
from data_pipeline.sources.python_code import decode_source, docstrings
from data_pipeline.sources.streams import BrokenStream, TooLong, read_blocks, read_whole, split_rows
from data_pipeline.variables import expand_variables
from nanollama.data.files import DataError, sha256_file
from nanollama.data.strict import FieldError, nearest


class FileSource:
    """The documents of a list of (name, path); names are unique and become part of the ids."""

    def __init__(self, dataset: DatasetConfig, files: list[tuple[str, Path]]):
        self.dataset, self.files = dataset, files
        self.total_bytes = sum(os.path.getsize(path) for _, path in files)
        self.bytes_read = 0

    def inputs(self) -> list[Input]:
        """Name, size and hash of each file."""
        return [Input(name, os.path.getsize(path), sha256_file(path)) for name, path in self.files]

    def read(self) -> Iterator[Document | Bad]:
        """The rows of all files."""
        kind = format_of(self.dataset)
        readers = {
            "jsonl": self._json_lines, "json": self._json_list, "text": self._text,
            "parquet": self._parquet, "code": self._code, "docstrings": self._code
        }
        self.bytes_read = 0
        for name, path in self.files:
            yield from readers[kind](name, path)

    def _report(self, count: int) -> None:
        self.bytes_read += count

    def _json_lines(self, name: str, path: Path) -> Iterator[Document | Bad]:
        rows = split_rows(read_blocks(path, self._report), b"\n", self.dataset.max_line_bytes)
        for number, raw in rows:
            place = Place(name, f":{number}", str(path))
            if (bad := self._unreadable(raw, place, "line")) is not None:
                yield bad
            elif isinstance(raw, bytes) and raw.strip():  # an empty line is no row
                yield self._json_row(raw, name, number, place)

    def _json_list(self, name: str, path: Path) -> Iterator[Document | Bad]:
        """A file that is one JSON list of objects; held whole, so max_line_bytes is its limit."""
        place = Place(name, "", str(path))
        raw = read_whole(path, self.dataset.max_line_bytes, self._report)
        if (bad := self._unreadable(raw, place, "file")) is not None:
            yield bad
            return
        try:
            rows = json.loads(raw)  # type: ignore[arg-type]
        except (ValueError, RecursionError) as error:
            yield Bad(place, "broken JSON", f"{error}"[:200])
            return
        if not isinstance(rows, list):
            yield Bad(place, "not a JSON list", f"{type(rows).__name__}; for one object a line use format: jsonl")
            return
        for number, row in enumerate(rows, start=1):
            place = Place(name, f"[{number}]", str(path))
            yield (self.row_document(row, f"{name}:{number}", place) if isinstance(row, dict) else
                   Bad(place, "not a JSON object", f"{type(row).__name__}"))

    def _json_row(self, raw: bytes, name: str, number: int, place: Place) -> Document | Bad:
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Bad(place, "not UTF-8", f"byte {error.start} of the line is 0x{raw[error.start]:02x}")
        except (ValueError,
                RecursionError) as error:  # also integers of thousands of digits and 1,000 nested lists
            return Bad(place, "broken JSON", f"{error}"[:200])
        if not isinstance(row, dict):
            return Bad(place, "not a JSON object", f"{type(row).__name__}")
        return self.row_document(row, f"{name}:{number}", place)

    def row_document(self, row: dict[str, Any], default_id: str, place: Place) -> Document | Bad:
        """The document in a row of named fields (also used for Parquet)."""
        dataset = self.dataset
        if dataset.rows == "text" and dataset.text_field not in row:
            return Bad(place, f"no field {dataset.text_field!r}", "fields: " + ", ".join(map(str, row))[:200])
        identity = default_id
        if dataset.id_field is not None:
            value = row.get(dataset.id_field)
            if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
                return Bad(place, f"no usable id in {dataset.id_field!r}", repr(value)[:100])
            identity = str(value)
            if any("\ud800" <= letter <= "\udfff" for letter in identity):
                return Bad(place, f"no usable id in {dataset.id_field!r}", repr(value)[:100])
        leave_out = {*self._content_fields(), *([dataset.id_field] if dataset.id_field else [])}
        meta = scalar_meta(row, dataset.meta_fields, leave_out)
        if dataset.rows == "text":
            return make_document(identity, row[dataset.text_field], meta, place)
        assert dataset.layout is not None
        try:
            read = read_conversation(row, dataset.rows, dataset.layout, layout_of(dataset))
        except BadText as error:
            return Bad(place, str(error))
        return make_document(identity, text_of(read), {**meta, "turns": sum(map(len, read.sides))}, place)

    def _content_fields(self) -> tuple[str, ...]:
        """The fields whose values are the text."""
        if self.dataset.rows == "text":
            return (self.dataset.text_field,)
        return tuple(layout_of(self.dataset).values())

    def _text(self, name: str, path: Path) -> Iterator[Document | Bad]:
        limit = self.dataset.max_line_bytes
        if self.dataset.separator is None:
            yield from self._whole_file(name, path, lambda raw: raw.decode("utf-8"))
            return
        for number, raw in split_rows(read_blocks(path, self._report), self.dataset.separator.encode(),
                                      limit):
            place = Place(name, f", document {number}", str(path))
            if (bad := self._unreadable(raw, place, "document")) is not None:
                yield bad
            elif isinstance(raw, bytes) and raw.strip():  # nothing between two separators is no row
                yield self._decoded(raw, f"{name}:{number}", place, lambda raw: raw.decode("utf-8"))

    def _code(self, name: str, path: Path) -> Iterator[Document | Bad]:
        if format_of(self.dataset) == "code":
            yield from self._whole_file(name, path, decode_source)
            return
        for row in self._whole_file(name, path, decode_source):
            if isinstance(row, Document):
                try:
                    prose = docstrings(row.text)
                except ValueError as error:
                    yield Bad(row.place, "does not parse as Python", str(error)[:200])
                    continue
                meta = {"derived_from": text_digest(row.encoded).hex()
                        }  # packing keeps it in the split of the code
                row = make_document(row.id, prose, meta, row.place) if prose else Bad(
                    row.place, "no docstring")
            yield row

    def _whole_file(self, name: str, path: Path, decode: Any) -> Iterator[Document | Bad]:
        place = Place(name, "", str(path))
        raw = read_whole(path, self.dataset.max_line_bytes, self._report)
        if (bad := self._unreadable(raw, place, "document")) is not None:
            yield bad
        elif isinstance(raw, bytes):
            yield self._decoded(raw, name, place, decode)

    def _decoded(self, raw: bytes, identity: str, place: Place, decode: Any) -> Document | Bad:
        try:
            return make_document(identity, decode(raw), {}, place)
        except UnicodeDecodeError as error:
            return Bad(place, "not UTF-8", f"byte {error.start} is 0x{raw[error.start]:02x}")
        except ValueError as error:
            return Bad(place, "unknown encoding", str(error)[:200])

    def _unreadable(self, raw: bytes | TooLong | BrokenStream, place: Place, what: str) -> Bad | None:
        if isinstance(raw, TooLong):
            return Bad(place, f"{what} over max_line_bytes",
                       f"more than {self.dataset.max_line_bytes:,} bytes")
        if isinstance(raw, BrokenStream):
            return Bad(place, "file cut off or damaged", f"{raw}; the rest of the file is lost")
        return None

    def _parquet(self, name: str, path: Path) -> Iterator[Document | Bad]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns = self._columns(file.schema_arrow, path)
                for batch in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
                    for index in range(batch.num_rows):
                        number += 1
                        yield self._parquet_row(batch, index, f"{name}:{number}",
                                                Place(name, f", row {number}", str(path)))
        except (pyarrow.ArrowException, OSError) as error:
            yield Bad(Place(name, f", row {number + 1}", str(path)), "file cut off or damaged",
                      str(error)[:200])
        self.bytes_read += os.path.getsize(path)

    def _parquet_row(self, batch: pyarrow.RecordBatch, index: int, identity: str,
                     place: Place) -> Document | Bad:
        try:
            row = {column: batch.column(column)[index].as_py() for column in batch.schema.names}
        except UnicodeDecodeError as error:
            return Bad(place, "not UTF-8", str(error)[:200])
        document = self.row_document(row, identity, place)
        if isinstance(document, Document) and len(document.encoded) > self.dataset.max_line_bytes:
            return Bad(place, "document over max_line_bytes", f"{len(document.encoded):,} bytes")
        return document

    def _columns(self, schema: pyarrow.Schema, path: Path) -> list[str]:
        """The columns to read: text, id, and the wanted (or every unnested) fields beside them."""
        dataset = self.dataset
        needed = [dataset.text_field] if dataset.rows == "text" else self._conversation_columns(schema)
        needed += [dataset.id_field] if dataset.id_field is not None else []
        for field in needed:
            if field not in schema.names:
                raise DataError(f"dataset {dataset.name}: {path} has no column {field!r}. "
                                f"{nearest(field, schema.names)} Set text_field, fields or id_field.")
        plain = [field.name for field in schema if not pyarrow.types.is_nested(field.type)]
        wanted = plain if dataset.meta_fields is None else [
            name for name in dataset.meta_fields if name in schema.names
        ]
        return list(dict.fromkeys([*needed, *wanted]))

    def _conversation_columns(self, schema: pyarrow.Schema) -> list[str]:
        names = layout_of(self.dataset)
        needed = needed_names(self.dataset.rows, self.dataset.layout or "")
        return [name for field, name in names.items() if field in needed or name in schema.names]


def find_files(dataset: DatasetConfig) -> list[tuple[str, Path]]:
    """(name, path) of every file the dataset's sources match, sorted by name.

    The name is the path below the part of the pattern that has no wildcard. Errors: DataError.
    """
    found: dict[str, Path] = {}
    for pattern in paths_of(dataset):
        try:
            expanded = expand_variables(pattern, f"dataset {dataset.name}: source")
        except FieldError as error:
            raise DataError(str(error)) from error
        root, matches = _matches(expanded)
        if not matches:
            _no_match(dataset, pattern, expanded)
        for path in matches:
            name = path.relative_to(root).as_posix()
            if found.setdefault(name, path) != path:
                raise DataError(
                    f"dataset {dataset.name}: {found[name]} and {path} would both be called {name!r} in the "
                    "documents' ids. Make them two datasets.")
    return sorted(found.items())


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    if not glob.has_magic(pattern):
        path = Path(pattern)
        return path.parent, [path] if path.is_file() else []
    fixed = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    return Path(*fixed), sorted(path for path in matches if path.is_file())


def _no_match(dataset: DatasetConfig, pattern: str, expanded: str) -> None:
    path = Path(expanded)
    if path.is_dir():
        fix = f"It is a directory: write {pattern.rstrip('/')}/**/*.jsonl (or another suffix)."
    elif os.sep not in expanded and "." not in expanded:
        fix = nearest(expanded, [PYTHON_STDLIB, PACKAGE_METADATA])
    else:
        fix = "Relative paths start at the directory the command is run in."
    raise DataError(f"dataset {dataset.name}: no file at {path.absolute()} (source {pattern!r}). {fix}")
