"""The corpus directory on disk: JSONL or Parquet shards and their manifest, written once and read by later stages.

Owns the bytes of a shard and the check that a shard is still what the manifest says. Knows nothing of
sources, filters or tokens.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from nanollama.data.files import DataError, into_place, read_json, sha256_file

MANIFEST, CARD, DROPPED, SHARDS = "manifest.json", "DATA_CARD.md", "dropped.jsonl", "shards"
DECISIONS = "decisions"
INDEX = f"{DECISIONS}/index.json"  # where the decisions about every row are
SHARD_BYTES = 64_000_000
FORMATS = ("jsonl", "parquet")
GROUP_CHARACTERS = 8_000_000  # of text in a row group of Parquet
READ_ROWS = 256  # of Parquet, turned into Python values at a time
TABLE = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.large_string()), ("source", pyarrow.string()),
                        ("date", pyarrow.string()), ("meta", pyarrow.string())])
SCHEMA_VERSION = 1


class ShardWriter:
    """Writes the documents of one shard, as the suffix of `path` says (FORMATS); it gets its name only when it is
    whole."""

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: _Lines | _Table = (_Table if path.suffix == ".parquet" else _Lines)(self._temporary)
        self.bytes = self.documents = 0  # of the file, once it is whole
        self.sha256 = ""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Give it its name, or leave nothing when something went wrong."""
        try:
            self._rows.close()
            if kind is None:
                self.bytes, self.sha256 = self._temporary.stat().st_size, sha256_file(self._temporary)
                into_place(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def write(self, id: str, text: str, source: str, meta: dict[str, Any], date: str | None) -> None:
        """Append one document; `date` (YYYY[-MM[-DD]]) only where it is known."""
        self._rows.write({"id": id, "text": text, "source": source, "date": date, "meta": meta})
        self.documents += 1


class _Lines:
    """JSON lines."""

    def __init__(self, path: Path):
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (lives from one write to the next)

    def write(self, row: dict[str, Any]) -> None:
        """One row; a date that is not known is left out."""
        known = {name: value for name, value in row.items() if value is not None}
        self._file.write((json.dumps(known, ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        """No more rows."""
        self._file.close()


class _Table:
    """Parquet: `meta` is JSON there, for its fields differ from row to row."""

    def __init__(self, path: Path):
        self._file = pyarrow.parquet.ParquetWriter(path, TABLE, compression="zstd")
        self._held: list[dict[str, Any]] = []
        self._held_characters = 0

    def write(self, row: dict[str, Any]) -> None:
        """One row."""
        self._held.append({**row, "meta": json.dumps(row["meta"], ensure_ascii=False)})
        self._held_characters += len(row["text"])
        if self._held_characters >= GROUP_CHARACTERS:
            self._flush()

    def close(self) -> None:
        """No more rows."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        self._file.write_table(pyarrow.Table.from_pylist(self._held, TABLE))
        self._held, self._held_characters = [], 0


def read_manifest(corpus: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """(manifest, its SHA-256) of a finished corpus directory. Errors: DataError says how to make it."""
    path = Path(corpus) / MANIFEST
    make = f"Make it with: python -m data_pipeline.corpus --config=MIXTURE.yaml --output={corpus}"
    if not path.exists():
        raise DataError(f"{corpus}: no finished corpus there ({MANIFEST} is missing). {make}")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != "corpus":
        raise DataError(f"{path}: not the manifest of a corpus. {make}")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema version {manifest.get('schema_version')}, not {SCHEMA_VERSION}. {make}"
        )
    return manifest, sha256_file(path)


def read_shard(corpus: str | os.PathLike[str], shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one shard, checked against the manifest's hash by the end. Errors: DataError."""
    path = Path(corpus) / shard["path"]
    try:
        if path.suffix == ".parquet":
            digest = sha256_file(path)  # first, for a damaged file may give wrong rows
            if digest == shard["sha256"]:
                yield from _table_rows(path)
        else:
            hashed = hashlib.sha256()
            with open(path, "rb") as file:
                for line in file:  # a binary file splits at \n only
                    hashed.update(line)
                    yield json.loads(line)
            digest = hashed.hexdigest()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: missing, but the corpus manifest lists it. Delete {corpus}/{MANIFEST} and run "
            "data_pipeline.corpus again.") from error
    except ValueError as error:
        raise DataError(_changed(path, corpus, f"a line is not JSON: {error}")) from error
    if digest != shard["sha256"]:
        raise DataError(_changed(path, corpus, f"SHA-256 is {digest}, the manifest says {shard['sha256']}"))


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(READ_ROWS, use_threads=False):
            for row in batch.to_pylist():
                row["meta"] = json.loads(row["meta"])
                yield {name: value for name, value in row.items() if value is not None}


def _changed(path: Path, corpus: str | os.PathLike[str], what: str) -> str:
    return (f"{path}: changed since it was made ({what}). Delete {corpus}/{MANIFEST} and run "
            "data_pipeline.corpus again.")
