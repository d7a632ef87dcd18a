"""Steps two and three of the corpus command: what needs the whole corpus, one barrier after another.

Owns how such a step is run: its features shard by shard in any process, its decision over all shards, a sidecar per
shard. Two decisions every corpus may need are made here: ids that come twice, and texts that do. Others are
CorpusSteps (`filters.corpus_step`), of which this knows only the protocol.
"""

import dataclasses
import datetime
import functools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow
import pyarrow.compute

from data_pipeline.curation.shards import (
    ATTRIBUTES,
    Shard,
    alive_rows,
    read_columns,
    read_slices,
    sidecar_table,
    text_facts,
    write_table,
)
from data_pipeline.engine.tasks import Executor
from data_pipeline.filters.base import Batch
from data_pipeline.filters.corpus_step import DOCUMENTS, CorpusStep, FeatureFile
from data_pipeline.mixtures.steps import make_step
from data_pipeline.sources.dataset import DatasetConfig, brings_ids
from data_pipeline.text.documents import text_digest
from nanollama.data.files import DataError, canonical_json, sha256_json
from nanollama.data.strict import to_mapping

STAGE_VERSION = 1  # raise it when the same steps would leave other sidecars
DUPLICATE, DUPLICATE_ID = "exact duplicate", "duplicate id"
PASS_DOCUMENTS = 20_000_000  # keys sorted at once; a larger corpus takes several passes over its keys


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step: how to make it again in another process, and what identifies it."""

    section: str
    mapping: str  # canonical JSON
    type: str
    key: str
    resources: dict[str, str]

    def prepared(self, cache: Path) -> Path:
        """Where the step's `prepare` keeps what it makes."""
        return cache / "prepared" / self.key[:32]

    def account(self, cache: Path) -> dict[str, Any]:
        """For the manifest: what was asked for, with which resources, and what the step itself tells of them."""
        step = _ready(self.section, self.mapping, self.prepared(cache))
        told = {"summary": step.summary()} if hasattr(step, "summary") else {}
        return {"section": self.section, **to_mapping(step), "resources": self.resources, **told}


def step_plans(section: str, mappings: Sequence[dict[str, Any]]) -> tuple[StepPlan, ...]:
    """The steps of a section of the mixture. Reads their resources to hash them."""
    plans = []
    for mapping in mappings:
        step = make_step(section, mapping, section)
        resources = step.resources()
        key = {"stage": "step", "version": STAGE_VERSION, "fields": to_mapping(step), "step": step.version,
               "resources": resources}
        plans.append(StepPlan(section, canonical_json(mapping), step.type, sha256_json(key), resources))
    return tuple(plans)


@functools.lru_cache(maxsize=64)
def _made(section: str, mapping: str) -> CorpusStep:
    step: CorpusStep = make_step(section, json.loads(mapping), section)
    return step


@functools.lru_cache(maxsize=64)
def _ready(section: str, mapping: str, prepared: Path) -> CorpusStep:
    """The step after its `prepare`, once per process."""
    step = _made(section, mapping)
    if hasattr(step, "prepare"):
        step.prepare(prepared)
    return step


@dataclasses.dataclass(frozen=True)
class PrepareTask:
    """What a step makes once, before the first shard reaches it."""

    plan: StepPlan
    directory: Path

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.plan.type}: preparing"

    @property
    def weight(self) -> float:
        """Before all that can be done without it."""
        return math.inf


def prepare_tasks(plans: Sequence[StepPlan], cache: Path) -> list[PrepareTask]:
    """One for each step that prepares something that is not there yet."""
    tasks = [PrepareTask(plan, plan.prepared(cache)) for plan in plans
             if hasattr(_made(plan.section, plan.mapping), "prepare")]
    return [task for task in tasks if not task.directory.exists()]


def prepare(task: PrepareTask) -> None:
    """Do it."""
    _ready(task.plan.section, task.plan.mapping, task.directory)


@dataclasses.dataclass(frozen=True)
class FeatureTask:
    """One shard's part of a step."""

    shard: Shard
    plan: StepPlan
    priority: int
    path: str  # of the features; the document table is beside it
    prepared: Path

    @property
    def documents(self) -> str:
        """Path of the document table."""
        return self.path.removesuffix(".parquet") + ".documents.parquet"

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.plan.type} of {self.shard.label}"

    @property
    def weight(self) -> int:
        """Bytes to read, about."""
        return self.shard.weight


