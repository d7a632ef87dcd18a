"""Words of many texts as 64-bit hashes, made in one pass and shared by all that compares texts by words.

Owns what a word is, its hash, and how hashes of neighbouring words become one hash of an n-gram. The numbers
are defined here to the bit (`slow_word_hashes` and `slow_ngram` say it in plain Python), so that what one
version stored can be compared with what another makes. Knows nothing of documents or duplicates.

A word is a run of letters, marks, numbers and connectors (`\\w+`, as good as) of the lower-cased text; in scripts
without spaces (Han, kana, Thai, Lao, Khmer, Burmese) every letter is a word. Any other rule is given as a
regular expression, in the syntax of the Rust `regex` crate.

hash(word)   = mix(sum of byte[i] * BASE^i, mod 2^64)        over the word's UTF-8 bytes
hash(n-gram) = mix(sum of word[i] * NGRAM_BASE^(n-1-i) + n)  over its words' hashes
Both bases are 3 modulo 8, so that no difference of two of their small powers is a multiple of a large power of 2.
"""

import dataclasses
import functools
import unicodedata

import numpy as np
import numpy.typing as npt
import polars as pl

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]

VERSION = 1  # raise it when the same text would get other words or hashes
BASE = 0x9E3779B97F4A7C13
NGRAM_BASE = 0xD1342543DE82EF9B
_MASK = (1 << 64) - 1
_CHUNK = 1 << 17  # bytes hashed at a time: tables and intermediates stay in the cache
_OTHER, _WORD, _ALONE = 0, 1, 2
# no letter, mark, number or connector is outside, in any Unicode so far; looking at 1.1 million takes half a second
_ASSIGNED = ((0, 0x34FFF), (0xE0000, 0xE0FFF))
# first and last letter of the blocks where words are not set apart by spaces
_NO_SPACES = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF),
              (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF),
              (0x1B000, 0x1B16F), (0x20000, 0x323AF))


