"""Packing, second part: which documents are in which record of which file, and the proof that no token is lost.

Owns the order of records and documents on disk. Decided in one process from lengths alone, streaming: memory is the
recipe of one file and a few integers per document. Writing and reading back is `files`. Knows nothing of text.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from data_pipeline.packing.bestfit import plan
from data_pipeline.packing.files import FileTask, Recipe
from data_pipeline.packing.tokens import ShardTask
from nanollama.data.files import DataError, sha256_file
from nanollama.data.packed import DOCUMENTS_FILE

SPLITS = ("train", "validation")
WINDOW_DOCUMENTS = 10_000
LANES = 128
WINDOW_RECORDS = 2_000  # a window also holds this much text: its last record is the one with room left over
# Of tokens in one file, before compression: a split is cut into FILES of them, which are written side by side, unless
# they would be smaller or larger than this.
FILES, FILE_BYTES = 8, (32_000_000, 256_000_000)


@dataclasses.dataclass
class Documents:
    """What is known of each document, in corpus order; the index is the `doc` of the records."""

    tokens: np.ndarray  # [N] uint32
    sources: np.ndarray  # [N] uint16
    validation: np.ndarray  # [N] bool
    bytes: np.ndarray  # [N] uint64
    characters: np.ndarray  # [N] uint64
    first: np.ndarray  # [shards + 1] first document of each shard
    places: np.ndarray  # [N] int64, first token in the file of its shard
    record: np.ndarray  # [N] uint32, first record within the split; filled by `plan_split`
    segment: np.ndarray  # [N] uint32, segment within that record; filled by `plan_split`


def load_documents(tasks: list[ShardTask], validation_fraction: float) -> Documents:
    """The documents of all shards, each with its split.

    Held out are the documents whose place is below the fraction; in a corpus so small that there is none, the
    lowest, but for a corpus of one document, which is trained on. A text equal to a derived one follows the first of
    those: equal texts are in one split, and derived texts are where their origin is.
    """
    names = ("tokens", "source", "place", "bytes", "characters")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    derived: dict[str, float] = {}
    for task in tasks:
        table = pyarrow.parquet.read_table(task.table_path, columns=["sha256", "place", "derived"])
        for row in table.filter(table.column("derived")).to_pylist():
            derived.setdefault(row["sha256"], row["place"])
    texts = pyarrow.array(derived, pyarrow.string())
    places = np.fromiter(derived.values(), np.float64, len(derived))
    for task in tasks:
        table = pyarrow.parquet.read_table(task.table_path, columns=[*names, "sha256"])
        for name in names:
            columns[name].append(table.column(name).to_numpy())
        if derived:
            found = pyarrow.compute.index_in(table.column("sha256"), value_set=texts).fill_null(-1).to_numpy()
            columns["place"][-1] = np.where(found >= 0, places[found], columns["place"][-1])
    count = sum(len(column) for column in columns["tokens"])
    if count >= 1 << 32:
        raise DataError(
            f"{count} documents, a packed set holds at most {(1 << 32) - 1}. Pack the corpus in parts.")
    whole = {name: np.concatenate(columns[name]) for name in names}
    validation = whole["place"] < validation_fraction
    if validation_fraction > 0 and not validation.any() and count > 1:
        validation = whole["place"] == whole["place"].min()
    before = [np.cumsum(column, dtype=np.int64) - column for column in columns["tokens"]]
    return Documents(
        tokens=whole["tokens"], sources=whole["source"], validation=validation, bytes=whole["bytes"],
        characters=whole["characters"], first=np.cumsum([0, *(len(column) for column in columns["tokens"])]),
        places=np.concatenate(before), record=np.zeros(count, np.uint32), segment=np.zeros(count, np.uint32))


def interleaved(first: np.ndarray) -> np.ndarray:
    """All documents, [N] indices, in an order that goes through up to LANES parts of the corpus side by side.

    Sources follow one another in a corpus. Windows that hold some of each pack better (long documents fill what
    short ones leave) and records of one source do not lie together; reading stays sequential in each part.
    """
    edges = first[np.unique(np.linspace(0, len(first) - 1, min(len(first), LANES + 1)).round().astype(int))]
    counts = np.diff(edges)
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return np.argsort(places, kind="stable")


def windows(lengths: np.ndarray, record_length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of documents that are packed together."""
    start, tokens = 0, 0
    for index, length in enumerate(lengths.tolist()):
        tokens += length
        if index + 1 - start >= WINDOW_DOCUMENTS and tokens >= WINDOW_RECORDS * record_length:
            yield start, index + 1
            start, tokens = index + 1, 0
    if start < len(lengths):
        yield start, len(lengths)


def plan_split(split: str, documents: Documents, tasks: list[ShardTask], dtype: np.dtype, record_length: int,
               work: Path) -> list[FileTask]:
    """The files of one split, their recipes in `work`/recipes; fills documents.record and .segment.

    Errors: DataError when a plan does not hold every token of every document once, in order.
    """
    chosen = interleaved(documents.first)
    chosen = chosen[documents.validation[chosen] == (split == "validation")]
    per_file = _records_per_file(int(documents.tokens[chosen].sum(dtype=np.int64)), record_length)
    paths = tuple(str(task.tokens_path) for task in tasks)
    files: list[FileTask] = []
    waiting: list[Recipe] = []
    records = 0

    def emit(recipe: Recipe) -> None:
        name = f"{split}-{len(files):05d}"
        path = work / "recipes" / f"{name}.npz"
        recipe.save(path)
        files.append(FileTask(split, str(work / "set" / f"{name}.array_record"), str(path), paths, dtype.str,
                              record_length, recipe.records, int(recipe.lengths.sum())))

    for start, stop in windows(documents.tokens[chosen], record_length):
        waiting.append(_window(split, chosen[start:stop], documents, record_length, records))
        records += waiting[-1].records
        while sum(one.records for one in waiting) >= per_file:
            whole = Recipe.joined(waiting)
            emit(whole.cut(0, per_file))
            waiting = [whole.cut(per_file, whole.records)]
    if waiting and (rest := Recipe.joined(waiting)).records:
        emit(rest)
    return files


