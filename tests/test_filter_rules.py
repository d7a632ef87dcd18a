"""Rule filters: equal to their slow twins on ugly and on real text, and to another implementation's verdicts."""

import gzip
import hashlib
import json
import random
import sysconfig
from collections import Counter
from pathlib import Path

import filter_twins as twins
import numpy as np
import polars as pl
import pytest

from data_pipeline.filters import FILTERS, gopher_repetition, make_batch, make_filter
from data_pipeline.filters.words import PATTERNS, word_table

SHARED = [parent / "shared" / "data" / "pretrain" for parent in Path(__file__).resolve().parents]
VERDICTS = json.loads((Path(__file__).parent / "golden" / "filter_verdicts.json").read_text())
RULES = {"heuristics": twins.heuristics, "gopher_quality": twins.gopher_quality,
         "gopher_repetition": twins.gopher_repetition, "fineweb": twins.fineweb}

WORDS = ["the", "of", "and", "with", "that", "house", "counting", "Wörter", "naïve", "x²", "e\u0301tude", "日本語",
         "a_b", "42", "3.14", "#", "...", "…", "-", "•", "{", "}", "https://a.example/b?c=d", "www.example.org",
         "https://", "lorem ipsum", "JavaScript", "privacy policy", "[12]", "[edit]", "don't", "end.", "why?", "wow!",
         "“so”", "\u00a0", "\u200d", "\u2003", "😀", "a" * 70, "\x1f", "\ufeff", "ſ", "İ"]
ENDS = ["\n", "\n\n", "\n\n\n", "\r\n", "\r", "\u2028", "\x0b", "\x85", " \n", "\x1c"]


def ugly(seed):
    """A text of many kinds of words and line ends; often it repeats itself."""
    pick = random.Random(seed)
    few = pick.sample(WORDS, pick.randint(1, len(WORDS)))
    plain = ["the", "of", "river", "and", "morning", "walked", "slowly", "with", "letters"]
    text = ""
    for _ in range(pick.randint(0, 12)):
        line = " ".join(pick.choice(few if pick.random() < 0.2 else plain) for _ in range(pick.randint(0, 30)))
        line += pick.choice(["", ".", ".", ".", "?", "...", "”", "。", " "])
        ending = pick.choice(ENDS) if pick.random() < 0.3 else "\n"
        text += (line + ending) * (pick.randint(1, 5) if pick.random() < 0.3 else 1)
    return pick.choice(["", " ", "\n"]) + text


@pytest.fixture(scope="module")
def texts():
    """Ugly texts, and real ones that are on every machine: pieces of the standard library's sources."""
    root = Path(sysconfig.get_path("stdlib"))
    real = [(root / name).read_text(encoding="utf-8") for name in ("argparse.py", "pydoc.py", "this.py")]
    pieces = [text[at:at + 3000] for text in real for at in range(0, len(text), 9000)]
    prose = ["\n".join(line.lstrip() for line in piece.split("\n") if not line.rstrip().endswith((":", ")", "]")))
             for piece in pieces]
    numbers = ["12 " * 60, "1,234 abc 5\n" * 40 + "some words at the end", "a " * 200, "x" * 30 + " " + "word " * 49]
    many = ["# " * 60 + "the house of words " * 30, "- item of the list\n" * 30, "wait...\n" * 60, "word… " * 80]
    lists = ["- some words of a long line that goes on and on\n" * 12 + "end\n", "of the " * 50_001]
    runs = [" ".join(f"word{i}" for i in range(60)) + f" {extra}" for extra in
            [" ".join(f"word{start + i}" for start in range(0, 60, size) for i in range(size) for _ in [0])
             for size in (5, 6, 7, 8, 9, 10, 12)]]
    return [ugly(seed) for seed in range(250)] + pieces + prose + numbers + many + lists + runs


def judged(texts, **mapping):
    return make_filter(mapping, "filters[0]").judge(make_batch(texts))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("words", PATTERNS)
