"""Decontamination: planted items are found, unrelated text is not, a missing set is never clean."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from corpus_steps import Doc, run_step

from data_pipeline.decontaminate import grams as grams_module
from data_pipeline.decontaminate.evaluation_sets import Item, choose
from data_pipeline.decontaminate.grams import Grams
from data_pipeline.decontaminate.index import Index, bag_jaccard
from data_pipeline.decontaminate.step import Decontamination
from data_pipeline.text.words import slow_words, word_hashes
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

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


def test_numbers_in_a_row_condemn_nothing(tmp_path):
    """A problem that counts to twenty, one of few words besides numbers, and choices that are numbers only."""
    dice = random.Random(13)
    counting = [*sentence(dice, 15), *map(str, range(1, 21)), *sentence(dice, 15)]
    sums = ["find", "the", "value", "of", *map(str, range(16, 25))]
    numbers = [str(number % 5) for number in range(17)]
    asked = [Item("set/0", "question", " ".join(counting)), Item("set/1", "question", " ".join(sums)),
             Item("set/2", "question", " ".join(numbers))]
    Index(asked, 13, 6, 0.8).save(tmp_path / "index")
    for built in (Index(asked, 13, 6, 0.8), Index.load(tmp_path / "index", 13, 6, 0.8)):
        texts = [planted(dice, words) for words in (map(str, range(1, 21)), sums[1:], numbers,
                                                    changed(dice, sums, {2}))]
        assert not any(found(built, texts))
        assert found(built, [planted(dice, counting), planted(dice, sums)]) == [{("exact", 0)}, {("whole", 1)}]
        assert found(built, [planted(dice, counting[:28])]) == [{("exact", 0)}]  # 15 words and the numbers to 13
        few = planted(dice, counting[10:28])  # 5 words and these
        assert not any(found(built, [few]))
        assert built.too_short[0] == [("set/2", "question")]
    for wrong in (0, 1):  # as if every shared run counted
        mutant = type("Mutant", (Index,), {"_least": wrong})(asked, 13, 6, 0.8)
        assert any(found(mutant, texts))


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
    monkeypatch.setattr(grams_module, "_LISTED", 1)
    assert grams.places(at[-1:], key[-1:])[1].tolist() == [0]
    assert [len(part) for part in Grams(keys[:0], np.zeros(0, np.int32), np.zeros(0, np.int32)).find(asked)] == [0, 0]


def test_items_of_one_template_are_told_apart(monkeypatch):
    """Two hundred items that begin alike: the one that is there is found, with changes, and its siblings are not."""
    monkeypatch.setattr(grams_module, "_LISTED", 20)
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


def short_index(texts, whole=8):
    return Index([Item(f"set/{number}", "question", text) for number, text in enumerate(texts)], 13, 6, 0.8, whole)


def test_short_items_count_only_as_a_whole():
    """Items of 8 to 12 words: found to the last word, wherever they stand, and not with any one of them changed."""
    dice = random.Random(14)
    words = [sentence(dice, 8 + number % 5) for number in range(60)]
    built = short_index([" ".join(one) for one in words])
    texts = [planted(dice, one, 20 * (number % 3)) for number, one in enumerate(words)]  # some have nothing around
    hits = list(built.search(word_hashes(pl.Series(texts))))
    assert [(hit.row, hit.kind, hit.position, hit.words, hit.jaccard) for hit in hits] == [
        (number, "whole", 20 * (number % 3), len(one), 1.0) for number, one in enumerate(words)]
    assert [hit.shown for hit in hits] == [" ".join(one) for one in words]
    for place in (0, 4, 7, -1):
        texts = [planted(dice, changed(dice, one, {place % len(one)})) for one in words]
        assert not any(found(built, texts)), place
    assert not any(found(built, [" ".join(one[:-1]) for one in words]))


def test_a_short_item_does_not_reach_into_the_next_document():
    ten = WORDS[:10]
    built = short_index([" ".join(ten)])
    assert not any(found(built, [" ".join(ten[:9]), ten[9], " ".join(ten[:8]), " ".join(ten[8:])]))
    (hit,) = built.search(word_hashes(pl.Series(["x", " ".join([*ten, *ten])])))  # named once, where it is first
    assert (hit.row, hit.position) == (1, 0)


def test_short_items_that_begin_alike_are_all_found():
    texts = [" ".join([*WORDS[:8], f"end{number}"]) for number in range(150)]
    assert found(short_index(texts), texts) == [{("whole", number)} for number in range(150)]


def test_what_is_too_short():
    """Numbers do not count; an item of short fields is looked for as one text; the rest is named."""
    items = [Item("a/0", "q", " ".join(WORDS[:8])), Item("a/1", "q", " ".join(WORDS[10:17])),
             Item("a/2", "q", "1,2 1,3 2,3 1,2,3"), Item("a/3", "q", "1 one 2 two 3 three 4 four"),
             Item("b/0", "q", " ".join(WORDS[20:25])), Item("b/0", "c", " ".join(WORDS[30:33])),
             Item("b/1", "q", " ".join(WORDS[40:45])), Item("b/1", "c", " ".join(WORDS[50:70])),
             Item("b/2", "q", " ".join(WORDS[80:88])), Item("b/2", "c", "few words"),
             Item("b/3", "q", "too"), Item("b/3", "c", "few"), Item("c/0", "q", "")]
    built = Index(items, 13, 6, 0.8)
    looked_for = [built.items[number] for number in range(len(built))]
    assert looked_for == [[("b/1", "c")], [("a/0", "q")], [("b/0", "q+c")], [("b/2", "q")]] and built.long == 1
    assert built.too_short[0] == [("a/1", "q"), ("a/2", "q"), ("a/3", "q"), ("b/1", "q"), ("b/2", "c"), ("b/3", "q"),
                                  ("b/3", "c"), ("c/0", "q")]
    assert built.unseen() == {"a": ["a/1", "a/2", "a/3"], "b": ["b/3"], "c": ["c/0"]}
    assert built.short().per_set() == {"a": 1, "b": 2}
    assert found(built, [" ".join([*WORDS[20:25], *WORDS[30:33]])]) == [{("whole", 0)}]
    none = Index(items, 13, 6, 0.8, whole=13)  # as before there were short ones
    assert len(none) == none.long == 1 and not list(none.search(word_hashes(pl.Series([items[0].text]))))
    assert len(Index(items, 13, 6, 0.8, whole=1)) == 11  # all but numbers and nothing


def test_an_index_from_files_finds_the_same(tmp_path, items):
    texts = [Item(f"set/{number}", "question", " ".join(words)) for number, words in enumerate(items)]
    texts += [Item(f"set/short{number}", "question", " ".join(words[:9])) for number, words in enumerate(items)]
    made = Index([*texts, Item("set/x", "q", "short")], 13, 6, 0.8)
    for _ in range(2):  # the second writer leaves the first one's files
        made.save(tmp_path / "index")
    opened = Index.load(tmp_path / "index", 13, 6, 0.8)
    dice = random.Random(4)
    documents = pl.Series([planted(dice, changed(dice, words, {len(words) // 2})) for words in items[:40]])
    hits = list(made.search(word_hashes(documents)))
    assert list(opened.search(word_hashes(documents))) == hits
    assert {hit.kind for hit in hits} == {"exact", "near", "whole"}
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
    assert sets["quiz"].pop("sha256") == step.resources()["quiz"]
    assert sets["quiz"] == {"status": "used", "texts": 1, "whole": 0, "too_short": 1, "unseen_items": 1,
                            "unseen": ["quiz/1"]}
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
    for whole in (0, 14):
        with pytest.raises(FieldError, match=rf"x.whole: {whole} is not in 1 to ngram \(13\)"):
            Decontamination(whole=whole).check("x")
    with pytest.raises(DataError, match=r"no evaluation set is called 'gsm9k'. Did you mean 'gsm8k'"):
        choose(("gsm9k",))
