"""Files and packages that filters need: found, hashed, and explained where they are missing."""

import functools
import os
from pathlib import Path

from data_pipeline.engine.variables import expand_variables
from nanollama.data.files import DataError, sha256_file


def resource(path: str, field: str, how: str) -> Path:
    """The file that a filter's `field` names, ${VARIABLES} replaced. Raises DataError with `how` to get one."""
    found = Path(expand_variables(path, field))
    if not found.is_file():
        raise DataError(f"filter {field}: no file {found} (from {path!r}). {how}")
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file, computed once per process for each state of it."""
    status = os.stat(path)
    return _hash(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash(path: str, size: int, changed: int) -> str:
    return sha256_file(path)


def missing(package: str, what: str) -> DataError:
    """The error that says how to install a package of the extra `curate`."""
    return DataError(f"{what} needs the package {package}, which is not installed. "
                     "Install it with: pip install 'nanollama[curate]'")
