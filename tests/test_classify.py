"""Classifiers: they learn, score as their formula says, are stored without pickle, and are refused when changed."""

import itertools
import json
import math
import random
import sys

import numpy as np
import polars as pl
import pytest

from data_pipeline import classify
from data_pipeline.engine.stage import command
from data_pipeline.filters import classifier, make_batch, make_filter
from data_pipeline.filters.classifier import LABELS, Features
from data_pipeline.text.words import slow_ngram, slow_word_hash, slow_words
from nanollama.data.files import DataError

TOPICS = {
    "sports": "match team goal season coach league player cup ball stadium referee",
    "health": "doctor patient vaccine hospital disease treatment nurse blood symptom clinic",
    "finance": "market stock bank interest bond investor dividend currency loan profit",
    "science": "particle experiment theory cell energy galaxy molecule hypothesis telescope data",
}
COMMON = ["the", "of", "and", "to", "in", "a", "is", "was", "for", "on", "with", "that", "it", "by", "as", "at", "from"]


def topical(seed, number, topics=TOPICS):
    """Labelled texts: a fifth of the words tell the label."""
    pick = random.Random(seed)
    for index in range(number):
        label = list(topics)[index % len(topics)]
        words = [pick.choice(topics[label].split()) if pick.random() < 0.2 else pick.choice(COMMON) for _ in range(40)]
        yield " ".join(words) + f" {index}.", label


def write(path, rows, **names):
    fields = {"text": "text", "label": "label", **names}
    path.write_text("".join(json.dumps({fields["text"]: text, fields["label"]: label}) + "\n" for text, label in rows))
    return path


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    path = tmp_path_factory.mktemp("domain")
    made = classify.train("domain", [write(path / "a.jsonl", topical(1, 600))], path / "model")
    return path / "model", made


def test_it_learns(domain):
    directory, made = domain
    assert made["labels"] == sorted(TOPICS)
    assert made["measured"]["accuracy"] >= 0.95
    assert made["measured"]["texts"] == sum(map(sum, made["measured"]["table"]))
    assert 60 <= made["measured"]["texts"] <= 180
    texts, labels = zip(*topical(2, 100), strict=True)
    judgement = make_filter({"type": "domain", "model": str(directory)}, "x").judge(make_batch(texts))
    right = sum(a == b for a, b in zip(judgement.scores["domain"], labels, strict=True))
    assert right >= 95
    assert judgement.reasons.null_count() == 100


def test_scores_equal_the_formula(domain):
    """Features, weights and probabilities again, one word at a time."""
    model = classifier.load(domain[0])
    features = model.features
    texts = [text for text, _ in topical(3, 8)] + ["", "Naïve x² — 日本 don't", "one", "a a a a b " * 30]
    chances = model.probabilities(pl.Series(texts))
    for text, got in zip(texts, chances, strict=True):
        hashes = [slow_word_hash(word) for word in slow_words(text[:features.characters])]
        counts = {}
        for size in range(1, features.longest + 1):
            for start in range(len(hashes) - size + 1):
                gram = slow_ngram(hashes[start:start + size])
                bucket = gram >> 64 - features.bits
                counts[bucket] = counts.get(bucket, 0) + (-1 if gram & 1 else 1)
        values = {bucket: math.copysign(math.log1p(abs(count)), count) for bucket, count in counts.items() if count}
        length = math.sqrt(sum(value**2 for value in values.values())) or 1
        own = [1 / (1 + math.exp(-(bias + sum(value / length * float(model.weights[bucket, label])
                                              for bucket, value in values.items()))))
               for label, bias in enumerate(model.bias)]
        assert got == pytest.approx([one / sum(own) for one in own], abs=1e-6)
    alone = np.concatenate([model.probabilities(pl.Series([text])) for text in texts])
    assert np.allclose(alone, chances, atol=1e-12)


