"""The wish that exact duplicates be dropped: a marker, because a document alone is no duplicate."""

import dataclasses
from typing import Literal

from data_pipeline.filters.base import Batch, Judgement, Parameters, keep_all


@dataclasses.dataclass(frozen=True)
class ExactDuplicateFilter(Parameters):
    """Drops a text that this dataset or an earlier one of the mixture has already given, byte for byte."""

    type: Literal["exact_duplicate"] = "exact_duplicate"

    def reason(self, text: str) -> str | None:
        """Always None: done by who sees the whole corpus."""
        return None

    def judge(self, batch: Batch) -> Judgement:
        """Keeps every document."""
        return Judgement(keep_all(batch))
