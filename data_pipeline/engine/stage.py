"""What every command of the pipeline shares: doing nothing twice, disk errors, messages, exit codes.

Owns the answer to "is this output what these inputs give". Knows nothing of documents or tokens.
"""

import argparse
import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nanollama
from nanollama.data.files import DataError, read_json, sha256_file, write_json
from nanollama.data.strict import FieldError

WORK = ".work"  # unfinished output, inside the output directory so that a rename moves it into place
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = ("No space left on device", "File too large", "Disk quota exceeded"
               )  # ArrayRecord raises RuntimeError


def code_version() -> str:
    """The package's version, for manifests; staleness is decided by each stage's own number."""
    return f"nanollama {nanollama.__version__}"


def finished(output: Path, manifest_name: str, fingerprint: str, files: Callable[[dict],
                                                                                 list[dict]]) -> dict | None:
    """The manifest in `output` if it was made from `fingerprint` and every file is what it says, else None.

    `files` picks from the manifest the rows {path, sha256} to check.
    """
    path = output / manifest_name
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != fingerprint:
        return None
    for row in files(manifest):
        file = output / row["path"]
        if not file.is_file() or sha256_file(file) != row["sha256"]:
            print(f"{file}: missing or changed since it was made; making it again.", file=sys.stderr)
            return None
    return manifest


def finished_file(path: Path) -> dict[str, Any] | None:
    """What `mark_finished` noted beside the file, if it is there and of the size noted."""
    marker = path.with_suffix(".json")
    if not (marker.exists() and path.exists()):
        return None
    known: dict[str, Any] = read_json(marker)
    return known if path.stat().st_size == known["bytes"] else None


def mark_finished(path: Path, facts: dict[str, Any]) -> None:
    """Note beside a file that it is whole; `facts` with its size, `bytes`."""
    write_json(path.with_suffix(".json"), facts)


def require_own(output: Path, manifest_name: str, kind: str, mark: str, made: Sequence[str]) -> None:
    """Raises DataError when a run in `output` would replace or remove what it did not make.

    `made`: globs of what such a run puts there; they are its own beside a manifest of this `kind`, or beside `mark`,
    which it writes before any of them.
    """
    path = output / manifest_name
    found = [file for pattern in made for file in output.glob(pattern)]
    if path.exists():
        manifest = read_json(path)
        if isinstance(manifest, dict) and manifest.get("kind") == kind:
            return
        found = [path]
    elif (output / mark).exists():
        return
    if found:
        raise DataError(f"{found[0]}: is there already and was made by something else. This command would replace it: "
                        "choose another --output, an empty or a new directory.")


def work_directory(output: Path, fingerprint: str) -> Path:
    """The place for unfinished output of `fingerprint`; what other inputs left behind is removed."""
    work = output / WORK / fingerprint[:16]
    for other in (output / WORK).glob("*"):
        if other != work:
            shutil.rmtree(other, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    return work


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raises DataError when `directory`'s disk has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DataError(
            f"{directory}: {what} needs about {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free. "
            "Free some space, or choose another --output.")


@contextlib.contextmanager
def disk_full_explained(output: Path, mend: str = "Output finished earlier is untouched. Free some space and run the "
                        "same command again: it goes on from the last finished part.") -> Iterator[None]:
    """Turns a full disk into a DataError that says what is safe and what to do (`mend`)."""
    try:
        yield
    except DataError:
        raise
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if not full and not any(text in str(error) for text in _FULL_TEXTS):
            raise
        raise DataError(f"{output}: the disk is full ({error}). {mend}") from error


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts with the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default in (False, [], "") or "default" in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


def _plain(error: Exception) -> str:
    """The message, of a system's error without its number: "PATH: Permission denied"."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return str(error)


def command(main: Callable[[], Any]) -> None:
    """Run a command line: an expected error is one message and exit code 1, an interrupt 130."""
    try:
        main()
    except (DataError, FieldError, OSError) as error:  # anything else is a bug and keeps its trace
        print(f"error: {_plain(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        os._exit(130)
