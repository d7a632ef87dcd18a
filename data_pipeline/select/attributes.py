"""Whole-corpus steps that choose documents by what is known of them: quality, domain, date, difficulty.

Owns how the pure functions of `documents` become reasons and facts. A step reads one attribute per document from its
metadata, where filters have put their scores; an attribute that no document has is an error, not a corpus kept whole.
"""

import dataclasses
import datetime
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters.base import Batch
from data_pipeline.filters.corpus_step import FeatureFile
from data_pipeline.select.documents import (
    attribute_rates,
    curriculum_phases,
    quality_rates,
    rates_for_shares,
    temporal_weights,
)
from data_pipeline.select.resample import Floats, draws, keep_by_rate
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError


class _ByAttribute:
    """Reads one attribute in `features`; the subclass turns all of them into rates or facts in `resolve`."""

    version: ClassVar[int] = 1

    def resources(self) -> dict[str, str]:
        """No file."""
        return {}

    @staticmethod
    def _column(batch: Batch, attribute: str, kind: pa.DataType) -> pa.Table:
        values: list[Any] = []
        for meta in batch.meta:
            value = meta.get(attribute)
            if kind == pa.string():
                values.append(None if value is None else str(value))
            else:
                known = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
                values.append(float(value) if known and value is not None else None)
        return pa.table({"row": pa.array(range(len(values)), pa.int32()), "value": pa.array(values, kind)})

    @staticmethod
    def _values(shards: Sequence[FeatureFile], attribute: str) -> list[pa.ChunkedArray]:
        columns = [pq.read_table(shard.path, columns=["value"])["value"] for shard in shards]
        if any(map(len, columns)) and all(column.null_count == len(column) for column in columns):
            raise DataError(f"selection: no document has the attribute {attribute!r}. Add the filter that makes it "
                            "before this step, or name an attribute that the documents have.")
        return columns


def _kept_by_rate(shards: Sequence[FeatureFile], rates: Sequence[Floats], seed: int, reason: str) -> Iterator[pa.Table]:
    """row, reason, rate of every shard: each document kept with its own rate."""
    for shard, rate in zip(shards, rates, strict=True):
        ids = pq.read_table(shard.documents, columns=["id"])["id"].to_pylist()
        kept = keep_by_rate(rate, draws(ids, seed, reason))
        yield pa.table({"row": pa.array(range(len(ids)), pa.int32()),
                        "reason": pa.array([None if keep else reason for keep in kept.tolist()], pa.string()),
                        "rate": pa.array(rate, pa.float64())})


@dataclasses.dataclass(frozen=True)
class AttributeSelection(_ByAttribute):
    """Keeps a share of the documents with each value of an attribute, such as a quality class or a domain: as `rates`
    says, or as many of each as `shares` of the text ask for, and no fewer."""

    version: ClassVar[int] = 2
    type: Literal["attributes"] = "attributes"
    attribute: str = "quality"
    # share of documents kept for each value, or each group of values; what is not named keeps `other`
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    # in place of rates: what each value, or each group, shall be of the text that is kept; none is left out
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    groups: dict[str, str] = dataclasses.field(default_factory=dict)  # value: its group (grouped for domains)
    other: float = 1.0  # of documents that are not named, or have no value
    seed: int = 0

    def check(self, where: str) -> None:
        """Raises FieldError on a parameter that cannot be used."""
        for name, rate in [*self.rates.items(), ("other", self.other)]:
            if not 0 <= rate <= 1:
                raise FieldError(f"{where}.rates", f"{name}: {rate} is not in [0, 1]", "Give a share.")
        if self.shares and self.rates:
            raise FieldError(f"{where}.shares", "is given beside rates", "Keep one of them.")
        if self.shares and not (min(self.shares.values()) >= 0 and 0 < sum(self.shares.values()) < math.inf):
            raise FieldError(f"{where}.shares", f"{self.shares} are no shares", "Give numbers of 0 or more.")

    def features(self, batch: Batch) -> pa.Table:
        """row, value, bytes of the text."""
        sizes = pa.array(batch.text.str.len_bytes().to_numpy(), pa.int64())
        return self._column(batch, self.attribute, pa.string()).append_column("bytes", sizes)

    def resolve(self, shards: Sequence[FeatureFile], work: Path) -> Iterator[pa.Table]:
        """row, reason, rate."""
        columns = self._values(shards, self.attribute)
        sizes = self._sizes(shards)
        unknown = set(self.rates) - set(sizes) - {self.groups.get(value) for value in sizes}
        if unknown and sizes:
            print(f"note: selection by {self.attribute}: no document has {', '.join(sorted(unknown))}; there are "
                  f"{', '.join(sorted(sizes))}", file=sys.stderr)
        by_value, groups = (self._rates(sizes), {}) if self.shares and sizes else (self.rates, self.groups)
        rates = (attribute_rates(column.to_pylist(), by_value, self.other, groups) for column in columns)
        yield from _kept_by_rate(shards, list(rates), self.seed, f"not selected by {self.attribute}")

    @staticmethod
    def _sizes(shards: Sequence[FeatureFile]) -> dict[str, float]:
        """Bytes of text of each value."""
        sizes: dict[str, float] = {}
        for shard in shards:
            table = pq.read_table(shard.path, columns=["value", "bytes"]).group_by("value").aggregate(
                [("bytes", "sum")])
            for value, count in zip(table["value"].to_pylist(), table["bytes_sum"].to_pylist(), strict=True):
                if value is not None:
                    sizes[value] = sizes.get(value, 0.0) + count
        return sizes

    def _rates(self, sizes: dict[str, float]) -> dict[str, float]:
        try:
            return rates_for_shares(sizes, self.shares, self.groups)
        except ValueError as error:
            raise DataError(f"selection by {self.attribute}: {error}. Name in shares each value, or its group, once."
                            ) from error


