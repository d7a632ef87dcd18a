"""`fineweb`: the quality rules of FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.6): lists and menus."""

import dataclasses
from typing import Literal

import numpy as np
import polars as pl

from data_pipeline.filters.base import Batch
from data_pipeline.filters.characters import TERMINAL, in_brackets
from data_pipeline.filters.rules import Rule, RuleFilter, check_bounds, duplicates
from data_pipeline.filters.words import PATTERNS, Definition, divided, offsets_of, sum_between


@dataclasses.dataclass(frozen=True)
class FineWebFilter(RuleFilter):
    """Drops texts whose lines seldom end a sentence, are mostly short, or repeated, or many for the number of words."""

    type: Literal["fineweb"] = "fineweb"
    words: Definition = "pieces"
    min_terminal_lines: float | None = 0.12  # lines that end in terminal punctuation of any script
    max_short_lines: float | None = 0.67
    short_line: int = 30  # characters, this many included
    max_line_characters: float | None = 0.01  # characters in repeated lines, of all that are no line end
    max_lines_per_word: float | None = 0.3

    def check(self, where: str) -> None:
        """Raises FieldError on what is no share."""
        names = ("min_terminal_lines", "max_short_lines", "max_line_characters")
        check_bounds(where, {}, {name: getattr(self, name) for name in names})

    def measures(self, batch: Batch) -> pl.DataFrame:
        """The numbers that the rules speak of. Lines of white space only do not count."""
        text = batch.text.alias("text")
        lists = text.str.split("\n")
        documents = np.repeat(np.arange(len(batch), dtype=np.int32), lists.list.len().fill_null(0).to_numpy())
        lines = pl.DataFrame({"document": documents, "line": lists.explode()}).filter(
            pl.col("line").str.contains(r"\S"))
        counts = np.bincount(lines["document"].to_numpy(), minlength=len(batch))
        offsets = offsets_of(counts)
        seen = lines.select(terminal=pl.col("line").str.contains(f"[{in_brackets(TERMINAL)}]$"),
                            short=pl.col("line").str.len_chars() <= self.short_line)
        grouped = lines.group_by("document", maintain_order=True).agg("line")
        repeated = np.zeros(len(batch))
        repeated[grouped["document"].to_numpy()] = duplicates(grouped["line"])["characters"].to_numpy()
        newlines = text.str.count_matches("\n", literal=True).to_numpy().astype(np.int64)
        words = text.str.count_matches(PATTERNS[self.words]).to_numpy()
        return pl.DataFrame({
            "lines": counts,
            "terminal_lines": divided(sum_between(seen["terminal"].to_numpy(), offsets), counts),
            "short_lines": divided(sum_between(seen["short"].to_numpy(), offsets), counts),
            "line_characters": divided(repeated, text.str.len_chars().to_numpy() - newlines),
            "lines_per_word": divided(newlines, words)
        })

    def rules(self) -> list[Rule]:
        """In the order of the field's common implementation."""
        rules: list[Rule] = [(pl.col("lines") == 0, "empty")]
        for name, least, what in (("terminal_lines", self.min_terminal_lines, "few lines end a sentence"),):
            rules += [(pl.col(name) < least, what)] if least is not None else []
        for name, most, what in (("short_lines", self.max_short_lines, "short lines"),
                                 ("line_characters", self.max_line_characters, "characters in repeated lines"),
                                 ("lines_per_word", self.max_lines_per_word, "many lines for its words")):
            rules += [(pl.col(name) > most, what)] if most is not None else []
        return rules
