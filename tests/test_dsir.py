"""DSIR: weights equal to the data-selection package's, and documents drawn as the weights say."""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from corpus_steps import Doc, run_step

from data_pipeline.select import dsir
from data_pipeline.select.dsir import ImportanceResampling, hashed_buckets, log_gain, log_weights, sha256_buckets
from data_pipeline.select.resample import draws, gumbel_keys, keep_by_rate, top
from data_pipeline.text.words import slow_ngram, slow_word_hash, slow_words, word_hashes
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dsir_data_selection.json").read_text())


def corpus(number=60):
    """One dataset of a mixture that is half like the target, and the target."""
    dice = np.random.default_rng(0)
    good, bad = [f"good{n}" for n in range(50)], [f"bad{n}" for n in range(50)]
    docs = [Doc(f"raw/{n}", " ".join(dice.choice(good if n % 2 else bad, 40))) for n in range(number)]
    return docs, [Doc(f"target/{n}", " ".join(dice.choice(good, 40))) for n in range(10)]


def test_weights_equal_those_of_data_selection(tmp_path):
    """Texts with superscripts, combining marks and punctuation, where `re` would split otherwise."""
    path = tmp_path / "target.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in GOLDEN["target"]))
    docs = [Doc(f"d{number}", text) for number, text in enumerate(GOLDEN["raw"])]
    rows = run_step(ImportanceResampling(target=(str(path),), hashing="sha256"), [docs[:20], docs[20:]])
    found = np.array([row["log_importance"] for row in rows])
    assert np.abs(found - GOLDEN["log_weights"]).max() <= 1e-9
    assert np.ptp(GOLDEN["log_weights"]) > 100


def test_hashed_buckets_are_their_definition():
    texts = ["a b c", "", "one", "x y"]
    offsets, values = hashed_buckets(word_hashes(pl.Series(texts)), 1000)
    for row, text in enumerate(texts):
        hashes = [slow_word_hash(word) for word in slow_words(text)]
        grams = hashes + [slow_ngram(hashes[at:at + 2]) for at in range(len(hashes) - 1)]
        assert values[offsets[row]:offsets[row + 1]].tolist() == [(gram >> 32) * 1000 >> 32 for gram in grams]


def test_log_weights_by_hand():
    gain = log_gain(np.array([3, 1, 0]), np.array([1, 1, 2]))
    expected = [math.log(0.75 + 1e-8) - math.log(0.25 + 1e-8), 0.0, math.log(1e-8) - math.log(0.5 + 1e-8)]
    assert gain == pytest.approx(expected, abs=1e-12)
    weights = log_weights(np.array([0, 2, 2, 5]), np.array([0, 2, 0, 0, 1]), gain)
    assert weights == pytest.approx([expected[0] + expected[2], 0, 2 * expected[0]])


@pytest.mark.parametrize("hashing", ["words", "sha256"])
def test_documents_like_the_target_are_kept(hashing):
    raw, target = corpus()
    step = ImportanceResampling(target=("set1",), rate=0.5, hashing=hashing)
    rows = run_step(step, [raw[:30], target, raw[30:]], [0, 1, 0])
    kept = {row["id"] for row in rows if row["reason"] is None}
    assert kept == {doc.id for doc in target} | {doc.id for number, doc in enumerate(raw) if number % 2}
    assert rows == run_step(step, [raw[:30], target, raw[30:]], [0, 1, 0], cut=4)


def test_source_level_keeps_the_rate_of_every_source():
    raw, target = corpus(80)
    bad, good = raw[0::2], raw[1::2]  # two datasets, one all unlike the target
    shards = [bad[:15], bad[15:], good, target]
    rows = run_step(ImportanceResampling(target=("set9",), rate=0.95), shards, [0, 0, 1, 9])
    kept = [sum(row["reason"] is None for row in rows[start:stop]) for start, stop in ((0, 40), (40, 80), (80, 90))]
    assert kept == [38, 38, 10]
    rows = run_step(ImportanceResampling(target=("set9",), rate=0.5, level="corpus"), shards, [0, 0, 1, 9])
    assert sum(row["reason"] is None for row in rows[:40]) == 0 and all(row["reason"] is None for row in rows[40:])


def test_buckets_do_not_depend_on_neighbours():
    alone = sha256_buckets("Hello, world", 100)
    assert len(alone) == 5 and alone == sha256_buckets("hello, WORLD", 100)
    step = ImportanceResampling(target=("x",))
    batch = word_hashes(pl.Series(["other text", "hello world"]))
    offsets, values = hashed_buckets(batch, step.buckets)
    single = hashed_buckets(word_hashes(pl.Series(["hello world"])), step.buckets)[1]
    assert values[offsets[1]:].tolist() == single.tolist()


def test_what_cannot_be_selected(tmp_path):
    raw, _ = corpus(4)
    with pytest.raises(DataError, match="target 'nothing' is no dataset of this mixture and no file"):
        run_step(ImportanceResampling(target=("nothing",)), [raw])
    with pytest.raises(DataError, match="not one word"):
        run_step(ImportanceResampling(target=("set1",)), [raw, [Doc("t", "...")]], [0, 1])
    for step, message in ((ImportanceResampling(), "target: names nothing"),
                          (ImportanceResampling(target=("a",), rate=0.0), "rate: 0.0 is not in"),
                          (ImportanceResampling(target=("a",), buckets=70_000), "buckets: 70000 is not in")):
        with pytest.raises(FieldError, match=message):
            step.check("x")


def test_resources_name_the_target_files(tmp_path):
    path = tmp_path / "target.jsonl"
    path.write_text('{"text": "a"}\n')
    step = ImportanceResampling(target=(str(path), "set1"))
    before = step.resources()
    assert set(before) == {"words", str(path)}
    path.write_text('{"text": "b"}\n')
    assert step.resources() != before


# draws

def test_draws_are_fixed_and_even():
    ids = [f"set/{number}" for number in range(20_000)]
    one = draws(ids, 0, "x")
    assert (one == draws(ids[::-1], 0, "x")[::-1]).all()
    assert not (one == draws(ids, 1, "x")).any() and not (one == draws(ids, 0, "y")).any()
    assert np.histogram(one, 10, (0, 1))[0] == pytest.approx(np.full(10, 2000), rel=0.1)
    assert keep_by_rate(np.full(20_000, 0.3), one).mean() == pytest.approx(0.3, abs=0.02)


def test_gumbel_draws_in_proportion():
    """The first drawn is document d with probability w_d / sum w."""
    log_weights = np.log([1.0, 2.0, 5.0])
    uniform = draws([f"{n}/{d}" for n in range(4000) for d in range(3)], 0, "t").reshape(4000, 3)
    first = gumbel_keys(log_weights, uniform).argmax(axis=1)
    assert np.bincount(first) / 4000 == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)


def test_top_takes_the_first_of_equals():
    assert top(np.array([1.0, 3, 3, 2, 3]), 2).tolist() == [False, True, True, False, False]
    assert top(np.array([1.0]), 0).tolist() == [False]


def test_sha256_mode_names_its_package(monkeypatch):
    dsir._splitter.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "regex", None)
    with pytest.raises(DataError, match=r"needs the package regex.*nanollama\[curate\]"):
        sha256_buckets("a", 10)
    dsir._splitter.cache_clear()