@dataclasses.dataclass(frozen=True)
class QualitySelection(_ByAttribute):
    """Keeps `rate` of the documents, the better the likelier, by a score that a filter has stored."""

    type: Literal["quality"] = "quality"
    attribute: str = "quality_score"
    rate: float = 0.5
    sharpness: float = 1.0  # 0: by chance alone; a standard deviation of score multiplies the rate by e^sharpness
    seed: int = 0

    def check(self, where: str) -> None:
        """Raises FieldError on a parameter that cannot be used."""
        if not 0 < self.rate <= 1:
            raise FieldError(f"{where}.rate", f"{self.rate} is not in (0, 1]", "Try 0.5.")

    def features(self, batch: Batch) -> pa.Table:
        """row, value."""
        return self._column(batch, self.attribute, pa.float64())

    def resolve(self, shards: Sequence[FeatureFile], work: Path) -> Iterator[pa.Table]:
        """row, reason, rate. Documents without a score count as mean ones."""
        columns = self._values(shards, self.attribute)
        scores = np.concatenate([column.to_numpy() for column in columns] or [np.zeros(0)])
        known = np.isfinite(scores)
        scores[~known] = scores[known].mean() if known.any() else 0.0
        cuts = np.cumsum([len(column) for column in columns])[:-1]
        rates = np.split(quality_rates(scores, self.rate, self.sharpness), cuts) if columns else []
        yield from _kept_by_rate(shards, rates, self.seed, f"not selected by {self.attribute}")


@dataclasses.dataclass(frozen=True)
class TemporalSelection(_ByAttribute):
    """Keeps documents the likelier the newer they are; dates stay with the documents."""

    type: Literal["temporal"] = "temporal"
    reference: str = ""  # YYYY-MM-DD whose text is all kept; empty: the newest date of the corpus
    half_life_years: float = 2.0
    undated: float = 0.5  # share kept of documents without a date
    seed: int = 0

    def check(self, where: str) -> None:
        """Raises FieldError on a parameter that cannot be used."""
        if not self.half_life_years > 0:
            raise FieldError(f"{where}.half_life_years", f"{self.half_life_years} is not above 0", "Try 2.0.")
        try:
            self._reference()
        except ValueError as error:
            raise FieldError(f"{where}.reference", f"{self.reference!r} is no date",
                             "Write a date in quotes, '2024-12-31'.") from error

    def features(self, batch: Batch) -> pa.Table:
        """row; dates are in the document table."""
        return pa.table({"row": pa.array(range(len(batch)), pa.int32())})

    def resolve(self, shards: Sequence[FeatureFile], work: Path) -> Iterator[pa.Table]:
        """row, reason, rate."""
        dates = [pq.read_table(shard.documents, columns=["date"])["date"].to_pylist() for shard in shards]
        known = [date for column in dates for date in column if date is not None]
        if not known and any(dates):
            raise DataError("selection by date: no document has a date. Name the field that has it with date_field.")
        reference = self._reference() if self.reference else max(known, default=0)
        rates = [temporal_weights(column, reference, self.half_life_years, self.undated) for column in dates]
        yield from _kept_by_rate(shards, rates, self.seed, "not selected by date")

    def _reference(self) -> int | None:
        if not self.reference:
            return None
        moment = datetime.datetime.combine(datetime.date.fromisoformat(self.reference), datetime.time(),
                                           datetime.UTC)
        return int(moment.timestamp())


@dataclasses.dataclass(frozen=True)
class CurriculumPhases(_ByAttribute):
    """Drops nothing: writes beside each document the phase it belongs to, from easy to hard."""

    type: Literal["curriculum"] = "curriculum"
    attribute: str = "perplexity"
    phases: int = 3
    easy_first: bool = True  # small values of the attribute are easy

    def check(self, where: str) -> None:
        """Raises FieldError on a parameter that cannot be used."""
        if self.phases < 1:
            raise FieldError(f"{where}.phases", f"{self.phases} is below 1", "Try 3.")

    def features(self, batch: Batch) -> pa.Table:
        """row, value."""
        return self._column(batch, self.attribute, pa.float64())

    def resolve(self, shards: Sequence[FeatureFile], work: Path) -> Iterator[pa.Table]:
        """row, reason (always null), phase. Documents without the attribute count as hardest."""
        columns = self._values(shards, self.attribute)
        values = np.concatenate([column.to_numpy() for column in columns] or [np.zeros(0)])
        values[~np.isfinite(values)] = np.inf if self.easy_first else -np.inf
        phases = curriculum_phases(values, self.phases, easy_first=self.easy_first)
        start = 0
        for column in columns:
            part = phases[start:start + len(column)]
            start += len(column)
            yield pa.table({"row": pa.array(range(len(part)), pa.int32()), "reason": pa.nulls(len(part), pa.string()),
                            "phase": pa.array(part, pa.int32())})