def test_domains_are_27_and_chosen_by_name(domain):
    directory, _ = domain
    assert len(LABELS["domain"]) == len(set(LABELS["domain"])) == 27
    texts = [text for text, _ in topical(4, 8)] + ["zzz"]
    scores = make_filter({"type": "domain", "model": str(directory), "min_score": 0.35},
                         "x").judge(make_batch(texts)).scores
    assert scores["domain"][8] == "unknown"
    kept = make_filter({"type": "domain", "model": str(directory), "keep": ["sports"]},
                       "x").judge(make_batch(texts)).reasons
    assert kept.to_list()[:4] == [None, "domain: health", "domain: finance", "domain: science"]
    dropped = make_filter({"type": "domain", "model": str(directory), "drop": ["sports"]},
                          "x").judge(make_batch(texts)).reasons
    assert dropped.to_list()[:4] == ["domain: sports", None, None, None]
    with pytest.raises(DataError, match=r"knows no games; it was trained for finance"):
        make_filter({"type": "domain", "model": str(directory), "keep": ["games"]}, "x").judge(make_batch(texts))
    with pytest.raises(ValueError, match="'sport' is not one of"):
        make_filter({"type": "domain", "model": str(directory), "keep": ["sport"]}, "x")
    with pytest.raises(ValueError, match="cannot stand beside keep"):
        make_filter({"type": "domain", "model": str(directory), "keep": ["sports"], "drop": ["health"]}, "x")


def test_quality_has_three_classes(tmp_path):
    words = {"low": "buy click cheap free win now deal offer",
             "medium": "shop town street weather dinner friend garden trip",
             "high": "therefore analysis evidence history argument method conclusion chapter"}
    path = write(tmp_path / "q.jsonl", topical(5, 450, words))
    classify.train("quality", [path], tmp_path / "model")
    texts, labels = zip(*topical(6, 60, words), strict=True)
    judgement = make_filter({"type": "quality", "model": str(tmp_path / "model")}, "x").judge(make_batch(texts))
    score, label = judgement.scores["quality_score"], judgement.scores["quality"]
    assert sum(a == b for a, b in zip(label, labels, strict=True)) >= 55
    assert set(judgement.reasons.to_list()) == {None, "quality: low"}
    means = [score.filter(label == name).mean() for name in ("low", "medium", "high")]
    assert means == sorted(means)
    assert score.is_between(0, 1).all()
    strict = make_filter({"type": "quality", "model": str(tmp_path / "model"), "min_score": 0.99},
                         "x").judge(make_batch(texts))
    assert "quality: score too low" in strict.reasons.to_list()
    with pytest.raises(DataError, match="is a classifier of quality"):
        make_filter({"type": "toxicity", "model": str(tmp_path / "model")}, "x").judge(make_batch(texts))


def test_toxicity_and_its_inverse(tmp_path):
    words = {"clean": "kind friend garden sunny walk bread river music",
             "toxic": "idiot moron scum vermin stupid trash loser filth"}
    path = write(tmp_path / "t.jsonl", topical(7, 300, words), label="class", text="tweet")
    made = classify.train("toxicity", [path], tmp_path / "model", text_field="tweet", label_field="class")
    assert made["measured"]["threshold"] == 0.975
    assert made["measured"]["precision"] == 1
    batch = make_batch([text for text, _ in topical(8, 40, words)])
    mapping = {"type": "toxicity", "model": str(tmp_path / "model")}
    normal, inverse = (make_filter({**mapping, "inverse": value}, "x").judge(batch) for value in (False, True))
    score = normal.scores["toxicity"].to_list()
    assert [reason is not None for reason in normal.reasons] == [value >= 0.975 for value in score]
    assert [reason is None for reason in inverse.reasons] == [value >= 0.975 for value in score]
    assert {*normal.reasons, *inverse.reasons} == {None, "toxicity: toxic", "toxicity: not toxic"}
    assert min(score) < 0.1
    all_of_them = make_filter({**mapping, "threshold": 0.0}, "x").judge(batch)
    assert all_of_them.reasons.null_count() == 0


def test_labels_inside_a_field_and_of_other_names(tmp_path):
    """Rows with topics that no label stands for are left out when one says so, and refused when not."""
    rows = [(text, label) for text, label in topical(3, 300)]
    path = tmp_path / "nested.jsonl"
    path.write_text("".join(json.dumps({"doc": {"text": text}, "metadata": {"topics": "money" if label == "finance" else
                                                                            "sports,health" if label == "health" else
                                                                            label}}) + "\n" for text, label in rows))
    fields = {"text_field": "doc.text", "label_field": "metadata.topics", "names": {"money": "finance"}}
    made = classify.train("domain", [path], tmp_path / "model", skip_others=True, **fields)
    assert made["texts"] == {label: sum(one == label for _, one in rows) for label in ("sports", "finance", "science")}
    with pytest.raises(DataError, match=r"'sports,health' is no label of domain.*--skip-others"):
        classify.train("domain", [path], tmp_path / "model", **fields)
    with pytest.raises(DataError, match=r"nested.jsonl:1: no field 'metadata.topic'. .*topics"):
        classify.train("domain", [path], tmp_path / "model", label_field="metadata.topic", text_field="doc.text")


