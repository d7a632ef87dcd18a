"""`gopher_repetition`: how much of a text repeats itself (Rae et al. 2021, arXiv:2112.11446, Table A1).

An n-gram can only be repeated in a document where both its (n-1)-grams are, so each length looks at what the length
before has left: the work falls with n instead of growing with it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl

from data_pipeline.filters.base import Batch
from data_pipeline.filters.rules import Rule, RuleFilter, check_bounds, duplicates
from data_pipeline.filters.words import Definition, WordTable, divided, offsets_of
from nanollama.data.strict import FieldError

TOP = (0.20, 0.18, 0.16)  # n = 2, 3, 4
DUPLICATE = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)  # n = 5 ... 10


@dataclasses.dataclass(frozen=True)
class GopherRepetitionFilter(RuleFilter):
    """Drops texts with many repeated lines, paragraphs or n-grams of words. All shares are of characters of the text,
    but for max_lines and max_paragraphs, which are shares of lines and paragraphs.

    A line or paragraph is repeated when it came before. `top`: the most frequent n-gram, all its occurrences.
    `duplicate`: n-grams that came before, read from left to right, so that none overlaps another.
    """

    type: Literal["gopher_repetition"] = "gopher_repetition"
    words: Definition = "whitespace"
    max_paragraphs: float | None = 0.30
    max_paragraph_characters: float | None = 0.20
    max_lines: float | None = 0.30
    max_line_characters: float | None = 0.20
    max_top_ngrams: tuple[float, ...] = TOP  # of length 2, 3, ...
    max_duplicate_ngrams: tuple[float, ...] = DUPLICATE  # of the lengths after those

    def check(self, where: str) -> None:
        """Raises FieldError on what is no share."""
        check_bounds(where, {}, {
            name: getattr(self, name)
            for name in ("max_paragraphs", "max_paragraph_characters", "max_lines", "max_line_characters")
        })
        for name in ("max_top_ngrams", "max_duplicate_ngrams"):
            for index, share in enumerate(getattr(self, name)):
                if share < 0:
                    raise FieldError(f"{where}.{name}[{index}]", f"{share} is negative", "It is a share, such as 0.2.")

    @property
    def _top(self) -> dict[int, float]:
        return dict(enumerate(self.max_top_ngrams, 2))

    @property
    def _duplicate(self) -> dict[int, float]:
        return dict(enumerate(self.max_duplicate_ngrams, 2 + len(self.max_top_ngrams)))

    def measures(self, batch: Batch) -> pl.DataFrame:
        """The numbers that the rules speak of."""
        text, size = batch.text, batch.text.str.len_chars().to_numpy()
        paragraphs = duplicates(text.str.strip_chars().str.replace_all(r"\n{2,}", "\n\n").str.split("\n\n"))
        lines = duplicates(text.str.replace_all(r"\n+", "\n").str.split("\n"))
        measured = {"characters": size}
        for name, found in (("paragraph", paragraphs), ("line", lines)):
            measured[f"{name}s"] = divided(found["repeated"].to_numpy(), found["all"].to_numpy())
            measured[f"{name}_characters"] = divided(found["characters"].to_numpy(), size)
        table = batch.word_table(self.words)
        lengths = table.lengths[table.codes]
        ends = offsets_of(lengths)
        for n, starts, grams in repeated_ngrams(table, max([1, *self._top, *self._duplicate])):
            if n in self._top:
                measured[f"top_{n}_gram"] = divided(_top_characters(table, ends, n, starts, grams), size)
            if n in self._duplicate:
                measured[f"duplicate_{n}_grams"] = divided(_duplicate_characters(table, ends, n, starts, grams), size)
        return pl.DataFrame(measured)

    def rules(self) -> list[Rule]:
        """In the order of the paper's table, cheap ones first."""
        most = [("paragraphs", self.max_paragraphs, "repeated paragraphs"),
                ("paragraph_characters", self.max_paragraph_characters, "characters in repeated paragraphs"),
                ("lines", self.max_lines, "repeated lines"),
                ("line_characters", self.max_line_characters, "characters in repeated lines"),
                *((f"top_{n}_gram", share, f"the top {n}-gram") for n, share in self._top.items()),
                *((f"duplicate_{n}_grams", share, f"duplicate {n}-grams") for n, share in self._duplicate.items())]
        rules: list[Rule] = [(pl.col("characters") == 0, "empty")]
        return rules + [(pl.col(name) > share, what) for name, share, what in most if share is not None]


def repeated_ngrams(table: WordTable, longest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(n, starts, grams) for n = 2 ... longest: where n-grams begin that their document has twice or more, in order,
    and a number for each that is the same exactly when document and words are the same."""
    starts = np.arange(len(table.codes))
    grams, starts = _keep_repeated(table.documents, table.codes, starts)
    for n in range(2, longest + 1):
        follows = np.flatnonzero((np.diff(starts) == 1) & np.equal(*_neighbours(table.documents[starts])))
        grams, starts = _keep_repeated(grams[follows], grams[follows + 1], starts[follows])
        yield n, starts, grams


def _neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values[:-1], values[1:]


def _keep_repeated(first: np.ndarray, second: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each pair that occurs twice or more, and its start."""
    pairs = first.astype(np.int64) << 32 | second
    order = np.argsort(pairs)
    new = np.ones(len(pairs), bool)
    new[1:] = np.not_equal(*_neighbours(pairs[order]))
    number = np.cumsum(new) - 1
    several = np.bincount(number, minlength=1)[number] > 1
    grams = np.full(len(pairs), -1, np.int32)
    grams[order[several]] = number[several]
    keep = grams >= 0
    return grams[keep], starts[keep]


def _top_characters(table: WordTable, ends: np.ndarray, n: int, starts: np.ndarray, grams: np.ndarray) -> np.ndarray:
    """Per document: characters of its most frequent n-gram (the first of several; words joined by one space), times
    its occurrences. Where no n-gram is repeated that is the first one, once."""
    offsets, counts = table.offsets, table.counts
    result = np.zeros(len(counts), np.int64)
    some = np.flatnonzero(counts >= n)
    result[some] = ends[offsets[some] + n] - ends[offsets[some]] + n - 1
    _, first, times = np.unique(grams, return_index=True, return_counts=True)
    begin = starts[first]
    document = table.documents[begin]
    best = np.lexsort((begin, -times, document))
    documents, at = np.unique(document[best], return_index=True)
    chosen = best[at]
    result[documents] = (ends[begin[chosen] + n] - ends[begin[chosen]] + n - 1) * times[chosen]
    return result


def _duplicate_characters(table: WordTable, ends: np.ndarray, n: int, starts: np.ndarray,
                          grams: np.ndarray) -> np.ndarray:
    """Per document: characters of the n-grams that came before, from left to right without overlap."""
    result = np.zeros(len(table.counts), np.int64)
    if not len(starts):
        return result
    # plain integers without a list of them all: a repetitive text of 100 MB has twenty million starts
    gram, size = grams.data, np.ascontiguousarray(ends[starts + n] - ends[starts])
    after = np.searchsorted(starts, starts + n).data  # the next start that overlaps none of this n-gram
    repeated = np.zeros(len(starts), bool)
    seen: set[int] = set()  # a gram's number knows its document
    at = 0
    while at < len(gram):
        if gram[at] in seen:
            repeated[at] = True
            at = after[at]
        else:
            seen.add(gram[at])
            at += 1
    return np.bincount(table.documents[starts[repeated]], size[repeated], minlength=len(result)).astype(
        np.int64)
