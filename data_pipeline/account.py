"""The account of a corpus: rows in = kept + dropped by reason, for every dataset and every stage of it.

Owns the counting from raw shards and sidecars, and the stop when rows are lost or too many are dropped. Knows
nothing of how they were made.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute

from data_pipeline.config import DatasetConfig
from data_pipeline.sampling import SECTION as SAMPLING
from data_pipeline.shards import Facts, Shard, read_columns
from nanollama.data.files import DataError

WISHES = ("selection", SAMPLING)  # sections whose drops are a choice and no loss


@dataclasses.dataclass
class StageCounts:
    """What one stage did to one dataset."""

    stage: str
    section: str
    rows_in: int = 0
    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Counts:
    """The account of one dataset."""

    rows_in: int = 0
    kept: int = 0
    bytes: int = 0  # UTF-8 of the kept texts
    characters: int = 0
    stages: list[StageCounts] = dataclasses.field(default_factory=list)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped, by reason."""
        total: dict[str, int] = {}
        for stage in self.stages:
            for reason, count in stage.dropped.items():
                total[reason] = total.get(reason, 0) + count
        return total

    @property
    def lost(self) -> int:
        """Rows dropped by anything but a choice of the mixture's author."""
        return sum(sum(stage.dropped.values()) for stage in self.stages if stage.section not in WISHES)

    def check(self, dataset: DatasetConfig) -> None:
        """Raises DataError when rows are unaccounted for, or more are lost than the dataset allows."""
        if self.rows_in != self.kept + sum(self.dropped.values()):
            raise DataError(
                f"dataset {dataset.name}: {self.rows_in} rows in, {self.kept} kept, "
                f"{sum(self.dropped.values())} dropped: rows are lost. This is a bug; please report it.")
        if self.rows_in == 0:
            raise DataError(
                f"dataset {dataset.name}: its source has no rows. Give a source with text, or remove the "
                "dataset from the mixture.")
        if self.lost > dataset.max_loss * self.rows_in:
            lost = [(reason, count) for stage in self.stages if stage.section not in WISHES
                    for reason, count in stage.dropped.items()]
            lost.sort(key=lambda one: (-one[1], one[0]))
            reasons = ", ".join(f"{reason}: {count}" for reason, count in lost)
            raise DataError(
                f"dataset {dataset.name}: {self.lost:,} of {self.rows_in:,} rows are dropped "
                f"({self.lost / self.rows_in:.1%}, allowed {dataset.max_loss:.0%}): {reasons}. "
                "Check text_field, format and filters; if it is meant, set max_loss: 1.0 for this dataset.")


def count(dataset: DatasetConfig, shards: Sequence[Shard], facts: Sequence[Facts]) -> Counts:
    """The checked account of a dataset's shards; `facts` are those of the rows that are alive."""
    counts = Counts()
    for shard, one in zip(shards, facts, strict=True):
        _add_shard(counts, shard)
        counts.bytes += int(one.bytes.sum())
        counts.characters += int(one.characters.sum())
        counts.kept += len(one.rows)
    counts.check(dataset)
    return counts


def _add_shard(counts: Counts, shard: Shard) -> None:
    reasons = read_columns(shard.path, ["reason"]).column("reason")
    counts.rows_in += len(reasons)
    alive = _tally(counts, 0, "read", "read", reasons)
    for number, sidecar in enumerate(shard.sidecars, start=1):
        table = read_columns(sidecar.path, ["row", "reason"])
        rows = np.asarray(table.column("row"))
        if not np.array_equal(rows, alive):
            raise DataError(f"{shard.label}: stage {sidecar.stage} judged {len(rows)} rows, {len(alive)} were left "
                            f"before it: rows are lost. This is a bug; please report it. ({sidecar.path})")
        kept = _tally(counts, number, sidecar.stage, sidecar.section, table.column("reason"))
        alive = rows[kept]


def _tally(counts: Counts, number: int, stage: str, section: str, reasons: Any) -> np.ndarray:
    """Count one stage of one shard; returns the positions that are kept."""
    while len(counts.stages) <= number:
        counts.stages.append(StageCounts(stage, section))
    row = counts.stages[number]
    kept = np.flatnonzero(np.asarray(reasons.is_null()))
    row.rows_in += len(reasons)
    row.kept += len(kept)
    for one in pyarrow.compute.value_counts(reasons.drop_null()).to_pylist():
        row.dropped[one["values"]] = row.dropped.get(one["values"], 0) + one["counts"]
    return kept