def test_training_again_gives_the_same_model_without_pickle(domain, tmp_path):
    directory, made = domain
    again = classify.train("domain", [directory.parent / "a.jsonl"], tmp_path / "model")
    assert again["files"] == made["files"]
    assert again["id"] == made["id"]
    with np.load(directory / "weights.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.kind for name in arrays} == {"cells": "i", "values": "f", "bias": "f"}
    resources = make_filter({"type": "domain", "model": str(directory)}, "x").resources()
    assert list(resources) == ["domain classifier"]


def test_changed_weights_and_missing_models_are_refused(domain, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("classifier.json", "weights.npz"):
        (copy / name).write_bytes((domain[0] / name).read_bytes())
    item = make_filter({"type": "domain", "model": str(copy)}, "x")
    item.judge(make_batch(["a"]))
    classifier._load.cache_clear()
    data = bytearray((copy / "weights.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "weights.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"weights\.npz: missing or changed"):
        item.judge(make_batch(["a"]))
    with pytest.raises(DataError, match=r"no classifier .*classify train --kind=domain"):
        make_filter({"type": "domain", "model": str(tmp_path)}, "x").resources()


@pytest.mark.parametrize("lines, words", [
    ('{"text": "a", "label": "sports"}\n{"text": "b", "label": "sport"}\n', [":2", "'sport'", "'sports'", "--name="]),
    ('{"text": "a", "labels": "sports"}\n', [":1", "'label'", "'labels'"]),
    ('{"text": "a", "label": "sports"}\nno\n', [":2", "not JSON"]),
    ('{"text": "", "label": "sports"}\n', [":1", "empty text"]),
    ('{"text": "\\ud800", "label": "sports"}\n', [":1", "lone surrogate"]),
    ('{"text": "a", "label": "sports"}\n{"text": "a", "label": "health"}\n', [":2", "'sports'", "'health'"]),
    ('{"text": "a", "label": "sports"}\n', ["too few", "'sports'"]),
    ("", ["no labelled rows"]),
])
def test_wrong_rows_are_explained(tmp_path, lines, words):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(DataError) as caught:
        classify.train("domain", [tmp_path / "a.jsonl"], tmp_path / "model")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "model" / "classifier.json").exists()


def test_one_label_is_not_enough(tmp_path):
    path = write(tmp_path / "a.jsonl", [(f"text number {number}", "sports") for number in range(50)])
    with pytest.raises(DataError, match=r"only texts with the label 'sports'.*two labels"):
        classify.train("domain", [path], tmp_path / "model")


def test_features_are_short_rows_of_length_one():
    bounds, buckets, values = Features(bits=10).rows(pl.Series(["", "a b a", "c"]))
    assert bounds.tolist()[:2] == [0, 0]
    assert len(bounds) == 4
    assert buckets.max() < 1024
    assert [np.sum(values[a:b]**2) for a, b in itertools.pairwise(bounds)] == pytest.approx([0, 1, 1])
    assert len(Features().rows(pl.Series([], dtype=pl.String))[2]) == 0


def test_the_commands(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["classify", *map(str, arguments)])
        command(classify._main)
        return capsys.readouterr().out

    rows = [(text, {"sports": "Sports!", "health": "health"}[label]) for text, label in
            topical(9, 200, {name: TOPICS[name] for name in ("sports", "health")})]
    path, model = write(tmp_path / "a.jsonl", rows), tmp_path / "m"
    printed = run("train", "--kind=domain", f"--input={path}", f"--output={model}", "--name=Sports!=sports")
    assert "mean F1" in printed
    assert "domain from 200 texts" in printed
    run("predict", f"--model={model}", f"--input={path}", f"--output={tmp_path / 'out.jsonl'}")
    predicted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in predicted[:2]] == ["sports", "health"]
    assert sum(predicted[0]["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert "accuracy 1.000" in run("evaluate", f"--model={model}", f"--input={path}", "--name=Sports!=sports")
    with pytest.raises(SystemExit, match="1"):
        run("evaluate", f"--model={model}", f"--input={path}")
    assert "'Sports!' is no label of domain" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("train", f"--input={path}", f"--output={model}")
    assert "train needs --kind" in capsys.readouterr().err
