"""The account of a corpus: rows in = kept + dropped by reason, for every dataset and every stage of it.

Owns the counting from raw shards and sidecars, and the stop when rows are lost or too many are dropped. Knows
nothing of how they were made.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow.compute

from data_pipeline.curation.sampling import SECTION as SAMPLING
from data_pipeline.curation.shards import Shard, alive_rows, read_columns
from data_pipeline.sources.dataset import DatasetConfig
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


@dataclasses.dataclass(frozen=True)
class Tally:
    """What one stage did to one shard."""

    rows_in: int
    kept: int
    dropped: dict[str, int]


def count(dataset: DatasetConfig, shards: Sequence[Shard], known: dict[str, Tally]) -> Counts:
    """The checked account of a dataset's shards, without sizes. `known` has what was counted before, by file, and is
    added to: a stage is read once, however often the account is drawn up."""
    counts = Counts()
    for shard in shards:
        tallies = [_tally(shard, number, known) for number in range(len(shard.sidecars) + 1)]
        for number, tally in enumerate(tallies):
            if len(counts.stages) <= number:
                stage = shard.sidecars[number - 1] if number else None
                counts.stages.append(StageCounts(stage.stage if stage else "read", stage.section if stage else "read"))
            row = counts.stages[number]
            row.rows_in, row.kept = row.rows_in + tally.rows_in, row.kept + tally.kept
            for reason, dropped in tally.dropped.items():
                row.dropped[reason] = row.dropped.get(reason, 0) + dropped
        counts.rows_in += tallies[0].rows_in
        counts.kept += tallies[-1].kept
    counts.check(dataset)
    return counts


def _tally(shard: Shard, number: int, known: dict[str, Tally]) -> Tally:
    """What stage `number` did to the shard, 0 being its reading. Errors: DataError when it judged other rows than the
    stage before it left."""
    path = shard.sidecars[number - 1].path if number else shard.path
    if path in known:
        return known[path]
    if number:
        table = read_columns(path, ["row", "reason"])
        rows, reasons = np.asarray(table.column("row")), table.column("reason")
        left = alive_rows(dataclasses.replace(shard, sidecars=shard.sidecars[:number - 1]))
        if not np.array_equal(rows, left):
            raise DataError(f"{shard.label}: stage {shard.sidecars[number - 1].stage} judged {len(rows)} rows, "
                            f"{len(left)} were left before it: rows are lost. This is a bug; please report it "
                            f"({path}).")
    else:
        reasons = read_columns(path, ["reason"]).column("reason")
    found = pyarrow.compute.value_counts(reasons.drop_null()).to_pylist()
    known[path] = Tally(len(reasons), reasons.null_count, {one["values"]: one["counts"] for one in found})
    return known[path]
