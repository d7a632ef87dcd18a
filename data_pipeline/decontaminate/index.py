"""The evaluation texts as an index of n-grams, and what of them a batch of documents holds.

Owns the ways to find an item. *Exact*: document and item share `ngram` (13) words in a row. *Near*: they share
`seed` (6) words in a row, and the window of the document that is anchored there and as long as the item has a
Jaccard likeness of `threshold` (0.8) with it, both as bags of words. *Whole*: all words of an item of fewer than
`ngram` stand in a row in the document; asked only of items with `whole` (8) words that are not just numbers.

Numbers in a row say nothing: 1 2 3 ... 13 stands in a problem of mathematics and in many a program. So shared words
are an exact hit only with WHOLE that are not just numbers among them, or a like window around them; and an item of
`ngram` words or more with fewer than WHOLE such words must be there as a whole.

Why two for the long ones: one changed word in the middle of an item of 25 words leaves no 13 words in a row. Six
survive every way of changing one word in twenty (rounded up) of an item of 13 words or more, and then the window
decides, so that six common words alone condemn nothing. Whole documents are never compared: a question inside a book is
not like the book.

Knows words, hashes and the index's own files, no documents' and no evaluation sets'.
"""

import collections
import dataclasses
import functools
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.decontaminate.evaluation_sets import Item
from data_pipeline.decontaminate.grams import ARRAYS, Grams, grams_of
from data_pipeline.text.words import Hashes, Positions, WordHashes, ngrams_at, word_hashes

WHOLE = 8  # words: the least that GPT-3's authors looked for (arXiv:2005.14165, appendix C); docs/decisions.md has ours
SHOWN_WORDS = 40  # of a shared run of words
GRAM_SETS = ("exact", "seeds", "openings", "whole")
_ITEMS = pa.schema([("items", pa.list_(pa.struct([("id", pa.string()), ("field", pa.string())])))])
_NUMBER = re.compile("[0-9_]+")  # as `_telling` says of bytes
_ANCHORS = 8  # windows compared per document and item


@dataclasses.dataclass(frozen=True)
class Hit:
    """An item, or a part of one, inside a document."""

    row: int
    kind: str  # exact | near | whole
    text: int  # number of the index's text
    position: int  # first shared word in the document
    words: int  # shared words in a row from there
    jaccard: float  # likeness of the anchored window and the item's text
    shown: str  # the shared words


class Items:
    """For each text the (id, field) of the items that have it, in a table that may lie in a file."""

    def __init__(self, table: pa.Table):
        self.table = table

    @classmethod
    def of(cls, owners: list[list[tuple[str, str]]]) -> "Items":
        """From lists."""
        return cls(pa.table({"items": [[{"id": id, "field": field} for id, field in own] for own in owners]}, _ITEMS))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, text: int) -> list[tuple[str, str]]:
        return [(item["id"], item["field"]) for item in self.table["items"][text].as_py()]

    def ids(self) -> list[str]:
        """Every item's, once for each of its texts."""
        ids: list[str] = pc.struct_field(pc.list_flatten(self.table["items"]), "id").to_pylist()
        return ids

    def per_set(self) -> dict[str, int]:
        """How many items of each set there are."""
        return dict(collections.Counter(id.partition("/")[0] for id in self.ids()))