def test_rules_equal_their_slow_twin(texts, name, words):
    reasons = judged(texts, type=name, words=words).reasons.to_list()
    expected = [RULES[name](text, words) for text in texts]
    assert [(text, a, b) for text, a, b in zip(texts, reasons, expected, strict=True) if a != b] == []
    assert len(set(reasons)) >= 4, Counter(reasons)


def test_c4_equals_its_slow_twin(texts):
    more = [text.replace("{", "").replace("lorem ipsum", "lorem") for text in texts]
    some = "This is a sentence. And one more! It goes on? Yes it does. So it ends.\n"
    made = [some, some + "Lorem  IPSUM. Then lorem ipsum ends it.", some + "a { b } is code.", some + "No end here",
            some + "Uses JavaScript { here }.", some + "We use cookies here.",
            some + "x" * 1001 + " is too long a word.",
            some + "Two words.", some + "A cited fact is here [12].", some + "A fact that is cited [citation needed]."]
    judgement = judged(texts + more + made, type="c4")
    expected = [twins.c4(text) for text in texts + more + made]
    assert judgement.reasons.to_list() == [reason for reason, _ in expected]
    assert judgement.text.to_list() == [text for _, text in expected]
    assert Counter(judgement.reasons.is_null().to_list())[True] >= 8


def test_words_equal_the_twins(texts):
    for definition in PATTERNS:
        table = word_table(pl.Series(texts, dtype=pl.String), definition)
        words = table.distinct.to_list()
        found = [words[code] for code in table.codes]
        assert found == [word for text in texts for word in twins.words_of(text, definition)]


def test_each_document_is_judged_alone(texts):
    """Neither its neighbours in the batch nor an empty text beside it change a judgement."""
    some = ["", *texts[:60:3], " "]
    for name in [*RULES, "c4", "length"]:
        together = judged(some, type=name)
        alone = [judged([text], type=name) for text in some]
        assert together.reasons.to_list() == [one.reasons[0] for one in alone]
        for score, column in together.scores.items():
            assert column.to_list() == [one.scores[score][0] for one in alone], (name, score)


def test_thresholds_are_used():
    text = "The quick brown fox and the lazy dog went home. " * 3
    assert judged([text], type="heuristics").reasons[0] == "heuristics: too few words"
    assert judged([text], type="heuristics", min_words=None).reasons[0] is None
    assert judged([text], type="heuristics", min_words=30).reasons[0] is None
    assert judged([text], type="heuristics", min_words=30, max_words=29 + 1).reasons[0] is None
    assert judged(["12345 words"], type="heuristics", min_words=1, max_digits=0.5).reasons[0] is None
    assert judged(["ab 12"], type="heuristics", min_words=1, max_digits=0.4,
                  min_mean_word_length=None).reasons[0] == "heuristics: too many digits"  # 40 % is not below 40 %
    assert judged(["one\none"], type="gopher_repetition", max_lines=0.5, max_line_characters=0.5, max_top_ngrams=[],
                  max_duplicate_ngrams=[]).reasons[0] is None


@pytest.mark.parametrize("mapping, words", [
    ({"type": "heuristics", "max_digits": 15}, ["max_digits", "15", "0.25 means 25 %"]),
    ({"type": "heuristics", "min_words": 10, "max_words": 5}, ["max_words", "nothing would be kept"]),
    ({"type": "heuristics", "words": "spaces"}, ["words", "'spaces'", "whitespace"]),
    ({"type": "gopher_quality", "min_stop_words": 9}, ["stop_words", "nothing would be kept"]),
    ({"type": "gopher_repetition", "max_top_ngrams": [-1]}, ["max_top_ngrams[0]", "negative"]),
    ({"type": "gopher_repetition", "max_top_ngram": [0.1]}, ["max_top_ngram", "max_top_ngrams"]),
    ({"type": "c4", "min_sentences": -1}, ["min_sentences", "negative"]),
    ({"type": "fineweb", "max_short_lines": 2}, ["max_short_lines", "share"]),
])
def test_wrong_parameters_are_explained(mapping, words):
    with pytest.raises(ValueError) as caught:
        make_filter(mapping, "filters[0]")
    for word in words:
        assert word in str(caught.value)


