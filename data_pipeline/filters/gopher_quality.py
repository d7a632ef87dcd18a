"""`gopher_quality`: the quality rules of Gopher (Rae et al. 2021, arXiv:2112.11446, section A1.1)."""

import dataclasses
from typing import Literal

import numpy as np
import polars as pl

from data_pipeline.filters.base import Batch
from data_pipeline.filters.characters import PUNCTUATION, in_brackets
from data_pipeline.filters.lines import one_line_end
from data_pipeline.filters.rules import Rule, RuleFilter, check_bounds, outside
from data_pipeline.filters.words import Definition, divided

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclasses.dataclass(frozen=True)
class GopherQualityFilter(RuleFilter):
    """Keeps texts with a usual number and length of words, few symbols and list lines, and some stop words.

    Words that are punctuation only count for the shares of symbols and alphabetic words, not for number and length.
    """

    type: Literal["gopher_quality"] = "gopher_quality"
    words: Definition = "whitespace"
    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_symbols_per_word: float | None = 0.1  # "#", and "..." or "…", each alone
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2  # different ones, lower case as they are
    stop_words: tuple[str, ...] = STOP_WORDS

    def check(self, where: str) -> None:
        """Raises FieldError on bounds that keep nothing."""
        check_bounds(where, {
            "words": (self.min_words, self.max_words),
            "mean_word_length": (self.min_mean_word_length, self.max_mean_word_length),
            "stop_words": (self.min_stop_words, len(set(self.stop_words))),
        }, {"max_bullet_lines": self.max_bullet_lines, "max_ellipsis_lines": self.max_ellipsis_lines,
            "min_alphabetic_words": self.min_alphabetic_words})

    def measures(self, batch: Batch) -> pl.DataFrame:
        """The numbers that the rules speak of."""
        table, number = batch.word_table(self.words), len(batch)
        lines = one_line_end(batch.text.alias("text"))
        counted = lines.to_frame().select(
            lines=pl.col("text").str.count_matches("\n", literal=True) +
            ((pl.col("text") != "") & ~pl.col("text").str.ends_with("\n")).cast(pl.Int64),
            hashes=pl.col("text").str.count_matches("#", literal=True),
            ellipses=pl.col("text").str.count_matches(r"\.\.\.|…"),
            bullets=pl.col("text").str.count_matches(r"(?m)^[^\S\n]*[•\-]"),
            ends=pl.col("text").str.count_matches(r"(?m)(?:\.\.\.|…)[^\S\n]*$")).cast(pl.Int64)
        count = {column.name: column.to_numpy() for column in counted.iter_columns()}
        real = table.distinct.str.contains(f"[^{in_brackets(PUNCTUATION)}]").to_numpy()
        stop = table.distinct.is_in(list(self.stop_words)).to_numpy()[table.codes]
        found = np.unique(table.documents[stop].astype(np.int64) << 32 | table.codes[stop]) >> 32
        words = table.sum(real)
        return pl.DataFrame({
            "words": words, "mean_word_length": divided(table.sum(real * table.lengths), words),
            "hashes": divided(count["hashes"], table.counts), "ellipses": divided(count["ellipses"], table.counts),
            "bullet_lines": divided(count["bullets"], count["lines"]),
            "ellipsis_lines": divided(count["ends"], count["lines"]),
            "alphabetic_words": divided(table.sum(table.distinct.str.contains(r"\p{L}").to_numpy()), table.counts),
            "stop_words": np.bincount(found, minlength=number)
        })

    def rules(self) -> list[Rule]:
        """In the order of the paper."""
        return [
            *outside("words", self.min_words, self.max_words, "too few words", "too many words"),
            *outside("mean_word_length", self.min_mean_word_length, self.max_mean_word_length, "words too short",
                     "words too long"),
            *outside("hashes", None, self.max_symbols_per_word, "", "too many #"),
            *outside("ellipses", None, self.max_symbols_per_word, "", "too many ellipses"),
            *outside("bullet_lines", None, self.max_bullet_lines, "", "too many bullet lines"),
            *outside("ellipsis_lines", None, self.max_ellipsis_lines, "", "too many lines end in an ellipsis"),
            *outside("alphabetic_words", self.min_alphabetic_words, None, "too few alphabetic words", ""),
            *outside("stop_words", self.min_stop_words, None, "too few stop words", ""),
        ]
