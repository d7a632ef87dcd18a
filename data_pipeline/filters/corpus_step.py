"""Steps that need the whole corpus: what each shard gives by itself, then one decision over all of them.

Owns the protocol between such a step (duplicates, contamination, importance) and whoever runs it, and the files
between its two phases. Knows no step, and not how work is spread over processes.

Row numbers count the documents that reach the step: the rows of the shard's document table, from 0.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters.base import Batch

# The document table of a shard, beside its features. `date`: seconds since 1970 (UTC), null where unknown.
# `priority`: of two documents of one date the lower is the original, such as the dataset's place in the mixture.
DOCUMENTS = pa.schema([("id", pa.string()), ("date", pa.int64()), ("priority", pa.int32())])


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """What one shard gave: two Parquet files."""

    path: Path  # the tables that `features` returned, in order
    shard: int  # number of the shard in the corpus
    dataset: str
    documents: Path  # one row a document, schema DOCUMENTS

    @property
    def rows(self) -> int:
        """Documents of the shard."""
        return int(pq.read_metadata(self.documents).num_rows)


class CorpusStep(Protocol):
    """One whole-corpus step: a frozen dataclass whose fields are its parameters.

    `features` runs per shard, in any process and order. `resolve` runs once, after all of them, with the shards
    in the corpus's order; its result depends on that order and on nothing of how `features` was run. It keeps
    what grows with the corpus in files under `work`. A step may have `summary()`: facts for the manifest, as JSON. It
    may have `prepare(directory)`: what `features` needs beside the batch, made in `directory` unless it is there, and
    opened; called before the first `features` in every process.
    """

    version: ClassVar[int]  # raised when the same input would be judged otherwise

    @property
    def type(self) -> str:
        """The name by which a mixture file asks for it."""

    def features(self, batch: Batch) -> pa.Table:
        """What the decision needs of these documents. Column `row`: position in `batch`, in rising order.

        Who cuts a shard into several batches adds the position of each one's first document to `row`.
        """

    def resolve(self, shards: Sequence[FeatureFile], work: Path) -> Iterator[pa.Table]:
        """One table per shard, in order, one row per document: row, reason (null = keep), facts."""

    def resources(self) -> dict[str, str]:
        """Identity (such as SHA-256) of every file or library that decides the result, by name."""


def documents_table(ids: Sequence[str], dates: Sequence[int | None], priority: int) -> pa.Table:
    """The document table of one shard, all of one priority."""
    return pa.table({"id": ids, "date": dates, "priority": [priority] * len(ids)}, schema=DOCUMENTS)


def judgement(rows: int, reasons: dict[int, str], facts: dict[str, tuple[pa.DataType, dict[int, object]]]) -> pa.Table:
    """A table of `resolve` from what is known of few rows: {row: value}; other rows are kept and have no fact."""
    columns = {"row": pa.array(range(rows), pa.int32()),
               "reason": pa.array([reasons.get(row) for row in range(rows)], pa.string())}
    for name, (kind, values) in facts.items():
        columns[name] = pa.array([values.get(row) for row in range(rows)], kind)
    return pa.table(columns)
