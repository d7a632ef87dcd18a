"""Files that survive a kill: atomic writes, content hashes, JSON in one canonical form, one run per folder.

Knows nothing of what is written. Standard library only.
"""

import fcntl
import hashlib
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any


class DataError(RuntimeError):
    """Data or files that cannot be used; the message says what, where and how to mend it."""


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, UTF-8 kept."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` so that a reader sees the old file or the whole new one, also after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def into_place(temporary: Path, path: Path) -> None:
    """Give a file that is whole and closed its name, also after a power cut."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; DataError names the file and position when it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start}: damaged. Delete the file and run the command that makes it "
            "again."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON ({error.msg}). Delete the file and run the command "
            "that makes it again."
        ) from error


class Lock:
    """Holds `directory` for one process; a second one is told who has it. Released when the process dies. Errors:
    DataError, also when there is no such directory and none can be made.

    The kernel drops an flock with its process, so a kill never leaves a stale lock behind.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = Path(directory) / ".lock"
        self._file: Any = None

    def __enter__(self) -> "Lock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{self.path.parent}: is no directory that can be written ({error.strerror}). Choose "
                            "another one.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise DataError(
                f"{self.path.parent}: in use by {holder}. Wait for it to end, stop it, or choose "
                "another directory."
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