@dataclasses.dataclass(frozen=True)
class WordHashes:
    """Hashes of the words of many documents: document d has `hashes[offsets[d]:offsets[d + 1]]`.

    `data` and `starts`, `ends` are the lower-cased texts end to end and where in their bytes each word is.
    """

    offsets: Positions  # [documents + 1]
    hashes: Hashes  # [words]
    data: npt.NDArray[np.uint8]
    starts: Positions
    ends: Positions

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> Hashes:
        """The word hashes of one document."""
        return self.hashes[self.offsets[index]:self.offsets[index + 1]]

    def words(self, first: int, last: int) -> list[str]:
        """The words numbered first to last - 1 (over all documents), as text."""
        return [self.data[start:end].tobytes().decode()
                for start, end in zip(self.starts[first:last], self.ends[first:last], strict=True)]

    @functools.cached_property
    def _windows(self) -> dict[int, Hashes]:
        """Unmixed sums over 1, 2, 4, 8 ... words from every position, shared by n-grams of all lengths."""
        return {1: self.hashes}

    def ngrams(self, size: int, *, short_whole: bool = False) -> tuple[Positions, Hashes]:
        """(offsets, hashes) of the n-grams of `size` words of every document, in their order.

        A document of fewer words has none; with `short_whole` it has one, made of all its words.
        """
        if size < 1:
            raise ValueError(f"n-grams of {size} words: give 1 or more.")
        lengths = np.diff(self.offsets)
        counts = np.maximum(lengths - (size - 1), 0)
        sums = self._sums(size)
        inside = np.ones(len(self.hashes), dtype=bool)
        for back in range(1, size):  # the windows that would reach into the next document
            inside[self.offsets[1:][lengths >= back] - back] = False
        grams = mix(sums[inside[:len(sums)]] + np.uint64(size))
        offsets = _offsets(counts)
        if not short_whole:
            return offsets, grams
        short = np.flatnonzero((lengths > 0) & (lengths < size))
        if len(short) == 0:
            return offsets, grams
        whole = np.empty(len(short), dtype=np.uint64)
        for length in range(1, size):
            chosen = lengths[short] == length
            if chosen.any():
                whole[chosen] = mix(self._sums(length)[self.offsets[short[chosen]]] + np.uint64(length))
        grams = np.insert(grams, offsets[short], whole)
        counts[short] = 1
        return _offsets(counts), grams

    def _sums(self, size: int) -> Hashes:
        """sum of hash[p + i] * NGRAM_BASE^(size-1-i), for every p with p + size <= words."""
        built: Hashes | None = None
        done, power = 0, 1
        while power <= size:
            if power not in self._windows:
                half = self._windows[power // 2]
                cut = max(len(half) - power // 2, 0)
                self._windows[power] = half[:cut] * _power(power // 2) + half[power // 2:]
            if size & power:
                part = self._windows[power]
                if built is None:
                    built = part
                else:  # what is built so far stands after the new part
                    kept = max(len(self.hashes) - (done + power) + 1, 0)
                    built = part[:kept] * _power(done) + built[power:power + kept]
                done += power
            power *= 2
        assert built is not None
        return built


def word_hashes(texts: pl.Series, pattern: str | None = None) -> WordHashes:
    """The words of every text by the rule of this module, or what the regular expression `pattern` finds.

    Texts are lower-cased first. A null text has no words.
    """
    lowered = texts.fill_null("").str.to_lowercase()
    if pattern is None:
        data, bounds = _buffers(lowered)
        starts, ends = _spans(data, bounds)
        offsets = np.searchsorted(starts, bounds).astype(np.int64)
    else:
        found = lowered.str.extract_all(pattern)
        offsets = _offsets(found.list.len().to_numpy().astype(np.int64))
        data, bounds = _buffers(found.filter(found.list.len() > 0).list.explode())
        starts, ends = bounds[:-1], bounds[1:]
    return WordHashes(offsets, hash_spans(data, starts, ends), data, starts, ends)


def hash_spans(data: npt.NDArray[np.uint8], starts: Positions, ends: Positions) -> Hashes:
    """Hash of every `data[starts[i]:ends[i]]`. Spans are in order and do not overlap.

    The sum of a span is the difference of two running sums, shifted back by the inverse powers of BASE.
    """
    powers, inverse = _powers(BASE), _powers(pow(BASE, -1, 1 << 64))
    hashes = np.empty(len(starts), dtype=np.uint64)
    first = 0
    while first < len(starts):
        at = int(starts[first])
        last = int(np.searchsorted(ends, at + _CHUNK, side="right"))
        if last == first:  # one word longer than a chunk
            hashes[first] = _long_sum(data[at:int(ends[first])])
            first += 1
            continue
        piece = data[at:int(ends[last - 1])]
        running = np.zeros(len(piece) + 1, dtype=np.uint64)
        np.cumsum(piece * powers[:len(piece)], out=running[1:])
        begin = starts[first:last] - at
        hashes[first:last] = (running[ends[first:last] - at] - running[begin]) * inverse[begin]
        first = last
    return mix(hashes)


def ngrams_at(hashes: Hashes, at: Positions, size: int) -> Hashes:
    """Hash of the n-gram of `size` words that begins at each of the places `at`; all of them must end inside."""
    sums = np.zeros(len(at), dtype=np.uint64)
    for place in range(size):
        sums = sums * np.uint64(NGRAM_BASE) + hashes[at + place]
    return mix(sums + np.uint64(size))


def mix(values: Hashes) -> Hashes:
    """Spread every bit of each value over all of it (the finalizer of SplitMix64)."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def slow_words(text: str) -> list[str]:
    """The words of `text`, one letter at a time: what `word_hashes` must agree with."""
    words: list[str] = []
    open_word = False
    for letter in text.lower():
        kind = _WORD if _is_word(letter) else _OTHER
        if kind and any(first <= ord(letter) <= last for first, last in _NO_SPACES):
            kind = _ALONE
        if kind == _WORD and open_word:
            words[-1] += letter
        elif kind != _OTHER:
            words.append(letter)
        open_word = kind == _WORD
    return words


def slow_word_hash(word: str) -> int:
    """The hash of one word, by its definition."""
    return _slow_mix(sum(byte * pow(BASE, place, 1 << 64) for place, byte in enumerate(word.encode())))


def slow_ngram(hashes: list[int]) -> int:
    """The hash of one n-gram from the hashes of its words, by its definition."""
    size = len(hashes)
    return _slow_mix(sum(word * pow(NGRAM_BASE, size - 1 - place, 1 << 64)
                         for place, word in enumerate(hashes)) + size)


def _slow_mix(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _spans(data: npt.NDArray[np.uint8], bounds: Positions) -> tuple[Positions, Positions]:
    """Where words start and end in `data`, whose documents lie between `bounds`."""
    if len(data) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    table = _kinds()
    kinds = table[:256][data]  # right below 128; a byte above is part of a letter
    high = np.flatnonzero(data >= 0xC0)  # lead bytes
    alone = False
    if len(high):
        kinds[data >= 0x80] = _OTHER
        for length, code in _code_points(data, high):
            kind = table[code]
            at = high[_lengths(data, high) == length]
            for place in range(length):
                kinds[at + place] = kind
            alone = alone or bool((kind == _ALONE).any())
    word = kinds == _WORD
    before = np.zeros(len(data) + 1, dtype=bool)
    before[1:] = word
    after = before[1:].copy()
    after[:-1] = word[1:]
    after[-1] = False
    edges = bounds[(bounds > 0) & (bounds < len(data))]
    before[edges] = False
    after[edges - 1] = False
    starts = word & ~before[:-1]
    ends = word & ~after
    if alone:
        single = kinds == _ALONE
        starts |= single & ((data & 0xC0) != 0x80)
        last = np.ones(len(data), dtype=bool)
        last[:-1] = (data[1:] & 0xC0) != 0x80
        ends |= single & last
    return np.flatnonzero(starts), np.flatnonzero(ends) + 1


def _lengths(data: npt.NDArray[np.uint8], high: Positions) -> npt.NDArray[np.uint8]:
    lead = data[high]
    return (2 + (lead >= 0xE0).astype(np.uint8) + (lead >= 0xF0)).astype(np.uint8)


def _code_points(data: npt.NDArray[np.uint8], high: Positions) -> list[tuple[int, Positions]]:
    """(UTF-8 length, code points) of the letters whose lead bytes are at `high`, length by length."""
    lengths, result = _lengths(data, high), []
    for length in (2, 3, 4):
        at = high[lengths == length]
        code = data[at].astype(np.int64) & (0x7F >> length)
        for place in range(1, length):
            code = (code << 6) | (data[at + place] & 0x3F)
        result.append((length, code))
    return result


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """The kind of every code point."""
    kinds = np.zeros(0x110000, np.uint8)
    for first, last in _ASSIGNED:
        kinds[first:last + 1] = np.fromiter(map(_is_word, map(chr, range(first, last + 1))), np.uint8)
    for first, last in _NO_SPACES:
        kinds[first:last + 1] *= _ALONE
    return kinds


def _is_word(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category[0] in "LMN" or category == "Pc"


def _long_sum(data: npt.NDArray[np.uint8]) -> int:
    powers, total = _powers(BASE), 0
    for at in range(0, len(data), _CHUNK):
        piece = data[at:at + _CHUNK]
        total += int(np.sum(piece * powers[:len(piece)], dtype=np.uint64)) * pow(BASE, at, 1 << 64)
    return total & _MASK


@functools.cache
def _powers(base: int) -> Hashes:
    """base^i modulo 2^64 for i up to a chunk."""
    powers = np.full(_CHUNK + 1, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(NGRAM_BASE, exponent, 1 << 64))


def _offsets(counts: Positions) -> Positions:
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _buffers(texts: pl.Series) -> tuple[npt.NDArray[np.uint8], Positions]:
    """All texts' UTF-8 end to end, and the bounds between them."""
    array = texts.to_arrow(compat_level=pl.CompatLevel.oldest())
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int64)[array.offset:array.offset + len(array) + 1]
    if data is None or len(bounds) == 0:
        return np.zeros(0, np.uint8), np.zeros(len(array) + 1, np.int64)
    return np.frombuffer(data, np.uint8)[bounds[0]:bounds[-1]], bounds - bounds[0]
