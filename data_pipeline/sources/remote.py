"""Files by path or by URL: sizes, identities and binary streams. URLs go through fsspec (s3://, gs://, https://, ...).

Owns the one difference between a local file and an object: a local file is known by the hash of its bytes, an
object by what its store says of it (ETag, checksum), because hashing it would mean to fetch it twice.
"""

import dataclasses
import os
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from nanollama.data.files import DataError, sha256_file, sha256_json


@dataclasses.dataclass(frozen=True, slots=True)
class FileRef:
    """A file to read: its name in ids and manifests (no machine's folders), and where it is."""

    name: str
    location: str  # path or URL
    bytes: int

    def sha256(self) -> str:
        """The file's identity, hex."""
        if not is_url(self.location):
            return sha256_file(self.location)
        system, path = filesystem(self.location)
        return sha256_json([self.location, self.bytes, str(system.ukey(path))])

    def open(self) -> BinaryIO:
        """Its bytes, unbuffered by more than a block."""
        return open_binary(self.location)


def is_url(location: str) -> bool:
    """Whether fsspec is to read it."""
    return "://" in location


def open_binary(location: str | os.PathLike[str]) -> BinaryIO:
    """A binary stream of a path or URL. Errors: OSError."""
    location = os.fspath(location)
    if not is_url(location):
        return open(location, "rb")
    system, path = filesystem(location)
    return cast(BinaryIO, system.open(path, "rb"))


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Errors: DataError names what to install."""
    try:
        import fsspec
    except ImportError as error:
        raise DataError(f"{url}: reading URLs needs fsspec. Install it with: pip install 'nanollama[data]'"
                        ) from error
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url}: {error}. Install that package beside nanollama.") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}") from error


def find_urls(pattern: str) -> tuple[str, list[tuple[str, int]]]:
    """(fixed front part, [(URL, size)] sorted) of what a URL with wildcards matches."""
    system, path = filesystem(pattern)
    try:
        found = system.glob(path, detail=True) if _magic(path) else {path: system.info(path)}
    except FileNotFoundError:
        found = {}
    rows = sorted((system.unstrip_protocol(name), int(info["size"] or 0)) for name, info in found.items()
                  if info["type"] == "file")
    fixed = []
    for part in PurePosixPath(path).parts[:-1]:
        if _magic(part):
            break
        fixed.append(part)
    return system.unstrip_protocol(str(PurePosixPath(*fixed))) if fixed else "", rows


def _magic(text: str) -> bool:
    return any(letter in text for letter in "*?[")