class Index:
    """The texts of evaluation sets that can be looked for: the `long` ones that may be there in part, then those that
    must be there as a whole. Of an item with no such text the fields are looked for as one text.

    `items[t]` are the items that have text t, `too_short` those that are not looked for, both as (id, field).
    """

    def __init__(self, items: Sequence[Item], ngram: int, seed: int, threshold: float, whole: int = WHOLE):
        self.ngram, self.seed, self.threshold, self.whole = ngram, min(seed, ngram), threshold, whole
        made = word_hashes(pl.Series([item.text for item in items], dtype=pl.String))
        telling = _telling(made)
        texts: list[dict[bytes, list[tuple[str, str]]]] = [{}, {}]  # long and short ones; equal ones are one text
        too_short: list[tuple[str, str]] = []
        for id, group in itertools.groupby(range(len(items)), lambda number: items[number].id):
            fields = [((id, items[n].field), made.document(n), int(telling[n])) for n in group]
            wanted = [one for one in fields if self._can_be_found(one)]
            if not wanted and len(fields) > 1:
                names, words, counts = zip(*fields, strict=True)
                joined = (id, "+".join(field for _, field in names)), np.concatenate(words), sum(counts)
                wanted = [joined] if self._can_be_found(joined) else []
                fields = [] if wanted else fields
            too_short += [one[0] for one in fields if not self._can_be_found(one)]
            for name, words_, telling_ in wanted:
                texts[not self._is_long(words_, telling_)].setdefault(words_.tobytes(), []).append(name)
        self.items, self.too_short = Items.of([*texts[0].values(), *texts[1].values()]), Items.of([too_short])
        self.words = np.frombuffer(b"".join([*texts[0], *texts[1]]), np.uint64)
        self.offsets = np.append(0, np.cumsum([len(key) // 8 for key in [*texts[0], *texts[1]]])).astype(np.int64)
        self.long = len(texts[0])  # they stand first

    def _can_be_found(self, text: tuple[tuple[str, str], Hashes, int]) -> bool:
        _, words, telling = text
        return telling > 0 if len(words) >= self.ngram else telling >= self.whole

    def _is_long(self, words: Hashes, telling: int) -> bool:
        return len(words) >= self.ngram and telling >= self._least

    @property
    def _least(self) -> int:
        """Words that are not just numbers, without which a part of a text says nothing."""
        return min(WHOLE, self.ngram)

    def __len__(self) -> int:
        return len(self.items)

    @functools.cached_property
    def _lengths(self) -> Positions:
        return np.diff(self.offsets)

    def _long_grams(self, size: int) -> Grams:
        return grams_of(self.offsets[:self.long + 1], self.words[:self.offsets[self.long]], size)

    @functools.cached_property
    def _exact(self) -> Grams:
        return self._long_grams(self.ngram)

    @functools.cached_property
    def _seeds(self) -> Grams:
        return self._long_grams(self.seed)

    def _short_grams(self, hash_of: Callable[[Positions, int], Hashes]) -> Grams:
        """For the short texts of each length, `hash_of` (their first words, the length)."""
        short = np.arange(self.long, len(self), dtype=np.int32)
        hashes = np.zeros(len(short), np.uint64)
        for length in np.unique(self._lengths[short]).tolist():
            chosen = self._lengths[short] == length
            hashes[chosen] = hash_of(self.offsets[short[chosen]], length)
        return Grams(hashes, short, np.zeros(len(short), np.int32))

    @functools.cached_property
    def _openings(self) -> Grams:
        return self._short_grams(lambda first, length: ngrams_at(self.words, first, self.whole))

    @functools.cached_property
    def _whole(self) -> Grams:
        return self._short_grams(lambda first, length: ngrams_at(self.words, first, length))

    @functools.cached_property
    def _templates(self) -> Positions:
        return self._seeds.template_grams(len(self.items))

    def short(self) -> Items:
        """The items of the texts that must be there as a whole."""
        return Items(self.items.table.slice(self.long))

    def unseen(self) -> dict[str, list[str]]:
        """Of every set the items with no text that is looked for."""
        seen = set(self.items.ids())
        result: dict[str, list[str]] = {}
        for id in dict.fromkeys(id for id in self.too_short.ids() if id not in seen):
            result.setdefault(id.partition("/")[0], []).append(id)
        return result

    def save(self, directory: Path) -> None:
        """Write it to files that `load` opens: `directory` is there only when all of them are."""
        temporary = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        arrays = {"words": self.words, "offsets": self.offsets, "long": np.array(self.long)}
        for name, grams in zip(GRAM_SETS, (self._exact, self._seeds, self._openings, self._whole), strict=True):
            arrays |= {f"{name}-{part}": array for part, array in grams.arrays.items()}
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        for name, items in (("items", self.items), ("too_short", self.too_short)):
            with pa.OSFile(str(temporary / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, _ITEMS) as writer:
                writer.write_table(items.table)
        try:
            os.rename(temporary, directory)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)

    @classmethod
    def load(cls, directory: Path, ngram: int, seed: int, threshold: float, whole: int = WHOLE) -> "Index":
        """The index that `save` wrote, in memory that all processes of a machine share."""
        def array(name: str) -> np.ndarray:
            return np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r"))

        made = cls.__new__(cls)
        made.ngram, made.seed, made.threshold, made.whole = ngram, min(seed, ngram), threshold, whole
        made.words, made.offsets, made.long = array("words"), array("offsets"), int(array("long"))
        files = [pa.memory_map(str(directory / f"{name}.arrow")) for name in ("items", "too_short")]
        made.items, made.too_short = (Items(pa.ipc.open_file(file).read_all()) for file in files)
        made._exact, made._seeds, made._openings, made._whole = (
            Grams.of({part: array(f"{name}-{part}") for part in ARRAYS}) for name in GRAM_SETS)
        return made

    def search(self, words: WordHashes) -> Iterator[Hit]:
        """Every hit in the documents of `words`, document by document, exact ones first."""
        exact = _spread(words, self._exact, self.ngram)
        seeds = self._plausible(*_spread(words, self._seeds, self.seed, rare=True))
        known: set[tuple[int, int]] = set()
        hits: list[Hit] = []
        for row, text, group in _by_pair(*exact):
            known.add((row, text))
            score = self._likeness(words, row, text, exact[1][group] - exact[3][group])
            for start, length in _runs(exact[1][group], self.ngram):
                if score >= self.threshold or self._says(words.words(start, start + length)):
                    hits.append(self._hit(words, row, "exact", text, start, length, score))
        for row, text, group in _by_pair(*seeds):
            if (row, text) in known:
                continue
            score = self._likeness(words, row, text, seeds[1][group] - seeds[3][group])
            if score >= self.threshold:
                start, length = max(_runs(seeds[1][group], self.seed), key=lambda run: (run[1], -run[0]))
                hits.append(self._hit(words, row, "near", text, start, length, score))
        for row, text, start in self._whole_places(words):
            hits.append(self._hit(words, row, "whole", text, start, int(self._lengths[text]), 1.0))
        return iter(sorted(hits, key=lambda hit: (hit.row, hit.kind, hit.position, hit.text)))

    def _says(self, run: Sequence[str]) -> bool:
        telling = (word for word in run if not _NUMBER.fullmatch(word))
        return sum(1 for _ in itertools.islice(telling, self._least)) == self._least

    def _whole_places(self, words: WordHashes) -> list[tuple[int, int, int]]:
        """(row, text, word number in the batch) of the first place where all words of a short text stand in a row."""
        if self.long == len(self):
            return []
        offsets, hashes = words.ngrams(self.whole)
        at, _ = self._openings.find(hashes)
        row = np.searchsorted(offsets, at, side="right") - 1
        at = at - offsets[row] + words.offsets[row]
        found: dict[tuple[int, int], int] = {}
        for length in np.unique(self._lengths[self.long:]).tolist():
            inside = at + length <= words.offsets[row + 1]
            place, key = self._whole.find(ngrams_at(words.hashes, at[inside], length))
            texts = self._whole.text[self._whole.first[key]]
            for where, text in zip(np.flatnonzero(inside)[place].tolist(), texts.tolist(), strict=True):
                found.setdefault((int(row[where]), text), int(at[where]))
        return [(row, text, start) for (row, text), start in found.items()]

    def _plausible(self, row: Positions, at: Positions, text: Positions,
                   place: Positions) -> tuple[Positions, Positions, Positions, Positions]:
        """Only pairs of document and text that share as many seeds as a likeness of `threshold` must leave.

        A window of n words with likeness J differs in at most n (1 - J) / (1 + J) words, each in `seed` n-grams; seeds
        of a template that a hundred items share are counted on neither side.
        """
        if len(row) == 0:
            return row, at, text, place
        length = self._lengths[text]
        differing = np.floor(length * (1 - self.threshold) / (1 + self.threshold) + 1e-9)
        needed = np.maximum(length - self.seed + 1 - self._templates[text] - self.seed * differing, 1)
        pair = row * len(self.items) + text
        where = place + pair * (int(place.max()) + 1)
        own, inverse = np.unique(pair, return_inverse=True)
        distinct = np.bincount(np.searchsorted(own, np.unique(where) // (int(place.max()) + 1)), minlength=len(own))
        good = distinct[inverse] >= needed
        return row[good], at[good], text[good], place[good]

    def _likeness(self, words: WordHashes, row: int, text: int, starts: Positions) -> float:
        """The best Jaccard likeness of the text with a window anchored at one of the shared n-grams."""
        part = self.words[self.offsets[text]:self.offsets[text + 1]]
        first, last = words.offsets[row], words.offsets[row + 1]
        values, counts = np.unique(starts, return_counts=True)
        best = 0.0
        for start in values[np.argsort(-counts, kind="stable")[:_ANCHORS]]:
            window = words.hashes[max(start, first):min(start + len(part), last)]
            best = max(best, bag_jaccard(part, window))
        return best

    def _hit(self, words: WordHashes, row: int, kind: str, text: int, start: int, length: int, score: float) -> Hit:
        shown = " ".join(words.words(start, start + min(length, SHOWN_WORDS)))
        return Hit(row, kind, text, int(start - words.offsets[row]), length, score, shown)


def _telling(words: WordHashes) -> Positions:
    """Per document, its words but those of ASCII digits and "_" alone: numbers in a row stand in many a text."""
    letters = np.append(0, np.cumsum(~np.isin(words.data, np.frombuffer(b"0123456789_", np.uint8))))
    counts = np.append(0, np.cumsum(letters[words.ends] > letters[words.starts]))
    return np.diff(counts[words.offsets])


def bag_jaccard(one: Hashes, other: Hashes) -> float:
    """Words of both over words of either, each counted as often as it stands there."""
    values, inverse = np.unique(np.concatenate([one, other]), return_inverse=True)
    ours = np.bincount(inverse[:len(one)], minlength=len(values))
    theirs = np.bincount(inverse[len(one):], minlength=len(values))
    return float(np.minimum(ours, theirs).sum() / max(np.maximum(ours, theirs).sum(), 1))


def _spread(words: WordHashes, grams: Grams, size: int, *,
            rare: bool = False) -> tuple[Positions, Positions, Positions, Positions]:
    """(row, word number in the batch, text, word of the text) of every shared n-gram, or every rare one."""
    offsets, hashes = words.ngrams(size)
    at, key = grams.find(hashes)
    if rare:
        at, key = grams.rare(at, key)
    at, text, place = grams.places(at, key)
    row = np.searchsorted(offsets, at, side="right") - 1
    return row, at - offsets[row] + words.offsets[row], text, place


def _by_pair(row: Positions, at: Positions, text: Positions,
             place: Positions) -> Iterator[tuple[int, int, Positions]]:
    """(row, text, indices) of what one document and one text share, by position."""
    order = np.lexsort((place, at, text, row))
    edges = np.flatnonzero(np.diff(row[order]) | np.diff(text[order])) + 1
    for group in np.split(order, edges):
        if len(group):
            yield int(row[group[0]]), int(text[group[0]]), group


def _runs(at: Positions, size: int) -> list[tuple[int, int]]:
    """(first word, words) of the runs that n-grams at the sorted positions `at` cover."""
    at = np.unique(at)
    return [(int(run[0]), int(run[-1] - run[0]) + size) for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)]
