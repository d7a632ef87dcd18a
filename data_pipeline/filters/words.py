"""What counts as a word, and the words of a batch as numbers.

Owns the word definitions: part of a filter's parameters, because the same rule with another definition keeps other
documents. Words are given by Unicode's general categories and not by an engine's `\\w`, so that all engines agree.
"""

import dataclasses
import functools
from typing import Literal, get_args

import numpy as np
import polars as pl

Definition = Literal["whitespace", "words", "pieces"]
_LETTER = r"\p{L}\p{M}\p{N}_"
PATTERNS: dict[str, str] = {
    "whitespace": r"\S+",  # what stands between white space: "end." is one word
    "words": rf"[{_LETTER}]+",  # runs of letters, marks, numbers and _: "end." is the word "end"
    "pieces": rf"[{_LETTER}]+|[^{_LETTER}\s]",  # these, and every other sign alone: "end." is "end" and "."
}
assert tuple(PATTERNS) == get_args(Definition)


@dataclasses.dataclass(frozen=True)
class WordTable:
    """The words of a batch, in order: `distinct[codes[offsets[d] : offsets[d + 1]]]` are those of document d."""

    codes: np.ndarray  # int32, one per word
    offsets: np.ndarray  # int64, one more than documents
    distinct: pl.Series  # String

    @property
    def counts(self) -> np.ndarray:
        """Words per document."""
        return np.diff(self.offsets)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """The document of each word."""
        return np.repeat(np.arange(len(self.offsets) - 1, dtype=np.int32), self.counts)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each distinct word."""
        return self.distinct.str.len_chars().to_numpy().astype(np.int64)

    def sum(self, of_distinct: np.ndarray) -> np.ndarray:
        """Per document the sum over its words of a number or truth that each distinct word has."""
        return sum_between(of_distinct.astype(np.int64)[self.codes], self.offsets)


def word_table(text: pl.Series, definition: Definition) -> WordTable:
    """The words of each text."""
    lists = text.str.extract_all(PATTERNS[definition])
    counts = lists.list.len().fill_null(0).to_numpy()
    flat = lists.filter(lists.list.len() > 0).explode()
    encoded = flat.to_arrow(compat_level=pl.CompatLevel.oldest()).dictionary_encode()
    return WordTable(encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32, copy=False), offsets_of(counts),
                     pl.Series("word", encoded.dictionary, dtype=pl.String))


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Where each document's elements begin, and the end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def sum_between(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of `values` between neighbouring offsets; 0 where there is nothing between."""
    return np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[offsets])


def divided(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """`over` / `under`, and 0 where `under` is 0."""
    return np.divide(over, under, out=np.zeros(len(over)), where=np.asarray(under) != 0)
