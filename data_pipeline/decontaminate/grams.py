"""N-grams of words, sorted by hash, as the index of evaluation texts looks them up.

Owns the bit table and what a template's n-gram is. Knows no evaluation set, no file and no document.
"""

import numpy as np
import numpy.typing as npt

from data_pipeline.text.words import Hashes, Positions, WordHashes

_LISTED = 100  # places followed per n-gram: a seed in more of them is a template's and is left out
ARRAYS = ("keys", "bounds", "text", "place", "table")  # arrays of `Grams`


class Grams:
    """Sorted n-gram hashes with where each stands, behind a bit table that answers "no" for nearly all others."""

    def __init__(self, hashes: Hashes, text: npt.NDArray[np.int32], place: npt.NDArray[np.int32]):
        order = np.argsort(hashes, kind="stable")
        keys, first = np.unique(hashes[order], return_index=True)
        shift = _shift(len(keys))
        bits = keys >> shift
        table = np.zeros(1 << (64 - int(shift) - 3), dtype=np.uint8)
        np.bitwise_or.at(table, bits >> np.uint64(3), np.uint8(1) << (bits & np.uint64(7)).astype(np.uint8))
        self._hold({"keys": keys, "bounds": np.append(first, len(order)).astype(np.int32), "text": text[order],
                    "place": place[order], "table": table})

    def _hold(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.keys, self.text, self.place, self._table = (arrays[name] for name in ("keys", "text", "place", "table"))
        self.first, self.last = arrays["bounds"][:-1], arrays["bounds"][1:]  # of each key's places
        self._shift = _shift(len(self.keys))

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> "Grams":
        """Those whose `arrays` these are."""
        made = cls.__new__(cls)
        made._hold(arrays)
        return made

    def find(self, hashes: Hashes) -> tuple[Positions, Positions]:
        """(positions in `hashes` that are in the index, the key each has there)."""
        if len(self.keys) == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        bits = hashes >> self._shift
        maybe = self._table[bits >> np.uint64(3)] >> (bits & np.uint64(7)).astype(np.uint8)
        at = np.flatnonzero(maybe & 1)
        key = np.searchsorted(self.keys, hashes[at])
        key[key == len(self.keys)] = 0
        same = self.keys[key] == hashes[at]
        return at[same], key[same]

    def template_grams(self, texts: int) -> Positions:
        """For each of `texts` texts, how many of its n-grams stand in more than _LISTED places."""
        many = np.repeat(self.last - self.first > _LISTED, self.last - self.first)
        return np.bincount(self.text[many], minlength=texts).astype(np.int64)

    def rare(self, at: Positions, key: Positions) -> tuple[Positions, Positions]:
        """Without the positions whose n-gram stands in more than _LISTED places."""
        few = self.last[key] - self.first[key] <= _LISTED
        return at[few], key[few]

    def places(self, at: Positions, key: Positions) -> tuple[Positions, Positions, Positions]:
        """For every found position, every place it stands in: (position, text, word of the text)."""
        count = np.minimum(self.last[key] - self.first[key], _LISTED)
        entry = np.repeat(self.first[key] - (np.cumsum(count) - count), count) + np.arange(count.sum())
        return np.repeat(at, count), self.text[entry].astype(np.int64), self.place[entry].astype(np.int64)


def _shift(keys: int) -> np.uint64:
    """How far a hash is shifted to be a place in the bit table: 32 bits a key, so that few are set."""
    return np.uint64(64 - max(16, int(32 * max(keys, 1)).bit_length()))


def grams_of(offsets: Positions, words: Hashes, size: int) -> Grams:
    """The n-grams of `size` of every text; `words[offsets[t]:offsets[t + 1]]` are those of text t."""
    nothing = np.zeros(0, np.int64)
    offsets, hashes = WordHashes(offsets, words, np.zeros(0, np.uint8), nothing, nothing).ngrams(size)
    counts = np.diff(offsets)
    text = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return Grams(hashes, text, (np.arange(len(hashes)) - np.repeat(offsets[:-1], counts)).astype(np.int32))
