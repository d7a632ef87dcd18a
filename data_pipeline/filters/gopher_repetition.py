"""`gopher_repetition`: how much of a text repeats itself (Rae et al. 2021, arXiv:2112.11446, Table A1).

An n-gram can only be repeated in a document where both its (n-1)-grams are, so each length looks at what the length
before has left: the work falls with n instead of growing with it. An n-gram is known by where it first stands; one
that goes on like the first of its (n-1)-gram is the n-gram there, and only the others are sorted.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl

from data_pipeline.filters.base import Batch
from data_pipeline.filters.rules import Rule, RuleFilter, check_bounds, duplicates
from data_pipeline.filters.words import Definition, WordTable, divided, offsets_of
from data_pipeline.text.words import NGRAM_BASE
from nanollama.data.strict import FieldError

TOP = (0.20, 0.18, 0.16)  # n = 2, 3, 4
SHORT_RUN, LONG_RUN = 8, 1000  # n-grams one after the other that are marked together; a look ahead costs no more
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
        for n, starts, first in repeated_ngrams(table, max([1, *self._top, *self._duplicate])):
            if n in self._top:
                measured[f"top_{n}_gram"] = divided(_top_characters(table, ends, n, starts, first), size)
            if n in self._duplicate:
                measured[f"duplicate_{n}_grams"] = divided(_duplicate_characters(table, ends, n, starts, first), size)
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
    """(n, starts, first) for n = 2 ... longest: where n-grams begin that their document has twice or more, in order,
    and for each where the first begins that is the same; the first of all has its own place there."""
    inside = np.ones(len(table.codes), bool)  # the next word is of the same document
    inside[table.offsets[1:][table.counts > 0] - 1] = False
    first_at = first_equal(_pairs(table.documents, table.codes))
    starts = _keep_repeated(first_at, np.arange(len(first_at)), first_at)
    for n in range(2, longest + 1):
        repeated = first_at >= 0
        starts = np.flatnonzero(repeated[:-1] & repeated[1:] & inside[:-1])
        first, tail = first_at[starts], first_at[starts + 1]
        others = np.flatnonzero(first_at[first + 1] != tail)
        first[others] = starts[others][first_equal(_pairs(first[others], tail[others]))]
        starts = _keep_repeated(first_at, starts, first)
        yield n, starts, first_at[starts]


def _keep_repeated(first_at: np.ndarray, starts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Set `first_at` for the n-grams at `starts` that are not the only ones of their kind, and to -1 elsewhere; where
    they start."""
    again = np.flatnonzero(first != starts)
    repeated = np.zeros(len(first_at), bool)
    repeated[starts[again]] = True
    repeated[first[again]] = True
    first_at[starts] = first
    first_at[~repeated] = -1
    return np.flatnonzero(repeated)


