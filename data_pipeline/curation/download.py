"""Step one of the corpus command: parts of sources become raw shards, cached by the content of what was read.

Owns the key of a part (its inputs' hashes and every setting that decides its rows), the cut into shards, and going
on after a kill: each finished shard's marker says where the reader stood. Knows nothing of filters.
"""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

from data_pipeline.curation.shards import RawWriter, Shard
from data_pipeline.sources import Part, State
from data_pipeline.sources.dataset import DatasetConfig, format_of
from data_pipeline.text.documents import Bad
from nanollama.data.files import DataError, sha256_json, write_json
from nanollama.data.strict import to_mapping

STAGE_VERSION = 2  # raise it when the same inputs would give other rows
SHARD_BYTES = 16_000_000  # of text in a raw shard, at least
SHARD_ROWS = 200_000
SHOWN_BAD = 5  # broken rows told of per part
# what of a dataset's settings decides the rows that are read
_READING = ("rows", "layout", "fields", "text_field", "date_field", "id_field", "meta_fields", "separator", "subset",
            "data_dir", "revision", "max_line_bytes", "on_error")


@dataclasses.dataclass(frozen=True)
class ReadTask:
    """One part to read."""

    dataset: DatasetConfig
    part: Part
    directory: str  # named by the part's key
    key: str
    shard_bytes: int
    wanted: int | None = None  # bytes of text after which it may stop; None: all

    @property
    def label(self) -> str:
        """For messages."""
        return self.part.name

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return self.part.bytes


@dataclasses.dataclass(frozen=True)
class ReadResult:
    """What a part gave."""

    markers: list[dict[str, Any]]  # one per shard
    shown: list[str]  # the first broken rows, for people; only those read in this run
    exhausted: bool  # whether there is nothing left to read


def read_task(dataset: DatasetConfig, part: Part, inputs: list[Any], cache: Path) -> ReadTask:
    """The task for one part. `inputs` are its hashed inputs."""
    # a capped head is read in small shards: reading on goes by whole shards
    shard_bytes = SHARD_BYTES if not reads_head(dataset) else min(SHARD_BYTES, dataset.max_bytes or SHARD_BYTES)
    key = sha256_json({
        "stage": "read", "version": STAGE_VERSION, "format": format_of(dataset), "head": reads_head(dataset),
        "split": getattr(part, "split", None),  # of a set that keeps its splits in one folder
        "settings": {name: to_mapping(getattr(dataset, name)) for name in _READING},
        "inputs": [dataclasses.asdict(row) for row in inputs], "shard_bytes": shard_bytes, "shard_rows": SHARD_ROWS,
        "python": platform.python_version() if format_of(dataset) == "docstrings" else None})
    return ReadTask(dataset, part, str(cache / key[:32]), key, shard_bytes)


def reads_head(dataset: DatasetConfig) -> bool:
    """Whether only the first bytes of the dataset are wanted."""
    return dataset.max_bytes is not None and dataset.cap_order == "head"


def read_part(task: ReadTask) -> ReadResult:
    """Read on from the last finished shard until the end, or until enough. Of what an earlier run read further,
    nothing is returned: the result depends on what is wanted alone. Errors: DataError."""
    directory = Path(task.directory)
    directory.mkdir(parents=True, exist_ok=True)
    markers = _finished(directory)
    shown: list[str] = []
    if not _enough(markers, task.wanted):
        _read_on(task, directory, markers, shown)
    while len(markers) > 1 and _enough(markers[:-1], task.wanted):
        markers.pop()
    return ReadResult(markers, shown, bool(markers) and markers[-1]["last"])


def shards_of(task: ReadTask, markers: list[dict[str, Any]], first: int) -> list[Shard]:
    """The shards of a part, numbered within the dataset from `first`."""
    return [Shard(task.dataset.name, first + number, str(_shard_path(Path(task.directory), number)),
                  sha256_json([task.key, number]), marker["rows"])
            for number, marker in enumerate(markers)]


def _finished(directory: Path) -> list[dict[str, Any]]:
    """Markers of the shards that are whole, up to the first that is not."""
    markers: list[dict[str, Any]] = []
    while True:
        path, marker = _shard_path(directory, len(markers)), _marker_path(directory, len(markers))
        if not marker.exists() or not path.exists():
            return markers
        try:
            value = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            return markers
        if path.stat().st_size != value["file_bytes"]:
            return markers
        markers.append(value)
        if value["last"]:
            return markers


def _enough(markers: list[dict[str, Any]], wanted: int | None) -> bool:
    if markers and markers[-1]["last"]:
        return True  # no more to be had
    return wanted is not None and sum(marker["bytes"] for marker in markers) >= wanted


def _read_on(task: ReadTask, directory: Path, markers: list[dict[str, Any]], shown: list[str]) -> None:
    """Shards from where the last one ended; appends their markers."""
    reader = task.part.open(markers[-1]["state"] if markers else None)
    rows = iter(reader)
    state: State | None
    item = next(rows, None)
    while True:
        path = _shard_path(directory, len(markers))
        writer, state = RawWriter(path), None
        try:
            while item is not None:
                if isinstance(item, Bad):
                    _note(item, task.dataset, shown)
                writer.add(item)
                if writer.bytes >= task.shard_bytes or writer.rows >= SHARD_ROWS:
                    state = reader.state()  # before the row after it is asked for
                item = next(rows, None)
                if state is not None:
                    break
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        marker = {"rows": writer.rows, "documents": writer.documents, "bytes": writer.bytes,
                  "characters": writer.characters, "bad": writer.bad, "last": item is None,
                  "state": state if item is not None else None, "read": reader.bytes_read,
                  "file_bytes": path.stat().st_size}
        write_json(_marker_path(directory, len(markers)), marker)
        markers.append(marker)
        if _enough(markers, task.wanted):
            return


def _note(bad: Bad, dataset: DatasetConfig, shown: list[str]) -> None:
    if dataset.on_error == "stop":
        raise DataError(f"{bad}. Mend the row, or set on_error: skip for dataset {dataset.name}.")
    if len(shown) < SHOWN_BAD:
        shown.append(str(bad))


def read_so_far(task: ReadTask) -> int:
    """Raw bytes that finished shards of the part took, for progress."""
    try:
        markers = _finished(Path(task.directory))
    except OSError:
        return 0
    return int(markers[-1]["read"]) if markers else 0


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.parquet"


def _marker_path(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.json"
