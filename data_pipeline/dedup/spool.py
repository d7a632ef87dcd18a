"""What the search for duplicates keeps on disk: the order of documents, and rows spread over partitions.

Owns which of two documents is the older one, and the files that keep memory bounded whatever the corpus holds.
Knows no kind of similarity.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters.corpus_step import FeatureFile, judgement
from nanollama.data.files import DataError

Docs = npt.NDArray[np.int64]  # documents, numbered through the corpus
UNKNOWN_DATE = np.iinfo(np.int64).max  # a document without a date counts as the youngest
PARTITION_ROWS = 2_000_000  # rows sorted in memory at a time
_BUFFER_BYTES = 1 << 18  # held per partition before it is written
MAX_DOCUMENTS = 1 << 32  # a pair of documents is one 64-bit number


class Documents:
    """All documents that reach a step, in the corpus's order: their age and id, from files."""

    def __init__(self, shards: Sequence[FeatureFile], work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.shards = list(shards)
        self.first = np.zeros(len(self.shards) + 1, dtype=np.int64)  # number of each shard's first document
        np.cumsum([shard.rows for shard in self.shards], out=self.first[1:])
        if len(self) >= MAX_DOCUMENTS:
            raise DataError(f"{len(self):,} documents reach one duplicate search; it takes fewer than "
                            f"{MAX_DOCUMENTS:,}. Split the corpus into several mixtures.")
        self._date = file_array(work / "date", len(self), np.int64)
        self._priority = file_array(work / "priority", len(self), np.int32)
        self._id_end = file_array(work / "id_end", len(self), np.int64)
        end = 0
        with open(work / "ids", "wb") as ids:
            for shard, first in zip(self.shards, self.first, strict=False):
                table = pq.read_table(shard.documents)
                here = slice(first, first + len(table))
                self._date[here] = table["date"].combine_chunks().fill_null(UNKNOWN_DATE).to_numpy()
                self._priority[here] = table["priority"].to_numpy()
                for number, name in enumerate(table["id"].to_pylist(), start=int(first)):
                    end += ids.write(name.encode())
                    self._id_end[number] = end
        self._ids = work / "ids"

    def __len__(self) -> int:
        return int(self.first[-1])

    def oldest_first(self, docs: Docs, *before: npt.NDArray) -> npt.NDArray[np.intp]:
        """The order that sorts `docs` by the arrays `before` (the last one first), then from old to young.

        Older: the earlier date; on one date the lower priority; then the place in the corpus.
        """
        return np.lexsort((docs, self._priority[docs], self._date[docs], *before))

    def ids(self, docs: Docs) -> list[str]:
        """Names of `docs`."""
        names = []
        with open(self._ids, "rb") as file:
            for number in docs.tolist():
                start = int(self._id_end[number - 1]) if number else 0
                file.seek(start)
                names.append(file.read(int(self._id_end[number]) - start).decode())
        return names

    def judgements(self, leader: Docs, reason: str, score: str | None = None,
                   scores: npt.NDArray | None = None) -> Iterator[pa.Table]:
        """The tables of `resolve`: document d is dropped as a copy of leader[d], or kept where that is -1."""
        for index, shard in enumerate(self.shards):
            part = slice(self.first[index], self.first[index + 1])
            rows = np.flatnonzero(leader[part] >= 0)
            names = dict(zip(rows.tolist(), self.ids(leader[part][rows]), strict=True))
            facts: dict[str, tuple[pa.DataType, dict[int, object]]] = {"duplicate_of": (pa.string(), dict(names))}
            if score is not None and scores is not None:
                kind = pa.from_numpy_dtype(scores.dtype)
                facts[score] = (kind, dict(zip(rows.tolist(), scores[part][rows].tolist(), strict=True)))
            yield judgement(shard.rows, dict.fromkeys(rows.tolist(), reason), facts)


class Partitions:
    """Rows spread over files by the leading bits of a key, so that equal keys meet in one file."""

    def __init__(self, directory: Path, rows: int, dtype: npt.DTypeLike):
        """`rows`: how many are expected; it decides the number of files, never the result."""
        directory.mkdir(parents=True, exist_ok=True)
        self.dtype = np.dtype(dtype)
        self.paths = [directory / f"{number:05d}" for number in range(-(-max(rows, 1) // PARTITION_ROWS))]
        for path in self.paths:
            path.write_bytes(b"")
        self._waiting: list[list[np.ndarray]] = [[] for _ in self.paths]
        self._bytes = [0] * len(self.paths)

    def add(self, key: npt.NDArray[np.uint64], rows: npt.NDArray) -> None:
        """Put `rows` where their keys belong."""
        if len(self.paths) == 1:
            return self._put(0, rows)
        where = ((key >> np.uint64(32)) * np.uint64(len(self.paths))) >> np.uint64(32)
        order = np.argsort(where, kind="stable")
        cuts = np.searchsorted(where[order], np.arange(len(self.paths) + 1))
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            self._put(number, rows[order[cuts[number]:cuts[number + 1]]])
        return None

    def __iter__(self) -> Iterator[npt.NDArray]:
        """The rows of one partition after the other."""
        for number in range(len(self.paths)):
            self._flush(number)
            yield np.fromfile(self.paths[number], self.dtype)

    def _put(self, number: int, rows: npt.NDArray) -> None:
        self._waiting[number].append(rows.astype(self.dtype, copy=False))
        self._bytes[number] += rows.nbytes
        if self._bytes[number] >= _BUFFER_BYTES:
            self._flush(number)

    def _flush(self, number: int) -> None:
        if self._waiting[number]:
            with open(self.paths[number], "ab") as file:
                file.write(np.concatenate(self._waiting[number]).tobytes())
        self._waiting[number], self._bytes[number] = [], 0


def file_array(path: Path, length: int, dtype: npt.DTypeLike) -> npt.NDArray:
    """An array of zeros whose memory is the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if length == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "w+", shape=(length,))
