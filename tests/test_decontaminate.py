"""Decontamination: planted items are found, unrelated text is not, a missing set is never clean."""

import gzip
import itertools
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from corpus_steps import Doc, run_step

from data_pipeline.decontaminate import index as index_module
from data_pipeline.decontaminate.evaluation_sets import EvaluationSet, Item, choose, find, load_list, read_items
from data_pipeline.decontaminate.index import Grams, Index, bag_jaccard
from data_pipeline.decontaminate.step import Decontamination
from data_pipeline.text.words import slow_words, word_hashes
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

SHARED = Path(os.environ.get("NANOLLAMA_DATA", Path(__file__).parents[2] / "shared" / "data"))
# few frequent words and many rare ones, as in real text
WORDS = [f"w{number}" for number in range(3000)]
FREQUENCY = [1 / (rank + 3) for rank in range(3000)]


def sentence(dice, length):
    return dice.choices(WORDS, FREQUENCY, k=length)


def changed(dice, words, places):
    return [f"new{dice.randrange(10**9)}" if place in places else word for place, word in enumerate(words)]


def planted(dice, words, around=400):
    return " ".join([*sentence(dice, around), *words, *sentence(dice, around)])


def make_list(tmp_path, sets, **fields):
    """A list of evaluation sets and their files: {name: items}."""
    lines = ["sets:"]
    for name, items in sets.items():
        if items is not None:
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        lines.append(f"  - {{name: {name}, path: '{tmp_path}/{name}.jsonl', fields: [{fields.get(name, 'question')}]}}")
    path = tmp_path / "benchmarks.yaml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def items():
    dice = random.Random(1)
    return [sentence(dice, dice.randrange(13, 90)) for _ in range(500)]


@pytest.fixture(scope="module")
def index(items):
    return Index([Item(f"set/{number}", "question", " ".join(words)) for number, words in enumerate(items)], 13, 6, 0.8)


def found(index, texts):
    """For every document, the items found in it."""
    rows = [set() for _ in texts]
    for hit in index.search(word_hashes(pl.Series(texts))):
        rows[hit.row].add((hit.kind, int(index.items[hit.text][0][0].partition("/")[2])))
    return rows


def test_verbatim_items_are_all_found(index, items):
    dice = random.Random(2)
    rows = found(index, [planted(dice, words) for words in items])
    assert all(("exact", number) in row for number, row in enumerate(rows))


def test_one_word_in_twenty_changed_anywhere(index, items):
    """Rounded up, at places drawn by chance: every item is still found; the 13-grams alone would lose some."""
    dice = random.Random(3)
    texts, survives = [], []
    for words in items:
        places = set(dice.sample(range(len(words)), math.ceil(len(words) / 20)))
        edges = sorted([-1, *places, len(words)])
        survives.append(max(after - before - 1 for before, after in itertools.pairwise(edges)) >= 13)
        texts.append(planted(dice, changed(dice, words, places)))
    rows = found(index, texts)
    assert all(number in {item for _, item in row} for number, row in enumerate(rows))
    kinds = [next(kind for kind, item in row if item == number) for number, row in enumerate(rows)]
    assert kinds == ["exact" if long_run else "near" for long_run in survives]
    assert 0.6 < np.mean(survives) < 0.99  # what the exact index alone finds


def test_the_worst_places_for_the_changes():
    """Changes spread evenly leave the shortest runs: found for every length, and not found with longer seeds."""
    dice = random.Random(4)
    texts = {length: sentence(dice, length) for length in range(13, 121)}
    for seed, all_found in ((6, True), (9, False)):
        built = Index([Item(f"set/{n}", "q", " ".join(words)) for n, words in texts.items()], 13, seed, 0.8)
        misses = []
        for length, words in texts.items():
            count = math.ceil(length / 20)
            places = {round((place + 1) * (length + 1) / (count + 1)) - 1 for place in range(count)}
            row = found(built, [planted(dice, changed(dice, words, places), 50)])[0]
            misses += [] if length in {item for _, item in row} else [length]
        assert (not misses) == all_found, misses


def test_one_word_put_in_or_left_out(index, items):
    dice = random.Random(5)
    texts = []
    for words in items[:200]:
        place = dice.randrange(1, len(words))
        texts.append(planted(dice, [*words[:place], *(["extra"] if dice.random() < 0.5 else []), *words[place + 1:]]))
    rows = found(index, texts)
    assert all(number in {item for _, item in row} for number, row in enumerate(rows))


def test_unrelated_text_has_no_hit(index):
    dice = random.Random(6)
    assert not any(found(index, [" ".join(sentence(dice, 2000)) for _ in range(300)]))