def run_step(plan: StepPlan, shards: Sequence[Shard], datasets: Sequence[DatasetConfig], executor: Executor,
             decisions: Path, cache: Path, report: Callable[[], None] = lambda: None) -> list[Shard]:
    """The shards after the step. What is there already is not made again. Errors: DataError.

    `report` is called after each shard's features.
    """
    key = sha256_json([plan.key, [[shard.dataset, shard.key] for shard in shards]])
    after = [shard.after_step(plan.type, plan.section, key, decisions) for shard in shards]
    if all(shard.sidecars[-1].is_there() for shard in after):
        return after
    priorities = {dataset.name: number for number, dataset in enumerate(datasets)}
    tasks = [FeatureTask(shard, plan, priorities[shard.dataset],
                         str(cache / "features" / key[:32] / f"{number:06d}.parquet"), plan.prepared(cache))
             for number, shard in enumerate(shards)]
    for _ in executor.run(make_features, tasks):
        report()
    files = [FeatureFile(Path(task.path), number, task.shard.dataset, Path(task.documents))
             for number, task in enumerate(tasks)]
    work = cache / "work" / key[:32]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tables = _made(plan.section, plan.mapping).resolve(files, work)
    for shard, new, table in zip(shards, after, tables, strict=True):
        _write_step(plan, shard, new, table)
    shutil.rmtree(work, ignore_errors=True)
    return after


def _write_step(plan: StepPlan, shard: Shard, after: Shard, table: pyarrow.Table) -> None:
    """The step's table in the rows of the shard. Errors: DataError when it does not judge each document once."""
    rows = alive_rows(shard)
    given = np.asarray(table.column("row")).astype(np.int64)
    if not np.array_equal(given, np.arange(len(rows))):
        raise DataError(f"{shard.label}: step {plan.type} judged {len(given)} of {len(rows)} documents, or not in "
                        "their order: rows are lost. This is a bug of the step.")
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    columns = {name: frame[name] for name in frame.columns if name not in ("row", "reason")}
    write_table(after.sidecars[-1].path, sidecar_table(rows, frame["reason"], columns))


def make_features(task: FeatureTask) -> None:
    """Write the two files of `task` unless they are there."""
    path, documents = Path(task.path), Path(task.documents)
    if path.exists() and documents.exists():
        return
    step = _ready(task.plan.section, task.plan.mapping, task.prepared)
    tables, ids, dates, first = [], [], [], 0
    for piece in read_slices(task.shard, ("id", "text", "meta", "date", ATTRIBUTES)):
        batch = piece.batch(task.shard.dataset)
        tables.append(_moved(step.features(batch), first))
        ids += batch.ids.to_list()
        dates += [_seconds(date) for date in piece.table["date"]]
        first += len(batch)
    if not tables:
        tables = [step.features(empty_batch())]
    write_table(path, pyarrow.concat_tables(tables, promote_options="permissive"))
    write_table(documents, pyarrow.table({"id": ids, "date": dates, "priority": [task.priority] * len(ids)},
                                         schema=DOCUMENTS))


def empty_batch() -> Batch:
    """No documents: gives the columns of a step's features."""
    return Batch(pl.Series("ids", [], dtype=pl.String), pl.Series("text", [], dtype=pl.String), [])


def _moved(table: pyarrow.Table, first: int) -> pyarrow.Table:
    if not first:
        return table
    at = table.schema.get_field_index("row")
    field = table.schema.field(at)
    return table.set_column(at, field, pyarrow.compute.add(table.column(at), pyarrow.scalar(first, field.type)))


def _seconds(date: str | None) -> int | None:
    """Seconds since 1970 of the first moment of YYYY[-MM[-DD]]."""
    if date is None:
        return None
    whole = (date + "-01-01")[:10] if len(date) < 10 else date
    try:
        day = datetime.date.fromisoformat(whole)
    except ValueError:  # 31 February
        return None
    return (day - datetime.date(1970, 1, 1)).days * 86_400


