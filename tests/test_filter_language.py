"""Language: labelled sentences, what part of a text is looked at, texts without letters."""

import builtins
import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.filters import language, make_batch, make_filter
from nanollama.data.files import DataError

SENTENCES = {
    "en": "The river was high after the rain, and nobody wanted to cross the old bridge before the morning.",
    "de": "Nach dem Regen stand der Fluss hoch, und niemand wollte vor dem Morgen über die alte Brücke gehen.",
    "fr": "Après la pluie, la rivière était haute et personne ne voulait traverser le vieux pont avant le matin.",
    "es": "Después de la lluvia el río estaba alto y nadie quería cruzar el viejo puente antes de la mañana.",
    "it": "Dopo la pioggia il fiume era alto e nessuno voleva attraversare il vecchio ponte prima del mattino.",
    "pt": "Depois da chuva o rio estava cheio e ninguém queria atravessar a velha ponte antes da manhã.",
    "nl": "Na de regen stond de rivier hoog en niemand wilde voor de ochtend over de oude brug gaan.",
    "pl": "Po deszczu rzeka była wysoka i nikt nie chciał przed rankiem przechodzić przez stary most.",
    "ru": "После дождя река поднялась, и никто не хотел переходить старый мост до утра.",
    "zh": "雨后河水很高，没有人愿意在早晨之前走过那座旧桥。",
    "ja": "雨のあと川の水が高くなり、朝になるまで誰も古い橋を渡ろうとしなかった。",
    "ko": "비가 온 뒤 강물이 불어나 아침이 되기 전에는 아무도 낡은 다리를 건너려 하지 않았다.",
    "ar": "بعد المطر ارتفع النهر ولم يرغب أحد في عبور الجسر القديم قبل الصباح.",
}


def judged(texts, **parameters):
    return make_filter({"type": "language", **parameters}, "x").judge(make_batch(texts))


def test_languages_of_sentences():
    judgement = judged(list(SENTENCES.values()))
    assert judgement.scores["language"].to_list() == list(SENTENCES)
    assert judgement.scores["language_score"].min() > 0.5
    assert judgement.scores["language_score"].max() <= 1
    assert judgement.reasons.null_count() == len(SENTENCES)  # nothing is asked, nothing is dropped


def test_reasons():
    texts = [SENTENCES["en"], SENTENCES["de"], SENTENCES["fr"], "", "12 34 !", "ok"]
    assert judged(texts, languages=["en", "fr"]).reasons.to_list()[:5] == [None, "language: not wanted", None,
                                                                           "language: not wanted",
                                                                           "language: not wanted"]
    assert judged([SENTENCES["en"]], languages=["en"], min_score=1.0).reasons[0] == "language: uncertain"


def test_head_and_middle_are_looked_at():
    samples = language.LanguageFilter.samples
    text = "0123456789" * 3
    assert samples(pl.Series([text + "abcdefghij" * 3]), 20) == ["0123456789 abcdefghij"]
    assert samples(pl.Series(["0123abc", "012345678\nabcde", "123"]), 20) == ["0123abc ", "012345678 abcde", ""]
    mostly_german = "Menu | Home | Search | Login\n" * 3 + SENTENCES["de"] * 40
    assert judged([mostly_german]).scores["language"][0] == "de"


def test_a_glance_is_enough_where_it_is_sure():
    french_tail = [(SENTENCES["en"] + " ") * 2 + (SENTENCES["fr"] + " ") * 30]
    sure = judged(french_tail, glance_characters=20, glance_score=0.1)  # "The river ..." and some French
    all_of_it = judged(french_tail)
    assert all_of_it.scores["language"].to_list() == ["fr"]
    assert sure.scores["language_score"][0] != all_of_it.scores["language_score"][0]
    for score in (0.99, 1.1):  # where the glance is not sure, the answer is that of the whole sample
        unsure = judged(french_tail, glance_score=score)
        assert unsure.scores["language_score"].to_list() == judged(
            french_tail, glance_characters=2000).scores["language_score"].to_list()


def test_ugly_texts_have_a_language_or_none():
    texts = ["\x00", "a\x00b", "\u2028", "x" * 100_000, "\n\n\n", "😀" * 3000, "\ufeff", "a\u2028b\x85c\rd",
             "e\u0301" * 2000]
    judgement = judged(texts, languages=["en"])
    assert judgement.reasons.null_count() < len(texts)
    for text, name, score in zip(texts, *judgement.scores.values(), strict=True):
        assert judged([text]).scores["language"][0] == name
        assert 0 <= score <= 1


def test_a_file_that_is_no_model_is_explained(tmp_path):
    (tmp_path / "no.bin").write_text("no model")
    with pytest.raises(DataError, match=r"filter language.model: .*no.bin is no fastText model"):
        judged(["a text"], model=str(tmp_path / "no.bin"))


def test_a_missing_package_or_model_is_explained(monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"language\.model: no file .*fastText model"):
        judged(["a"], model=str(tmp_path / "none.ftz"))
    assert len(make_filter({"type": "language"}, "x").resources()["language model"]) == 64
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "fasttext":
            raise ImportError(name)
        return real(name, *rest, **more)

    language._model.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"fasttext-predict.*nanollama\[curate\]"):
        judged(["a"])
    with pytest.raises(ValueError, match="'English' is no language code"):
        make_filter({"type": "language", "languages": ["English"]}, "x")


def test_the_declaration_of_human_rights():
    """49 languages of the declaration in the shared data, each in its own words."""
    place = next((parent / "shared" / "data" / "multilingual" / "udhr2.jsonl.gz" for parent in Path(__file__).parents
                  if (parent / "shared" / "data" / "multilingual").is_dir()), None)
    if place is None:
        pytest.skip("needs the shared data")
    codes = {"eng": "en", "fra": "fr", "spa": "es", "ita": "it", "rus": "ru", "ukr": "uk", "pol": "pl", "nld": "nl",
             "swe": "sv",
             "fin": "fi", "hun": "hu", "tur": "tr", "heb": "he", "arb": "ar", "hin": "hi", "ben": "bn", "tam": "ta",
             "tha": "th",
             "vie": "vi", "kor": "ko", "ces": "cs", "slk": "sk", "dan": "da", "bul": "bg", "cat": "ca", "kat": "ka",
             "hye": "hy",
             "isl": "is", "gle": "ga", "cym": "cy", "eus": "eu", "urd": "ur", "jpn": "ja"}
    with gzip.open(place, "rb") as file:
        rows = [json.loads(line) for line in file]
    known = [(row["text"], codes[row["lang"]]) for row in rows if row["lang"] in codes]
    assert len(known) >= 25
    assert judged([text for text, _ in known]).scores["language"].to_list() == [code for _, code in known]
