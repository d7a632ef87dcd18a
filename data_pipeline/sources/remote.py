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
        info = system.info(path)
        told = [str(info[name]) for name in ("ETag", "Content-MD5", "Digest") if name in info]  # over HTTP
        return sha256_json([self.location, self.bytes, str(system.ukey(path)), *told])

    def check(self) -> None:
        """Raises DataError when the file is gone, or has another size than when it was found."""
        try:
            size = self.bytes if is_url(self.location) else os.path.getsize(self.location)
        except OSError as error:
            raise _unreadable(self.location, error) from error
        if size != self.bytes:
            raise DataError(f"{self.location}: has {size:,} bytes, and had {self.bytes:,} when this run began. Run the "
                            "same command again once it does not change any more.")

    def open(self) -> BinaryIO:
        """Its bytes, unbuffered by more than a block."""
        return open_binary(self.location)


def is_url(location: str) -> bool:
    """Whether fsspec is to read it."""
    return "://" in location


def open_binary(location: str | os.PathLike[str]) -> BinaryIO:
    """A binary stream of a path or URL. Errors, also of its methods: DataError, when disk, network or store fail."""
    location = os.fspath(location)
    try:
        if not is_url(location):
            return cast(BinaryIO, _Stream(location, open(location, "rb")))
        system, path = filesystem(location)
        return cast(BinaryIO, _Stream(location, system.open(path, "rb")))
    except DataError:
        raise
    except Exception as error:  # stores raise their own, and those of their HTTP clients
        raise _unreadable(location, error) from error


class _Stream:
    """A stream whose failures end the run, so that they are never taken for a file that is cut off, and kept."""

    def __init__(self, location: str, stream: Any):
        self._location, self._stream = location, stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *reason: object) -> None:
        self._stream.close()

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes. Errors: DataError."""
        try:
            return cast(bytes, self._stream.read(size))
        except Exception as error:
            raise _unreadable(self._location, error) from error


def _unreadable(location: str, error: Exception) -> DataError:
    what = getattr(error, "strerror", None) or f"{type(error).__name__}: {str(error)[:300]}"
    return DataError(f"{location}: cannot be read ({what}). See whether it is there, then run the same command again: "
                     "it goes on from the last finished part.")


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
    except FileNotFoundError as error:
        if error.__cause__ is not None:  # HTTP stores say so of every failure
            raise _unreadable(pattern, cast(Exception, error.__cause__)) from error
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