def drop_repeated_ids(shards: Sequence[Shard], datasets: Sequence[DatasetConfig], decisions: Path) -> list[Shard]:
    """The shards after documents whose id their dataset gave before are dropped; the first is kept."""
    result = list(shards)
    for dataset in datasets:
        if not brings_ids(dataset):
            continue
        chosen = [number for number, shard in enumerate(shards) if shard.dataset == dataset.name]
        members = [shards[number] for number in chosen]
        after = _repeats("unique-ids", "ids", members, decisions, _id_keys, DUPLICATE_ID, lambda shard: True)
        for number, shard in zip(chosen, after, strict=True):
            result[number] = shard
    return result


def drop_repeated_texts(shards: Sequence[Shard], datasets: Sequence[DatasetConfig], decisions: Path) -> list[Shard]:
    """The shards after texts that this dataset or an earlier one gave are dropped from datasets that ask for it."""
    asking = {dataset.name for dataset in datasets if any(item.get("type") == "exact_duplicate"
                                                          for item in dataset.filters)}
    if not asking:
        return list(shards)
    return _repeats("exact-duplicate", "filters", shards, decisions, lambda shard: text_facts(shard).digests,
                    DUPLICATE, lambda shard: shard.dataset in asking)


def _id_keys(shard: Shard) -> np.ndarray:
    ids = read_columns(shard.path, ["id"]).column("id").take(alive_rows(shard)).to_pylist()
    return np.frombuffer(b"".join(text_digest(one.encode()) for one in ids), np.uint8).reshape(len(ids), 16)


def _repeats(name: str, section: str, shards: Sequence[Shard], decisions: Path,
             keys_of: Callable[[Shard], np.ndarray], reason: str, asked: Callable[[Shard], bool]) -> list[Shard]:
    """The shards after documents are dropped that have the key of an earlier one, of the shards `asked` for.

    keys_of: of each document that is alive, [n, 16] uint8.
    """
    key = sha256_json([name, STAGE_VERSION, [[shard.dataset, shard.key, asked(shard)] for shard in shards]])
    after = [shard.after_step(name, section, key, decisions) for shard in shards]
    if all(shard.sidecars[-1].is_there() for shard in after):
        return after
    rows = [alive_rows(shard) for shard in shards]
    starts = np.cumsum([0, *map(len, rows)])
    first = _first_of_each(shards, keys_of, starts)
    for number, shard in enumerate(shards):
        mine = np.arange(starts[number], starts[number + 1])
        of = first[starts[number]:starts[number + 1]]
        repeats = (of != mine) & asked(shard)
        ids = _ids_at(np.unique(of[repeats]), shards, rows, starts)
        reasons = pl.Series([reason if repeat else None for repeat in repeats.tolist()], dtype=pl.String)
        originals = pl.Series([ids[int(place)] if repeat else None for place, repeat in
                               zip(of.tolist(), repeats.tolist(), strict=True)], dtype=pl.String)
        write_table(after[number].sidecars[-1].path,
                    sidecar_table(rows[number], reasons, {"duplicate_of": originals}))
    return after


def _first_of_each(shards: Sequence[Shard], keys_of: Callable[[Shard], np.ndarray],
                   starts: np.ndarray) -> np.ndarray:
    """For each document the number of the first one with its key. Keys are sorted a part of their range at a time."""
    total = int(starts[-1])
    passes = max(1, -(-total // PASS_DOCUMENTS))
    first = np.arange(total)
    for turn in range(passes):
        keys, places = [], []
        for number, shard in enumerate(shards):
            mine = keys_of(shard)
            chosen = np.flatnonzero(mine[:, 0].astype(np.int64) * passes // 256 == turn)
            keys.append(mine[chosen])
            places.append(chosen + starts[number])
        joined = np.ascontiguousarray(np.concatenate(keys)).view([("high", ">u8"), ("low", ">u8")]).reshape(-1)
        place = np.concatenate(places)
        _, index, inverse = np.unique(joined, return_index=True, return_inverse=True)
        first[place] = place[index[inverse]]
    return first


def _ids_at(places: np.ndarray, shards: Sequence[Shard], rows: Sequence[np.ndarray],
            starts: np.ndarray) -> dict[int, str]:
    """Ids of documents by their number."""
    found: dict[int, str] = {}
    of = np.searchsorted(starts, places, "right") - 1
    for number in np.unique(of).tolist():
        mine = places[of == number]
        column = read_columns(shards[number].path, ["id"]).column("id")
        ids = column.take(rows[number][mine - starts[number]]).to_pylist()
        found.update({int(place): f"{shards[number].dataset}/{one}" for place, one in zip(mine, ids, strict=True)})
    return found