def _pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Two numbers of 32 bits in one; in place, for clearing memory is most of the work on a long text."""
    keys = one.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= other.view(np.uint32)
    return keys


def first_equal(keys: np.ndarray) -> np.ndarray:
    """For each of the uint64 `keys` the place of the first that is equal to it.

    Hash and place are sorted as one number, ten times as fast as places by their keys; where two keys have one hash,
    these are sorted by key.
    """
    if not len(keys):
        return np.zeros(0, np.int32)
    bits = np.uint64((len(keys) - 1).bit_length())
    places = (np.uint64(1) << bits) - np.uint64(1)
    packed = keys * np.uint64(NGRAM_BASE)
    packed &= ~places
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    ordered = packed & places
    place = ordered.astype(np.int32)
    np.take(keys, place, out=ordered, mode="clip")  # without clip NumPy fills a copy
    new = np.ones(len(keys), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    edges = np.flatnonzero(new[1:])
    clashes = packed[edges][(packed[edges] ^ packed[edges + 1]) <= places] & ~places
    if len(clashes):
        bounds = zip(np.searchsorted(packed, clashes), np.searchsorted(packed, clashes | places, "right"), strict=True)
        mixed = np.unique(np.concatenate([np.arange(low, high) for low, high in bounds]))
        place[mixed] = place[mixed][np.lexsort((place[mixed], keys[place[mixed]]))]
        ordered = keys[place]
        np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    result = np.empty(len(keys), np.int32)
    heads = np.flatnonzero(new)
    result[place] = np.repeat(place[heads], np.diff(heads, append=len(keys)))
    return result


def _top_characters(table: WordTable, ends: np.ndarray, n: int, starts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Per document: characters of its most frequent n-gram (the first of several; words joined by one space), times
    its occurrences. Where no n-gram is repeated that is the first one, once."""
    offsets, counts = table.offsets, table.counts
    result = np.zeros(len(counts), np.int64)
    some = np.flatnonzero(counts >= n)
    result[some] = ends[offsets[some] + n] - ends[offsets[some]] + n - 1
    begin = starts[first == starts]
    if not len(begin):
        return result
    times = np.bincount(first)[begin]
    document = table.documents[begin]
    edges = np.flatnonzero(np.diff(document, prepend=-1))
    most = np.maximum.reduceat(times, edges)
    chosen = np.flatnonzero(times == np.repeat(most, np.diff(edges, append=len(begin))))
    chosen = chosen[np.searchsorted(chosen, edges)]
    result[document[edges]] = (ends[begin[chosen] + n] - ends[begin[chosen]] + n - 1) * most
    return result


def _duplicate_characters(table: WordTable, ends: np.ndarray, n: int, starts: np.ndarray,
                          first: np.ndarray) -> np.ndarray:
    """Per document: characters of the n-grams that came before, from left to right without overlap.

    An n-gram came before unless it is the first of its kind, or the first one was jumped over and no other read since.
    """
    result = np.zeros(len(table.counts), np.int64)
    if not len(starts):
        return result
    begins = np.zeros(len(table.codes) + 1, bool)
    begins[starts + 1] = True
    after = np.cumsum(begins, dtype=np.int32)[starts + n].data  # the next start that overlaps none of this n-gram
    is_first = first == starts
    next_first, next_later = _next(is_first).data, _next(~is_first).data
    run_ends = _next(is_first | (np.diff(starts, prepend=-1) != 1)).data  # until there all came before, side by side
    gram = first.data  # plain integers without a list of them all
    jumped = np.zeros(len(table.codes), bool)
    repeated = np.zeros(len(starts), bool)
    was_jumped, is_repeated, total = jumped.data, repeated.data, len(starts)
    at = next_later[0]
    while at < total:
        if was_jumped[gram[at]]:
            was_jumped[gram[at]] = False
            at = next_later[at + 1]
            continue
        run = min((run_ends[at + 1] - at) // n, LONG_RUN)
        if run > SHORT_RUN:  # n-gram after n-gram of a long piece that came before, up to one that was jumped over
            known = jumped[first[at:at + run * n:n]]
            run = int(known.argmax()) if known.any() else run
            repeated[at:at + run * n:n] = True
            at = next_later[at + run * n]
            continue
        is_repeated[at] = True
        end = after[at]
        skipped = next_first[at + 1]
        while skipped < end:
            was_jumped[gram[skipped]] = True
            skipped = next_first[skipped + 1]
        at = next_later[end]
    size = ends[starts[repeated] + n] - ends[starts[repeated]]
    return np.bincount(table.documents[starts[repeated]], size, minlength=len(result)).astype(np.int64)


def _next(chosen: np.ndarray) -> np.ndarray:
    """For each place, and the one behind the last, the next that is chosen (itself counts); their number if none is."""
    places = np.full(len(chosen) + 1, len(chosen), np.int32)
    at = np.flatnonzero(chosen)
    places[at] = at
    return np.minimum.accumulate(places[::-1])[::-1]
