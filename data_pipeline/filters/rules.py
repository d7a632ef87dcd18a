"""Filters made of rules over measured numbers: the first rule that a document breaks is its reason.

Owns how measures become scores and reasons. Knows no rule.
"""

import numpy as np
import polars as pl

from data_pipeline.filters.base import Batch, Judgement, Parameters
from nanollama.data.strict import FieldError

Rule = tuple[pl.Expr, str]  # true where the document breaks it; what is then the reason


class RuleFilter(Parameters):
    """A filter that measures first. Subclasses give `measures` and `rules`."""

    @property
    def type(self) -> str:
        """The name by which a mixture file asks for it."""
        raise NotImplementedError

    def measures(self, batch: Batch) -> pl.DataFrame:
        """Numbers, one row per document; the columns are what `rules` speak of."""
        raise NotImplementedError

    def rules(self) -> list[Rule]:
        """In the order in which they are asked."""
        raise NotImplementedError

    def judge(self, batch: Batch) -> Judgement:
        """The reason of the first broken rule, and the measures as scores `type.measure`."""
        measured = self.measures(batch)
        scores = {f"{self.type}.{column.name}": column for column in measured.iter_columns()}
        return Judgement(first_broken(measured, self.rules(), self.type), scores)


def first_broken(measured: pl.DataFrame, rules: list[Rule], type: str) -> pl.Series:
    """Reasons "type: what", null where no rule is broken."""
    broken = [pl.when(rule).then(pl.lit(f"{type}: {what}")) for rule, what in rules]
    if not broken:
        return pl.Series("reason", [None] * len(measured), dtype=pl.String)
    return measured.select(reason=pl.coalesce(broken).cast(pl.String))["reason"]


def outside(name: str, low: float | None, high: float | None, below: str, above: str) -> list[Rule]:
    """Rules that `low` <= name <= `high`; None is no bound."""
    column = pl.col(name)
    return ([(column < low, below)] if low is not None else []) + ([(column > high, above)] if high is not None else [])


def duplicates(lists: pl.Series) -> pl.DataFrame:
    """Of each document's list of strings: how many there are (`all`), how many of them, and of how many characters,
    came earlier in the same list (`repeated`, `characters`)."""
    number = lists.list.len().fill_null(0).to_numpy()
    documents = np.repeat(np.arange(len(lists), dtype=np.int32), number)
    flat = pl.DataFrame({"document": documents, "element": lists.filter(lists.list.len() > 0).explode()})
    again = flat.filter(~pl.struct("document", "element").is_first_distinct())
    at, size = again["document"].to_numpy(), again["element"].str.len_chars().to_numpy()
    return pl.DataFrame({
        "all": number, "repeated": np.bincount(at, minlength=len(lists)),
        "characters": np.bincount(at, size, minlength=len(lists))
    })


def check_bounds(where: str, bounds: dict[str, tuple[float | None, float | None]], shares: dict[str, float | None],
                 ) -> None:
    """Raises FieldError on a pair of bounds (of the fields min_NAME, max_NAME) that keeps nothing, or a share outside
    [0, 1]."""
    for name, (low, high) in bounds.items():
        if low is not None and low < 0:
            raise FieldError(f"{where}.min_{name}", f"{low} is negative", "Give 0 or more, or null for no bound.")
        if low is not None and high is not None and high < low:
            raise FieldError(f"{where}.max_{name}", f"{high} is below min_{name} {low}, so nothing would be kept",
                             "Raise it, or give null for no bound.")
    for name, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            raise FieldError(f"{where}.{name}", f"{share} is not in [0, 1]",
                             "It is a share: 0.25 means 25 %. Give null to leave the rule out.")
