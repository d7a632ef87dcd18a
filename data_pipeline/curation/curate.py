"""Step two of the corpus command, first half: the filters of a dataset judge every document of a raw shard.

Owns the order of the filters, one reading of the text for all of them, and their sidecars: one per filter and shard,
named by a hash of everything that decided it, so that a changed parameter redoes that filter and what follows it.
Knows no filter.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import polars as pl

from data_pipeline.curation.shards import Shard, Sidecar, read_slices, sidecar_table, texts_table, write_table
from data_pipeline.filters import ExactDuplicateFilter, Filter, filter_key, make_filter
from data_pipeline.filters.base import Batch
from data_pipeline.sources.dataset import DatasetConfig
from nanollama.data.files import DataError, canonical_json, sha256_json

STAGE_VERSION = 1  # raise it when the same filters would leave other sidecars
SECTION = "filters"


@dataclasses.dataclass(frozen=True)
class FilterPlan:
    """One filter of one dataset: how to make it again in another process, and what identifies it."""

    mapping: str  # canonical JSON
    type: str
    key: str


@dataclasses.dataclass(frozen=True)
class FilterTask:
    """One shard to be judged by all filters of its dataset."""

    shard: Shard
    plans: tuple[FilterPlan, ...]
    sidecars: tuple[Sidecar, ...]  # to be made, one per plan

    @property
    def label(self) -> str:
        """For messages."""
        return self.shard.label

    @property
    def weight(self) -> int:
        """Bytes to read, about."""
        return self.shard.weight


def filter_plans(dataset: DatasetConfig) -> tuple[FilterPlan, ...]:
    """The filters of `dataset` that judge one document at a time. Reads model and list files to hash them."""
    plans = []
    for mapping in dataset.filters:
        made = make_filter(mapping, f"dataset {dataset.name}: filters")
        if not isinstance(made, ExactDuplicateFilter):
            plans.append(FilterPlan(canonical_json(mapping), made.type, sha256_json(
                {"stage": SECTION, "version": STAGE_VERSION, "filter": filter_key(made)})))
    return tuple(plans)


def filter_task(shard: Shard, plans: tuple[FilterPlan, ...], decisions: Path, cache: Path) -> tuple[FilterTask, Shard]:
    """(the task for a shard, the shard as it is once the task is done)."""
    key, sidecars = shard.key, []
    for number, plan in enumerate(plans):
        key = sha256_json([key, plan.key])
        name = f"{number:02d}-{plan.type}-{key[:24]}.parquet"
        sidecars.append(Sidecar(plan.type, SECTION, str(decisions / shard.dataset / f"{shard.number:05d}" / name),
                                str(cache / f"{key[:32]}.parquet")))
    return FilterTask(shard, plans, tuple(sidecars)), shard.after(key, *sidecars)


@functools.lru_cache(maxsize=256)
def _made(mapping: str) -> Filter:
    return make_filter(json.loads(mapping), SECTION)


def judge_shard(task: FilterTask) -> None:
    """Write the sidecars of `task` that are missing. Errors: DataError."""
    done = 0
    while done < len(task.sidecars) and task.sidecars[done].is_there():
        done += 1
    if done == len(task.sidecars):
        return
    start = task.shard.after("", *task.sidecars[:done])
    chain = [_Stage(plan, sidecar) for plan, sidecar in zip(task.plans[done:], task.sidecars[done:], strict=True)]
    for piece in read_slices(start):
        rows, batch = piece.rows, piece.batch(task.shard.dataset)
        for stage in chain:
            rows, batch = stage.judge(rows, batch, task.shard.label)
    for stage in chain:
        stage.write()


class _Stage:
    """One filter at one shard."""

    def __init__(self, plan: FilterPlan, sidecar: Sidecar):
        self.plan, self.sidecar, self.filter = plan, sidecar, _made(plan.mapping)
        self._rows: list[np.ndarray] = []
        self._frames: list[pl.DataFrame] = []
        self._text_rows: list[np.ndarray] = []
        self._texts: list[str] = []
        self._rewrites = False

    def judge(self, rows: np.ndarray, batch: Batch, where: str) -> tuple[np.ndarray, Batch]:
        """Judge some documents; returns those that are kept."""
        judgement = self.filter.judge(batch)
        reasons = judgement.reasons.cast(pl.String)
        columns = {"reason": reasons, **judgement.scores}
        if any(len(column) != len(batch) for column in columns.values()):
            raise DataError(f"{where}: filter {self.plan.type} gave "
                            f"{ {name: len(column) for name, column in columns.items()} } values for {len(batch)} "
                            "documents. This is a bug of the filter.")
        text = batch.text
        if judgement.text is not None:
            self._rewrites = True
            text = judgement.text.alias("text")
            empty = text.is_null() | (text.str.strip_chars() == "")
            reasons = pl.select(pl.when(reasons.is_null() & empty).then(pl.lit(f"empty after {self.plan.type}"))
                                .otherwise(reasons).alias("reason")).to_series()
            changed = np.flatnonzero(((text != batch.text) & reasons.is_null()).to_numpy())
            self._text_rows.append(rows[changed])
            self._texts += text.gather(changed).to_list()
        self._rows.append(rows)
        self._frames.append(pl.DataFrame([reasons.alias("reason"),
                                          *(values.alias(name) for name, values in judgement.scores.items())]))
        kept = np.flatnonzero(reasons.is_null().to_numpy())
        if len(kept) == len(rows) and judgement.text is None:
            return rows, batch  # the same object keeps what others computed of it
        return rows[kept], Batch(batch.ids.gather(kept), text.gather(kept), [batch.meta[index] for index in kept])

    def write(self) -> None:
        """The sidecar, and the new texts before it."""
        if self._rewrites:
            rows = np.concatenate(self._text_rows) if self._text_rows else np.zeros(0, np.int64)
            write_table(self.sidecar.texts or "", texts_table(rows, self._texts))
        frame = pl.concat(self._frames, how="diagonal_relaxed") if self._frames else pl.DataFrame(
            {"reason": pl.Series([], dtype=pl.String)})
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, np.int64)
        columns = {name: frame[name] for name in frame.columns if name != "reason"}
        write_table(self.sidecar.path, sidecar_table(rows, frame["reason"], columns, rewrites=self._rewrites))