def _records_per_file(tokens: int, record_length: int) -> int:
    least, most = FILE_BYTES
    return max(1, min(max(4 * tokens // FILES, least), most) // (4 * record_length))


def _window(split: str, members: np.ndarray, documents: Documents, record_length: int, before: int) -> Recipe:
    """The records of documents that are packed together; `before`: records of the split so far."""
    planned = plan(documents.tokens[members].tolist(), record_length)
    pieces = np.array([piece for record in planned for piece in record], np.int64).reshape(-1, 3)
    rows, starts, stops = members[pieces[:, 0]], pieces[:, 1], pieces[:, 2]
    first = np.concatenate([[0], np.cumsum([len(record) for record in planned])]).astype(np.int64)
    _check_cover(split, members, rows, starts, stops, documents)
    heads = np.flatnonzero(starts == 0)
    record = np.searchsorted(first, heads, "right") - 1
    documents.record[rows[heads]] = before + record
    documents.segment[rows[heads]] = heads - first[record]
    return Recipe(rows.astype(np.uint32), documents.sources[rows],
                  (np.searchsorted(documents.first, rows, "right") - 1).astype(np.uint32),
                  documents.places[rows] + starts, (stops - starts).astype(np.uint32), first)


def _check_cover(split: str, members: np.ndarray, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray,
                 documents: Documents) -> None:
    """Every piece of a document goes on where the one before it ended, and all of them hold all of its tokens."""
    order = np.argsort(rows, kind="stable")
    rows, starts, stops = rows[order], starts[order], stops[order]
    again = np.concatenate([[False], rows[1:] == rows[:-1]])
    goes_on = starts == np.where(again, np.roll(stops, 1), 0)
    if not goes_on.all():
        piece = int(np.flatnonzero(~goes_on)[0])
        raise DataError(f"{split}: tokens {starts[piece]}..{stops[piece]} of document {rows[piece]} are not the next "
                        "of it. This is a bug; please report it.")
    last = np.concatenate([~again[1:], [True]]) if len(rows) else again
    if not np.array_equal(rows[last], np.sort(members)) or (stops[last] != documents.tokens[rows[last]]).any():
        raise DataError(f"{split}: {int(documents.tokens[members].sum()):,} tokens in, "
                        f"{int((stops - starts).sum()):,} planned for records. This is a bug; please report it.")


@dataclasses.dataclass(frozen=True)
class TableTask:
    """docs.parquet."""

    path: str
    tables: tuple[str, ...]  # of the documents, by shard
    sources: tuple[str, ...]
    laid: str  # path: where every document went

    @property
    def label(self) -> str:
        """For messages."""
        return DOCUMENTS_FILE

    @property
    def weight(self) -> int:
        """Less than any file of records."""
        return 0


def table_task(documents: Documents, tasks: list[ShardTask], sources: list[str], work: Path) -> TableTask:
    """The task for docs.parquet, once all splits are planned."""
    laid = work / "recipes" / "documents.npz"
    with open(laid, "wb") as file:
        np.savez(file, first=documents.first, validation=documents.validation, record=documents.record,
                 segment=documents.segment)
    return TableTask(str(work / "set" / DOCUMENTS_FILE), tuple(str(task.table_path) for task in tasks), tuple(sources),
                     str(laid))


def write_table(task: TableTask) -> dict[str, Any]:
    """docs.parquet: one row a document, from token back to source. Returns its row for the manifest."""
    path = Path(task.path)
    with np.load(task.laid) as laid:
        first, validation, record, segment = (laid[name] for name in ("first", "validation", "record", "segment"))
    writer: pyarrow.parquet.ParquetWriter | None = None
    try:
        for shard, table_path in enumerate(task.tables):
            table = pyarrow.parquet.read_table(table_path)
            start, stop = (int(edge) for edge in first[shard:shard + 2])
            split = np.where(validation[start:stop], "validation", "train")
            rows = pyarrow.table({
                "doc": pyarrow.array(np.arange(start, stop, dtype=np.uint32)),
                "doc_id": table.column("doc_id"),
                "source": pyarrow.array(task.sources).take(table.column("source").combine_chunks()),
                "split": pyarrow.array(split.tolist(), pyarrow.string()),
                "record": pyarrow.array(record[start:stop]),
                "segment": pyarrow.array(segment[start:stop]), "tokens": table.column("tokens"),
                "bytes": table.column("bytes"), "characters": table.column("characters"),
                "sha256": table.column("sha256"), "date": table.column("date"), "meta": table.column("meta")
            })
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(path, rows.schema, compression="zstd")
            writer.write_table(rows)
    finally:
        if writer is not None:
            writer.close()
    return {"path": DOCUMENTS_FILE, "split": None, "bytes": path.stat().st_size, "sha256": sha256_file(path),
            "records": len(record)}