def read_texts():
    root = next((path for path in SHARED if path.is_dir()), None)
    if root is None:
        pytest.skip("needs the shared data")
    for name, documents in VERDICTS["documents"].items():
        wanted = {int(row.split()[0]): row.split()[1:] for row in documents}
        with (gzip.open if name.endswith(".gz") else open)(root / name, "rb") as file:
            for number, line in enumerate(file):
                if number > max(wanted):
                    break
                if number in wanted:
                    row = json.loads(line)
                    yield (row.get("text") or row["contents"], *wanted[number])


def test_verdicts_equal_those_of_datatrove():
    texts, digests, verdicts, left = map(list, zip(*read_texts(), strict=True))
    assert len(texts) >= 1000
    assert [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts] == digests
    batch = make_batch(texts)
    columns = [("gopher_quality", "pieces"), ("gopher_repetition", "pieces"), ("c4", None), ("fineweb", "pieces"),
               ("gopher_quality", "whitespace"), ("gopher_repetition", "whitespace")]
    reasons = {**VERDICTS["reasons"], "-": None}
    for index, (name, words) in enumerate(columns):
        judgement = make_filter({"type": name, **({"words": words} if words else {})}, "x").judge(batch)
        assert judgement.reasons.to_list() == [reasons[row[index]] for row in verdicts]
        if name == "c4":
            cleaned = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in judgement.text.to_list()]
            assert all(digest in (ours, "-") for digest, ours in zip(left, cleaned, strict=True))


def test_a_long_document_takes_time_in_proportion():
    """No rule is quadratic: a document eight times as long costs about eight times as much, not 64."""
    import time
    line = "the quick brown fox jumps over the lazy dog and runs home, again.\n"
    for name in [*RULES, "c4"]:
        cost = []
        for size in (4_000, 32_000):
            text = [line * size]
            start = time.process_time()
            judged(text, type=name)
            cost.append(time.process_time() - start)
        assert cost[1] < 30 * cost[0] + 0.2, (name, cost)


@pytest.mark.parametrize("short, long", [(8, 1000), (0, 3), (1, 1000)])
def test_repeated_pieces_are_counted_as_one_by_one(monkeypatch, short, long):
    """Long copies, copies of copies and pieces whose first n-gram was jumped over; marked together or one by one."""
    monkeypatch.setattr(gopher_repetition, "SHORT_RUN", short)
    monkeypatch.setattr(gopher_repetition, "LONG_RUN", long)
    dice = random.Random(short)
    texts = []
    for number in range(30):
        words = [f"w{dice.randrange(3 + 40 * (number % 5))}" for _ in range(dice.randrange(200))]
        for _ in range(number % 7):
            start, place = dice.randrange(len(words) + 1), dice.randrange(len(words) + 1)
            words[place:place] = words[start:start + dice.randrange(100)]
        texts.append(" ".join(words) or "x")
    measured = make_filter({"type": "gopher_repetition", "max_top_ngrams": [], "max_duplicate_ngrams": [1.0] * 9},
                           "x").measures(make_batch(texts))
    for n in range(2, 11):
        expected = [twins.duplicate_characters(text.split(), n) / len(text) for text in texts]
        assert measured[f"duplicate_{n}_grams"].to_list() == expected, n


@pytest.mark.parametrize("base", [gopher_repetition.NGRAM_BASE, 1 << 58, 1 << 63, 0])
def test_first_equal_when_hashes_clash(monkeypatch, base):
    monkeypatch.setattr(gopher_repetition, "NGRAM_BASE", base)
    keys = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint64)
    for some in (keys, keys[:1], keys[:0], keys % 2, np.arange(50, dtype=np.uint64)):
        assert gopher_repetition.first_equal(some).tolist() == [some.tolist().index(key) for key in some.tolist()]


def test_every_filter_type_is_documented():
    guide = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    for name in FILTERS:
        assert f"`{name}`" in guide, name


