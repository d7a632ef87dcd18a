"""Filters by the number of characters."""

import dataclasses
from typing import Literal

import polars as pl

from data_pipeline.filters.base import Batch, Judgement, Parameters
from nanollama.data.strict import FieldError


@dataclasses.dataclass(frozen=True)
class LengthFilter(Parameters):
    """Keeps texts of min_characters to max_characters, both included."""

    type: Literal["length"] = "length"
    min_characters: int = 0
    max_characters: int | None = None

    def check(self, where: str) -> None:
        """Raises FieldError on bounds that keep nothing."""
        if self.min_characters < 0:
            raise FieldError(f"{where}.min_characters", f"{self.min_characters} is negative", "Give 0 or more.")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise FieldError(f"{where}.max_characters", f"{self.max_characters} is below min_characters "
                             f"{self.min_characters}, so nothing would be kept", "Raise it, or leave it out.")

    def reason(self, text: str) -> str | None:
        """Why `text` is dropped, or None to keep it."""
        if len(text) < self.min_characters:
            return f"shorter than {self.min_characters} characters"
        if self.max_characters is not None and len(text) > self.max_characters:
            return f"longer than {self.max_characters} characters"
        return None

    def judge(self, batch: Batch) -> Judgement:
        """The same for every document of `batch`."""
        length = pl.col("text").str.len_chars()
        most = self.max_characters
        reason = pl.when(length < self.min_characters).then(pl.lit(f"shorter than {self.min_characters} characters"))
        longer = pl.lit(False) if most is None else length > most
        reasons = reason.when(longer).then(pl.lit(f"longer than {most} characters")).otherwise(None)
        return Judgement(batch.text.alias("text").to_frame().select(reason=reasons)["reason"])
