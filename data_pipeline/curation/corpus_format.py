"""The corpus directory on disk: JSONL shards and their manifest, written once and read by later stages.

Owns the bytes of a shard line and the check that a shard is still what the manifest says. Knows nothing of
sources, filters or tokens.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from nanollama.data.files import DataError, read_json, sha256_file

MANIFEST, CARD, DROPPED, SHARDS = "manifest.json", "DATA_CARD.md", "dropped.jsonl", "shards"
DECISIONS = "decisions"
INDEX = f"{DECISIONS}/index.json"  # where the decisions about every row are
SHARD_BYTES = 64_000_000
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """One finished shard file, path relative to the corpus directory."""

    path: str
    bytes: int
    sha256: str
    documents: int
    dataset: str


class ShardWriter:
    """Writes the lines of one shard; it gets its name only when it is whole."""

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115 (lives from one write to the next)
        self._hash = hashlib.sha256()
        self.bytes = self.documents = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Give it its name, or leave nothing when something went wrong."""
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink(missing_ok=True)

    def write(self, id: str, text: str, source: str, meta: dict[str, Any]) -> None:
        """Append one document."""
        row = {"id": id, "text": text, "source": source, "meta": meta}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._file.write(line)
        self._hash.update(line)
        self.bytes += len(line)
        self.documents += 1

    @property
    def sha256(self) -> str:
        """Of what was written so far, hex."""
        return self._hash.hexdigest()


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
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for line in file:  # a binary file splits at \n only
                digest.update(line)
                yield json.loads(line)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: missing, but the corpus manifest lists it. Delete {corpus}/{MANIFEST} and run "
            "data_pipeline.corpus again.") from error
    except ValueError as error:
        raise DataError(_changed(path, corpus, f"a line is not JSON: {error}")) from error
    if digest.hexdigest() != shard["sha256"]:
        raise DataError(
            _changed(path, corpus, f"SHA-256 is {digest.hexdigest()}, the manifest says {shard['sha256']}"))


def _changed(path: Path, corpus: str | os.PathLike[str], what: str) -> str:
    return (f"{path}: changed since it was made ({what}). Delete {corpus}/{MANIFEST} and run "
            "data_pipeline.corpus again.")
