"""The last step of the corpus command: documents that every stage kept become shards, written once.

Owns which documents go into which file (decided by the sizes of the texts, before any is written, so that files can
be made in any process and order) and the list of dropped rows. Knows no stage.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from data_pipeline.curation import corpus_format
from data_pipeline.curation.corpus_format import ShardWriter
from data_pipeline.curation.sampling import NOT_SAMPLED, OVER_CAP
from data_pipeline.curation.shards import (
    ATTRIBUTES,
    RAW,
    Facts,
    Shard,
    read_columns,
    read_slices,
    write_table,
)
from data_pipeline.engine.stage import finished_file, mark_finished
from data_pipeline.text.documents import text_digest
from nanollama.data.files import sha256_json, write_atomic

STAGE_VERSION = 2  # raise it when the same documents would give other bytes
WRITTEN = ("id", "text", "meta", "date", "digest", ATTRIBUTES)  # columns that a document is made of
WISHED_AWAY = (OVER_CAP, NOT_SAMPLED)  # reasons that are not listed row by row


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of one shard, those that are alive."""

    shard: Shard
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class OutputTask:
    """One file of the corpus."""

    dataset: str
    pieces: tuple[Piece, ...]
    path: str  # in the cache, named by what decides its bytes
    origins: bool  # whether a rewritten document names its text as it was read

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.dataset} file {Path(self.path).name}"


@dataclasses.dataclass(frozen=True)
class DropsTask:
    """What is told of the rows of one shard: the dropped ones as lines, all of them as a table without their text."""

    shard: Shard
    path: str  # of the lines
    rows: str  # of the table


def plan_outputs(shards: Iterable[tuple[Shard, Facts]], cache: Path, origins: bool,
                 shard_format: str) -> list[OutputTask]:
    """The files of the corpus in their order: documents in theirs, a file of one dataset, of about SHARD_BYTES.

    `origins`: another dataset is made from texts as they are read (docstrings), and packing must be able to tell.
    """
    tasks: list[OutputTask] = []
    pieces: list[Piece] = []
    held = 0

    def close() -> None:
        nonlocal held
        if pieces:
            members = [[piece.shard.dataset, piece.shard.key, piece.start, piece.stop] for piece in pieces]
            key = sha256_json(["output", STAGE_VERSION, shard_format, origins, members])
            tasks.append(OutputTask(pieces[0].shard.dataset, tuple(pieces), str(cache / f"{key[:32]}.{shard_format}"),
                                    origins))
        pieces.clear()
        held = 0

    for shard, fact in shards:
        if pieces and pieces[0].shard.dataset != shard.dataset:
            close()
        start = 0
        for row, size in zip(fact.rows.tolist(), fact.bytes.tolist(), strict=True):
            held += size
            if held >= corpus_format.SHARD_BYTES:
                pieces.append(Piece(shard, start, row + 1))
                close()
                start = row + 1
        if held and len(fact.rows) and start <= fact.rows[-1]:
            pieces.append(Piece(shard, start, int(fact.rows[-1]) + 1))
    close()
    return tasks


def write_output(task: OutputTask) -> dict[str, Any]:
    """Write one file unless it is there; returns {bytes, sha256, documents}."""
    path = Path(task.path)
    if (known := finished_file(path)) is not None:
        return known
    with ShardWriter(path) as writer:
        for piece in task.pieces:
            shard = piece.shard
            rewritten = task.origins and any(sidecar.new_texts() for sidecar in shard.sidecars)
            for part in read_slices(shard, WRITTEN, piece.start, piece.stop):
                for row in part.table.iter_rows(named=True):
                    writer.write(f"{shard.dataset}/{row['id']}", row["text"], shard.dataset, _meta(row, rewritten),
                                 row["date"])
    result = {"bytes": writer.bytes, "sha256": writer.sha256, "documents": writer.documents}
    mark_finished(path, result)
    return result


def _meta(row: dict[str, Any], rewritten: bool) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(row["meta"])
    if (attributes := json.loads(row[ATTRIBUTES])):
        meta["attributes"] = attributes
    if rewritten and "derived_from" not in meta and text_digest(row["text"].encode()) != row["digest"]:
        meta["derived_from"] = row["digest"].hex()  # its split is decided by the text as it was read
    return meta


def write_drops(task: DropsTask) -> None:
    """List the dropped rows of one shard, in their order, but for those that were only wished away; and describe all
    rows, so that `data_pipeline.explain` needs no raw shard."""
    path = Path(task.path)
    if not Path(task.rows).exists():
        write_table(task.rows, read_columns(task.shard.path, [name for name in RAW.names if name != "text"]))
    if path.exists():
        return
    reasons, details = final_reasons(task.shard), _details(task.shard)
    raw = read_columns(task.shard.path, ["id", "place", "detail"])
    rows = np.flatnonzero(np.array([reason is not None and reason not in WISHED_AWAY for reason in reasons], bool))
    lines = []
    for row, found in zip(rows.tolist(), raw.take(rows).to_pylist(), strict=True):
        line = {"dataset": task.shard.dataset, "place": found["place"], "reason": reasons[row],
                "detail": found["detail"] or details.get(row, ""), "id": found["id"]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines))


def _details(shard: Shard) -> dict[int, str]:
    """{row: of what it is a copy, or which evaluation item it holds}, of rows that a step dropped for that."""
    told: dict[int, str] = {}
    for sidecar in shard.sidecars:
        names = {"duplicate_of", "hits"} & set(pyarrow.parquet.read_schema(sidecar.path).names)
        table = read_columns(sidecar.path, ["row", "reason", *names]) if names else None
        for one in table.filter(table.column("reason").is_valid()).to_pylist() if table is not None else ():
            hit = (one.get("hits") or [None])[0]
            if one.get("duplicate_of") is not None:
                told[one["row"]] = f"of {one['duplicate_of']}"
            elif hit is not None:
                told[one["row"]] = f"{', '.join(hit['items'][:3])}: {hit['text']}".removeprefix(": ")
    return told


def final_reasons(shard: Shard) -> list[str | None]:
    """Why each row of the shard was dropped, None for those that are alive."""
    reasons: list[str | None] = read_columns(shard.path, ["reason"]).column("reason").to_pylist()
    for sidecar in shard.sidecars:
        table = read_columns(sidecar.path, ["row", "reason"])
        for row, reason in zip(table.column("row").to_pylist(), table.column("reason").to_pylist(), strict=True):
            if reason is not None:
                reasons[row] = reason
    return reasons