def test_common_words_in_a_row_condemn_nothing(index, items):
    """Twelve words of an item, or half of a long one's seeds scattered: no 13-gram, no like window."""
    dice = random.Random(7)
    long = [words for words in items if len(words) > 40]
    assert not any(found(index, [planted(dice, ["(start)", *words[:12], "(end)"]) for words in long]))
    scattered = [changed(dice, words, {place for place in range(len(words)) if place % 14 >= 7}) for words in long]
    assert not any(found(index, [planted(dice, words) for words in scattered]))


def test_six_shared_words_need_a_like_window():
    """An item of 18 words may differ in two and keep one seed: the window decides."""
    dice = random.Random(12)
    words = sentence(dice, 18)
    built = Index([Item("set/0", "question", " ".join(words))], 13, 6, 0.8)
    for same in (6, 7, 10, 12):
        assert not any(found(built, [planted(dice, changed(dice, words, set(range(same, 18))))])), same
    assert found(built, [planted(dice, changed(dice, words, {5, 12}))]) == [{("near", 0)}]
    assert not any(found(built, [planted(dice, changed(dice, words, {5, 12, 13}))]))


def test_hits_say_where_and_what(index, items):
    dice = random.Random(8)
    words = next(words for words in items if len(words) > 60)
    number = items.index(words)
    text = " ".join([*sentence(dice, 30), *words[:20], *sentence(dice, 10), *words[30:50], *sentence(dice, 30)])
    hits = [hit for hit in index.search(word_hashes(pl.Series(["", text]))) if hit.text == number]
    assert [(hit.row, hit.position, hit.words) for hit in hits] == [(1, 30, 20), (1, 60, 20)]
    assert [hit.shown for hit in hits] == [" ".join(words[:20]), " ".join(words[30:50])]
    window = slow_words(text)[30:30 + len(words)]
    made = word_hashes(pl.Series([" ".join(words), " ".join(window)]))
    assert hits[0].jaccard == pytest.approx(bag_jaccard(made.document(0), made.document(1)))
    assert hits[0].jaccard >= 40 / (2 * len(words) - 40)


def test_bag_jaccard_counts():
    made = word_hashes(pl.Series(["a a b c", "a b b d", ""]))
    assert bag_jaccard(made.document(0), made.document(1)) == 2 / 6
    assert bag_jaccard(made.document(0), made.document(2)) == 0
    assert bag_jaccard(made.document(2), made.document(2)) == 0


def test_grams_are_a_set(monkeypatch):
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1 << 63, 5000).astype(np.uint64)
    grams = Grams(np.append(keys, keys[:9]), np.arange(5009, dtype=np.int32), np.zeros(5009, np.int32))
    asked = np.append(rng.integers(0, 1 << 63, 5000).astype(np.uint64), keys[::-1])
    at, key = grams.find(asked)
    assert at.tolist() == list(range(5000, 10000))
    assert (grams.keys[key] == asked[at]).all()
    position, text, _ = grams.places(at[-1:], key[-1:])
    assert position.tolist() == [9999, 9999] and text.tolist() == [0, 5000]
    monkeypatch.setattr(index_module, "_LISTED", 1)
    assert grams.places(at[-1:], key[-1:])[1].tolist() == [0]
    assert [len(part) for part in Grams(keys[:0], np.zeros(0, np.int32), np.zeros(0, np.int32)).find(asked)] == [0, 0]


def test_items_of_one_template_are_told_apart(monkeypatch):
    """Two hundred items that begin alike: the one that is there is found, with changes, and its siblings are not."""
    monkeypatch.setattr(index_module, "_LISTED", 20)
    dice = random.Random(13)
    opening = sentence(dice, 30)
    texts = [[*opening, *sentence(dice, 15)] for _ in range(200)]
    built = Index([Item(f"set/{n}", "q", " ".join(words)) for n, words in enumerate(texts)], 13, 6, 0.8)
    near = changed(dice, texts[150], {9, 21, 33})
    assert ("near", 150) in found(built, [planted(dice, near)])[0]
    assert not any(found(built, [planted(dice, changed(dice, opening, {9, 21}))]))


def test_equal_items_are_all_named():
    text = " ".join(WORDS[:20])
    built = Index([Item("a/1", "q", text), Item("b/7", "p", text.upper()), Item("b/8", "p", "too short")], 13, 6, 0.8)
    (hit,) = built.search(word_hashes(pl.Series([text])))
    assert built.items[hit.text] == [("a/1", "q"), ("b/7", "p")]
    assert built.too_short[0] == [("b/8", "p")]
    assert built.items.per_set() == {"a": 1, "b": 1} and built.too_short.per_set() == {"b": 1}


