"""`heuristics`: cheap signs that a text is no prose. Shares of characters, number and length of words."""

import dataclasses
from typing import Literal

import polars as pl

from data_pipeline.filters.base import Batch
from data_pipeline.filters.rules import Rule, RuleFilter, check_bounds, outside
from data_pipeline.filters.words import PATTERNS, Definition

URL = r"(?:https?://|www\.)\S+"


@dataclasses.dataclass(frozen=True)
class HeuristicsFilter(RuleFilter):
    """Keeps texts with few odd characters, digits and URLs, and a usual number and length of words.

    Shares are of all characters. Odd (non-alphanumeric) are those that are no letter, mark, number or white space;
    URL text is what stands after http://, https:// or www. up to white space, these included.
    """

    type: Literal["heuristics"] = "heuristics"
    words: Definition = "whitespace"
    max_non_alphanumeric: float | None = 0.25
    max_digits: float | None = 0.15
    max_url: float | None = 0.20
    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0

    def check(self, where: str) -> None:
        """Raises FieldError on bounds that keep nothing."""
        check_bounds(where, {
            "words": (self.min_words, self.max_words),
            "mean_word_length": (self.min_mean_word_length, self.max_mean_word_length),
        }, {"max_non_alphanumeric": self.max_non_alphanumeric, "max_digits": self.max_digits,
            "max_url": self.max_url})

    def measures(self, batch: Batch) -> pl.DataFrame:
        """Shares of characters, words, and characters per word (0 where there is no word)."""
        text = pl.col("text").str
        all_characters = text.len_chars()
        share = {
            "non_alphanumeric": text.count_matches(r"[^\p{L}\p{M}\p{N}\s]"),
            "digits": text.count_matches(r"\p{Nd}"),
            # replaced by white space and not by nothing, which could make a URL of what is left and right of it
            "url": all_characters - text.replace_all(URL, " ").str.len_chars() + text.count_matches(URL),
        }
        word = PATTERNS[self.words]
        if self.words == "whitespace":  # as below, three times as fast
            in_words = all_characters - text.count_matches(r"\s")
        else:
            in_words = text.extract_all(word).list.eval(pl.element().str.len_chars()).list.sum()
        measured = batch.text.alias("text").to_frame().select(
            **{name: pl.when(all_characters > 0).then(count / all_characters).otherwise(0.0)
               for name, count in share.items()},
            words=text.count_matches(word).cast(pl.Int64), in_words=in_words.cast(pl.Int64))
        mean = pl.when(pl.col("words") > 0).then(pl.col("in_words") / pl.col("words")).otherwise(0.0)
        return measured.select(*share, "words", mean_word_length=mean)

    def rules(self) -> list[Rule]:
        """Shares first, then words."""
        shares = [("non_alphanumeric", self.max_non_alphanumeric, "too many non-alphanumeric characters"),
                  ("digits", self.max_digits, "too many digits"), ("url", self.max_url, "too much URL text")]
        # "less than 25 %": a share at the bound is dropped
        rules = [(pl.col(name) >= most, what) for name, most, what in shares if most is not None]
        return (rules + outside("words", self.min_words, self.max_words, "too few words", "too many words") +
                outside("mean_word_length", self.min_mean_word_length, self.max_mean_word_length,
                        "words too short", "words too long"))
