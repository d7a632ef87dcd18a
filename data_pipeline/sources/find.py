"""The files that a dataset's sources name: paths and URLs, with globs and ${VARIABLES}, in one order.

Owns the names that files have in ids and manifests. Reads nothing.
"""

import glob
import os
from pathlib import Path

from data_pipeline.engine.variables import expand_variables
from data_pipeline.sources.dataset import PACKAGE_METADATA, PYTHON_STDLIB, DatasetConfig, paths_of
from data_pipeline.sources.remote import FileRef, find_urls, is_url
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError, nearest


def find_files(dataset: DatasetConfig) -> tuple[FileRef, ...]:
    """Every file the dataset's sources match, sorted by name.

    The name is the path below the part of the pattern that has no wildcard. Errors: DataError.
    """
    found: dict[str, FileRef] = {}
    for pattern in paths_of(dataset):
        try:
            expanded = expand_variables(pattern, f"dataset {dataset.name}: source")
        except FieldError as error:
            raise DataError(str(error)) from error
        matches = _url_matches(expanded) if is_url(expanded) else _path_matches(expanded)
        if not matches:
            _no_match(dataset, pattern, expanded)
        for match in matches:
            if found.setdefault(match.name, match) != match:
                raise DataError(
                    f"dataset {dataset.name}: {found[match.name].location} and {match.location} would both be "
                    f"called {match.name!r} in the documents' ids. Make them two datasets.")
    return tuple(file for _, file in sorted(found.items()))


def local_files(files: list[tuple[str, Path]]) -> tuple[FileRef, ...]:
    """(name, path) pairs as files."""
    return tuple(FileRef(name, str(path), os.path.getsize(path)) for name, path in files)


def _url_matches(pattern: str) -> list[FileRef]:
    root, rows = find_urls(pattern)
    return [FileRef(url.removeprefix(root).lstrip("/"), url, size) for url, size in rows]


def _path_matches(pattern: str) -> list[FileRef]:
    if not glob.has_magic(pattern):
        path = Path(pattern)
        return [FileRef(_storable(path.name), str(path), path.stat().st_size)] if path.is_file() else []
    fixed = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    return [FileRef(_storable(path.relative_to(Path(*fixed)).as_posix()), str(path), path.stat().st_size)
            for path in sorted(matches) if path.is_file()]


def _storable(name: str) -> str:
    """`name` with the bytes spelled out that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _no_match(dataset: DatasetConfig, pattern: str, expanded: str) -> None:
    if is_url(expanded):
        raise DataError(f"dataset {dataset.name}: no file at {expanded} (source {pattern!r}).")
    path = Path(expanded)
    if path.is_dir():
        fix = f"It is a directory: write {pattern.rstrip('/')}/**/*.jsonl (or another suffix)."
    elif os.sep not in expanded and "." not in expanded:
        fix = nearest(expanded, [PYTHON_STDLIB, PACKAGE_METADATA])
    else:
        fix = "Relative paths start at the directory the command is run in."
    raise DataError(f"dataset {dataset.name}: no file at {path.absolute()} (source {pattern!r}). {fix}")