def test_an_index_from_files_finds_the_same(tmp_path, items):
    texts = [Item(f"set/{number}", "question", " ".join(words)) for number, words in enumerate(items)]
    made = Index([*texts, Item("set/x", "q", "short")], 13, 6, 0.8)
    for _ in range(2):  # the second writer leaves the first one's files
        made.save(tmp_path / "index")
    opened = Index.load(tmp_path / "index", 13, 6, 0.8)
    dice = random.Random(4)
    documents = pl.Series([planted(dice, changed(dice, words, {len(words) // 2})) for words in items[:40]])
    hits = list(made.search(word_hashes(documents)))
    assert list(opened.search(word_hashes(documents))) == hits and len({hit.kind for hit in hits}) == 2
    assert [opened.items[n] for n in range(len(opened))] == [made.items[n] for n in range(len(made))]
    assert opened.too_short[0] == [("set/x", "q")]
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_prepared_step_reads_no_evaluation_set_again(tmp_path):
    path = make_list(tmp_path, {"quiz": [{"question": " ".join(WORDS[:20])}]})
    step, docs = Decontamination(benchmarks=path, seed=5), [[Doc("a", " ".join(WORDS[:20])), Doc("b", "other words")]]
    step.prepare(tmp_path / "index")
    before = step.summary()
    for file in tmp_path.glob("quiz*"):
        file.write_text("[]")
    step.prepare(tmp_path / "index")
    assert [row["reason"] for row in run_step(step, docs)] == ["contaminated by quiz", None]
    assert step.summary()["sets"]["quiz"]["texts"] == before["sets"]["quiz"]["texts"] == 1


# the step

def test_step_lists_every_hit_and_says_why(tmp_path, items):
    dice = random.Random(9)
    text = [" ".join(words) for words in items[:4]]
    sets = {"quiz": [{"question": text[0]}, {"question": text[1]}], "exam": [{"question": text[2]}]}
    path = make_list(tmp_path, sets)
    step = Decontamination(benchmarks=path)
    near = changed(dice, items[2], {len(items[2]) // 2}) if len(items[2]) < 26 else items[2]
    guid = "-".join(["01234567", "89ab", "cdef", "0123", "456789abcdef"])
    docs = [Doc("clean", planted(dice, [])), Doc("one", planted(dice, items[0])), Doc("two", planted(dice, near)),
            Doc("both", planted(dice, [*items[1], *items[2]])), Doc("canary", f"x Canary GUID {guid} y"), Doc("", "")]
    rows = run_step(step, [docs[:2], docs[2:]], cut=3)
    assert [row["reason"] for row in rows] == [
        None, "contaminated by quiz", "contaminated by exam", "contaminated by quiz", "canary string", None]
    assert [[(hit["set"], hit["items"]) for hit in row["hits"] or []] for row in rows] == [
        [], [("quiz", ["quiz/0"])], [("exam", ["exam/0"])], [("quiz", ["quiz/1"]), ("exam", ["exam/0"])],
        [(None, [])], []]
    assert rows[1]["hits"][0]["text"] == " ".join(items[0][:40]) and rows[1]["hits"][0]["field"] == "question"
    assert rows[4]["hits"][0]["text"] == f"Canary GUID {guid}"
    assert step.summary()["sets"]["quiz"]["texts"] == 2
    assert set(step.resources()) == {"words", "quiz", "exam"}


def test_a_quotation_can_be_let_pass(tmp_path):
    long = WORDS[:100]
    path = make_list(tmp_path, {"quiz": [{"question": " ".join(long)}]})
    docs = [Doc("quotes", " ".join(["x", *long[:20], "y"])), Doc("holds", " ".join(["x", *long, "y"]))]
    strict = run_step(Decontamination(benchmarks=path), [docs])
    assert [row["reason"] is None for row in strict] == [False, False]
    mild = run_step(Decontamination(benchmarks=path, drop="window"), [docs])
    assert [row["reason"] is None for row in mild] == [True, False]
    assert [len(row["hits"]) for row in mild] == [1, 1]


def test_own_canaries(tmp_path):
    path = make_list(tmp_path, {"quiz": [{"question": " ".join(WORDS[:20])}]})
    step = Decontamination(benchmarks=path, canaries=("do-not-train (7)",))
    rows = run_step(step, [[Doc("a", "we said do-not-train (7) here"), Doc("b", "do-not-train 7")]])
    assert [row["reason"] for row in rows] == ["canary string", None]
    assert rows[0]["hits"][0]["text"] == "do-not-train (7)"


def test_missing_sets(tmp_path, monkeypatch):
    """Stop, or go on and say so; never clean, and never with nothing to compare with."""
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    path = make_list(tmp_path, {"quiz": [{"question": " ".join(WORDS[:20])}, {"question": "short"}], "gone": None})
    Path(path).write_text(Path(path).read_text() +
                          "  - {name: unset, path: '${NO_SUCH_FOLDER}/x.jsonl', fields: [question]}\n")
    doc = [[Doc("a", " ".join(WORDS[:20]))]]
    with pytest.raises(DataError, match=r"2 of 3 evaluation sets are missing: gone \(no file .*unset \(the env"):
        run_step(Decontamination(benchmarks=path), doc)
    step = Decontamination(benchmarks=path, missing="record")
    assert run_step(step, doc)[0]["reason"] == "contaminated by quiz"
    sets = step.summary()["sets"]
    assert sets["quiz"]["status"] == "used" and sets["quiz"]["texts"] == 1 and sets["quiz"]["too_short"] == 1
    assert sets["gone"]["status"] == sets["unset"]["status"] == "missing"
    assert "NO_SUCH_FOLDER" in sets["unset"]["reason"]
    assert step.resources()["gone"] == "missing" != step.resources()["quiz"]
    with pytest.raises(DataError, match="1 of 1 evaluation sets are missing"):
        run_step(Decontamination(benchmarks=path, sets=("gone",), missing="record"), doc)


def test_wrong_parameters_and_names(tmp_path):
    with pytest.raises(FieldError, match=r"x.seed: 14 is not in 1 to ngram \(13\)"):
        Decontamination(seed=14).check("x")
    with pytest.raises(FieldError, match=r"x.threshold: 1.5 is not in"):
        Decontamination(threshold=1.5).check("x")
    with pytest.raises(DataError, match=r"no evaluation set is called 'gsm9k'. Did you mean 'gsm8k'"):
        choose(("gsm9k",))


# reading sets

@pytest.mark.parametrize("text, message", [
    ("sets:\n  - {name: a, path: x, fields: [q]}\n  - {name: a, path: y, fields: [q]}\n", r":3: sets\[1\].name: 'a'"),
    ("sets:\n  - {name: a, path: x, fields: []}\n", r":2: sets\[0\].fields: is empty"),
    ("sets:\n  - name: a\n    path: x\n    field: [q]\n", r":4: sets\[0\].field: no such field. Did you mean 'f"),
])
def test_a_list_is_strict(tmp_path, text, message):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_list(path)


def test_a_list_that_changes_is_read_again(tmp_path):
    path = tmp_path / "list.yaml"
    for name in ("a", "b"):  # of one length, within the clock's grain
        path.write_text(f"sets:\n  - {{name: {name}, path: x, fields: [q]}}\n")
        assert list(load_list(path)) == [name]


def read(tmp_path, content, name="set.json", **fields):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return [(item.id, item.field, item.text) for item in read_items(find(EvaluationSet("s", str(path), **fields)))]


def test_layouts_of_sets(tmp_path):
    rows = [("s/0", "q", "a\u2028b"), ("s/0", "c", "x\ny"), ("s/1", "q", "z"), ("s/1", "c", "1")]
    lines = '{"q": "a\u2028b", "c": ["x", "y"]}\n\n{"q": "z", "c": [1]}\n'
    assert read(tmp_path, lines, fields=("q", "c")) == rows
    assert read(tmp_path, lines, "set.jsonl.gz", fields=("q", "c")) == rows
    whole = json.dumps({"data": [{"p": [{"q": "a"}, {"q": "b"}]}, {"p": [{"q": "c", "w": None}]}]}, indent=1)
    assert [row[2] for row in read(tmp_path, whole, items="data.p", fields=("q",))] == ["a", "b", "c"]
    assert read(tmp_path, json.dumps({"t": [[{"role": "user", "content": "hi"}]]}), fields=("t.content",)) == [
        ("s/0", "t.content", "hi")]


def test_a_set_read_as_empty_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none of its 1 items has text in the field 'answer'"):
        read(tmp_path, '{"q": "a"}\n', fields=("q", "answer"))
    with pytest.raises(DataError, match=r"set.json:2: not JSON"):
        read(tmp_path, '{"q": "a"}\n{"q": \n', fields=("q",))
    with pytest.raises(DataError, match=r"neither JSON Lines nor a JSON document"):
        read(tmp_path, "{\n oh\n", fields=("q",))


def test_the_projects_list_reads_real_sets(monkeypatch):
    if not (SHARED / "eval").is_dir():
        pytest.skip(f"no evaluation sets in {SHARED}")
    monkeypatch.setenv("NANOLLAMA_DATA", str(SHARED))
    sets = choose(("squad", "gsm8k", "bigbench", "tool-use"))
    counts = {one.name: sum(1 for _ in read_items(find(one))) for one in sets}
    assert counts["gsm8k"] == 2 * 1319 and min(counts.values()) > 2000
    assert all(find(one).status == "used" for one in choose(()))
