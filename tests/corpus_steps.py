"""A corpus on disk for whole-corpus steps: shards of documents, run through both phases."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters.base import make_batch
from data_pipeline.filters.corpus_step import FeatureFile, documents_table


@dataclasses.dataclass(frozen=True)
class Doc:
    id: str
    text: str
    date: int | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_step(step, shards: list[list[Doc]], priorities: list[int] | None = None, cut: int | None = None) -> list[dict]:
    """The rows of `resolve` for every document, with its id; `cut`: documents in a batch."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        files = []
        for number, docs in enumerate(shards):
            tables = []
            for start in range(0, max(len(docs), 1), cut or max(len(docs), 1)):
                part = docs[start:start + cut] if cut else docs
                table = step.features(make_batch([doc.text for doc in part], [doc.id for doc in part],
                                                 [doc.meta for doc in part]))
                tables.append(table.set_column(0, "row", pa.array([row + start for row in table["row"].to_pylist()],
                                                                  table.schema.field("row").type)))
            priority = priorities[number] if priorities else 0
            file = FeatureFile(work / f"features-{number}", number, f"set{priority}", work / f"documents-{number}")
            pq.write_table(pa.concat_tables(tables), file.path)
            pq.write_table(documents_table([doc.id for doc in docs], [doc.date for doc in docs], priority),
                           file.documents)
            files.append(file)
        tables = list(step.resolve(files, work / "work"))
        assert len(tables) == len(shards)
        rows = []
        for docs, table in zip(shards, tables, strict=True):
            assert table["row"].to_pylist() == list(range(len(docs)))
            values = table.drop_columns("row").to_pylist()
            rows += [{"id": doc.id, **value} for doc, value in zip(docs, values, strict=True)]
        return rows
