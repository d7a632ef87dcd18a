"""Words and n-grams as hashes, against their definition in plain Python."""

import dataclasses
import itertools
import random
import sys
import unicodedata

import numpy as np
import polars as pl
import pytest

from data_pipeline.filters import make_batch
from data_pipeline.text import words
from data_pipeline.text.words import ngrams_at, slow_ngram, slow_word_hash, slow_words, word_hashes

TEXTS = [
    "The quick brown fox, the QUICK brown fox's 2nd_jump!", "", "one", "  \n\t ", "don't stop-me", "naïve café ΣΊΣΥΦΟΣ",
    "日本語のテキスト and English混ざり", "สวัสดีชาวโลก hello", "x", "emoji 😀 between 😀words😀", "\u0301 mark first",
    "a\u0301b c", "İstanbul ǅ ﬁ ß ẞ", "١٢٣ ४५ ² ½ Ⅷ", "word" * 40, "end with é", "é", "𝒜𝒷 𐐀𐐨 end",
]


def documents(hashes):
    return [hashes.document(index).tolist() for index in range(len(hashes))]


def test_words_are_those_of_the_definition():
    made = word_hashes(pl.Series(TEXTS))
    assert documents(made) == [[slow_word_hash(word) for word in slow_words(text)] for text in TEXTS]
    assert made.words(0, len(made.hashes)) == [word for text in TEXTS for word in slow_words(text)]


def test_what_words_are():
    assert slow_words("Don't go_on, 3.5 times!") == ["don", "t", "go_on", "3", "5", "times"]
    assert slow_words("我 love 北京x") == ["我", "love", "北", "京", "x"]


def test_hashes_are_the_same_for_ever():
    assert word_hashes(pl.Series(["the cat 猫 sat"])).hashes.tolist() == [
        0xD3B1886C1C46EDE7, 0x820FEB952514248E, 0x0803EF3CB9090F26, 0xB47458C518B413E0]


def test_every_letter_that_has_a_name():
    """Every assigned code point, alone and between letters; lower-casing is Rust's here, Python's there."""
    letters = [chr(code) for code in range(1, sys.maxunicode + 1)
               if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    lowered = pl.Series(letters).str.to_lowercase().to_list()
    same = [letter for letter, low in zip(letters, lowered, strict=True) if low == letter.lower()]
    assert len(letters) - len(same) <= 64  # letters that got a lower case in a newer Unicode
    texts = ["".join(same[at:at + 500]) for at in range(0, len(same), 500)]
    texts += [" a".join(same[at:at + 500]) for at in range(0, len(same), 500)]
    made = word_hashes(pl.Series(texts))
    for index, text in enumerate(texts):
        first, last = made.offsets[index:index + 2]
        assert made.words(first, last) == slow_words(text), f"{text[0]!r} to {text[-1]!r}"


def test_random_texts_in_any_cut():
    dice = random.Random(0)
    letters = "aB cD,é_ß 日本 ไ\n9\u0301😀Σ"
    texts = ["".join(dice.choices(letters, k=dice.randrange(40))) for _ in range(400)]
    whole = documents(word_hashes(pl.Series(texts)))
    assert whole == [[slow_word_hash(word) for word in slow_words(text)] for text in texts]
    assert whole[100:200] == documents(word_hashes(pl.Series(texts)[100:200]))
    assert whole == documents(word_hashes(pl.concat([pl.Series(texts[:7]), pl.Series(texts[7:])])))


def test_another_rule():
    made = word_hashes(pl.Series(["Hi, you!", None, "...", "a b"]), r"\w+|[^\w\s]+")
    expected = [["hi", ",", "you", "!"], [], ["..."], ["a", "b"]]
    assert documents(made) == [[slow_word_hash(word) for word in row] for row in expected]
    assert made.words(0, 4) == expected[0]
    plain = word_hashes(pl.Series(TEXTS[:2]))
    assert documents(plain) == documents(word_hashes(pl.Series(TEXTS[:2]), r"\w+"))


def test_long_words_and_long_documents(monkeypatch):
    monkeypatch.setattr(words, "_CHUNK", 64)
    words._powers.cache_clear()
    text = "ab " * 50 + "x" * 300 + " cd" + "y" * 64 + " " + "z" * 65
    made = word_hashes(pl.Series([text, text[::-1]]))
    words._powers.cache_clear()
    assert documents(made) == [[slow_word_hash(word) for word in slow_words(t)] for t in (text, text[::-1])]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 21])
def test_ngrams_never_cross_documents(size):
    dice = random.Random(size)
    texts = [" ".join(dice.choices("abcdefg", k=length)) for length in (0, 1, 4, 5, 12, 13, 14, 0, 40, 3, 2)]
    made = word_hashes(pl.Series(texts))
    for whole in (False, True):
        offsets, grams = made.ngrams(size, short_whole=whole)
        for index in range(len(texts)):
            row = made.document(index).tolist()
            expected = [slow_ngram(row[at:at + size]) for at in range(len(row) - size + 1)]
            if whole and 0 < len(row) < size:
                expected = [slow_ngram(row)]
            assert grams[offsets[index]:offsets[index + 1]].tolist() == expected
    at = np.arange(len(made.hashes) - size)[::3]
    assert ngrams_at(made.hashes, at, size).tolist() == [slow_ngram(made.hashes[p:p + size].tolist()) for p in at]
    assert len(word_hashes(pl.Series(["", ""])).ngrams(size)[1]) == 0


def test_ngrams_know_order_and_length():
    made = word_hashes(pl.Series(["a b", "b a", "a a", "a"]))
    pairs = made.ngrams(2)[1].tolist()
    assert len({*pairs, *made.ngrams(1)[1].tolist()}) == 5
    with pytest.raises(ValueError, match="1 or more"):
        made.ngrams(0)


def test_no_texts():
    made = word_hashes(pl.Series([], dtype=pl.String))
    assert len(made) == 0 and len(made.hashes) == 0
    assert made.ngrams(5)[0].tolist() == [0]
    assert np.array_equal(word_hashes(pl.Series([None, ""], dtype=pl.String)).offsets, [0, 0, 0])


def test_a_batch_hashes_its_words_once():
    batch = make_batch(["a b", "c"])
    assert batch.words is batch.words
    assert batch.words.offsets.tolist() == [0, 2, 3]
    assert dataclasses.replace(batch, text=pl.Series(["a", ""])).words.offsets.tolist() == [0, 1, 1]


def test_no_letter_is_outside_the_blocks_that_are_looked_at():
    """Of all code points, those of a word lie where the table looks (a new Unicode version could change that)."""
    outside = itertools.chain(range(0x35000, 0xE0000), range(0xE1000, 0x110000))
    assert not any(words._is_word(chr(code)) for code in outside)
