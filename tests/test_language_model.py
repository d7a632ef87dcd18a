"""The n-gram model: probabilities that sum to one, equal to a slow twin and to KenLM; noise is refused."""

import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import corpora
import kenlm
import numpy as np
import polars as pl
import pytest

from data_pipeline import language_model
from data_pipeline.corpus import build_corpus
from data_pipeline.filters import kneser_ney, make_batch, make_filter, ngram
from nanollama.data.files import DataError


def documents(seed, number, words=12):
    """Sentences of a small vocabulary in which some words follow others often."""
    pick = random.Random(seed)
    return [[f"w{min(int(pick.expovariate(0.4)), words - 1)}" if pick.random() < 0.6 else "of" for _ in
             range(pick.randint(1, 15))] for _ in range(number)]


def token_ids(texts):
    ids = {name: number for number, name in enumerate(kneser_ney.SPECIAL)}
    rows = [[0, *(ids.setdefault(word, len(ids)) for word in words), 1] for words in texts]
    return np.array([number for row in rows for number in row], np.int32), list(ids)


def twin(texts, order):
    """p(word | context) by the formulas, with dictionaries: Chen and Goodman 1998."""
    raw = [Counter() for _ in range(order + 1)]
    for words in texts:
        row = ("<s>", *words, "</s>")
        for n in range(1, order + 1):
            raw[n].update(row[i:i + n] for i in range(len(row) - n + 1))
    adjusted = [None] * (order + 1)
    for n in range(1, order + 1):
        if n == order:
            adjusted[n] = dict(raw[n])
        else:
            left = defaultdict(set)
            for gram in raw[n + 1]:
                left[gram[1:]].add(gram[0])
            adjusted[n] = {g: raw[n][g] if g[0] == "<s>" else len(left[g]) for g in raw[n]}
        adjusted[n] = {g: c for g, c in adjusted[n].items() if g[-1] != "<s>"}
    discounts = [None]
    for n in range(1, order + 1):
        t = Counter(adjusted[n].values())
        found = None
        if all(t[k] for k in (1, 2, 3)):
            y = t[1] / (t[1] + 2 * t[2])
            found = [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]
        ok = found and all(0 <= d <= k for k, d in enumerate(found, 1))
        discounts.append([0, *(found if ok else (0.5, 1.0, 1.5))])
    vocabulary = len({word for words in texts for word in words}) + 2  # and </s>, <unk>

    def probability(gram):
        n, context = len(gram), gram[:-1]
        if n == 0:
            return 1 / vocabulary
        after = {g: c for g, c in adjusted[n].items() if g[:-1] == context}
        lower = probability(gram[1:]) if n > 1 else 1 / vocabulary
        if not after:
            return lower
        total = sum(after.values())
        gamma = sum(discounts[n][min(c, 3)] for c in after.values()) / total
        own = after.get(gram, 0)
        return max(own - discounts[n][min(own, 3)], 0) / total + gamma * lower

    return probability


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    texts = documents(3, 400)
    tokens, names = token_ids(texts)
    path = tmp_path_factory.mktemp("lm") / "model.arpa"
    kneser_ney.write_arpa(path, kneser_ney.train(tokens, len(names), 3), names)
    return texts, names, ngram.load_arpa(path)


def kenlm_probability(model, gram):
    """KenLM's p(last word | the others), from any state."""
    state = kenlm.State()
    if gram[0] == "<s>":
        model.BeginSentenceWrite(state)
    else:
        model.NullContextWrite(state)
    for word in gram[1 if gram[0] == "<s>" else 0:-1]:
        after = kenlm.State()
        model.BaseScore(state, word, after)
        state = after
    return 10**model.BaseScore(state, gram[-1], kenlm.State())


def test_probabilities_equal_the_slow_twin(trained):
    texts, _, model = trained
    slow = twin(texts, 3)
    rows = [("<s>", *words, "</s>") for words in texts[:40]]
    grams = {row[max(0, i - 2):i + 1] for row in rows for i in range(1, len(row))}
    grams |= {("w1", "never", "of"), ("never", "of", "w2"), ("w3", "w9", "<unk>"), ("of", "<unk>"), ("w11", "w11",
                                                                                                     "w11")}
    for gram in grams:
        assert kenlm_probability(model, gram) == pytest.approx(slow(gram), rel=2e-5), gram


@pytest.mark.parametrize("name", ["documents(5, 60)", "documents(1, 3)"])  # the second is too small for discounts
def test_every_ngram_has_the_values_of_lmplz(tmp_path, name):
    wanted = json.loads((Path(__file__).parent / "golden" / "lmplz.json").read_text())[name]
    tokens, names = token_ids(documents(*map(int, name.removeprefix("documents(").rstrip(")").split(", "))))
    kneser_ney.write_arpa(tmp_path / "model.arpa", kneser_ney.train(tokens, len(names), 3), names)
    found = {}
    for line in (tmp_path / "model.arpa").read_text().split("\n"):
        probability, _, rest = line.partition("\t")
        if rest:
            gram, _, backoff = rest.partition("\t")
            found[gram] = [float(probability), float(backoff or 0)]
    assert found.keys() == wanted.keys()
    for gram, values in wanted.items():
        probability = found[gram][0] if gram != "<s>" else values[0]  # never asked for; lmplz writes 0
        assert [probability, found[gram][1]] == pytest.approx(values, abs=1e-6), gram


def test_probabilities_sum_to_one(trained):
    _, names, model = trained
    vocabulary = [name for name in names if name != "<s>"]
    contexts = [("<s>",), ("<s>", "of"), ("of", "w1"), ("w1", "never"), ("w9", "w9"), ("of",), ("never",)]
    for context in contexts:
        assert sum(kenlm_probability(model, (*context, word)) for word in vocabulary) == pytest.approx(1, abs=1e-5)


def test_discounts_of_few_counts_fall_back():
    assert kneser_ney.discounts(np.array([1, 1, 2])).tolist() == [0, 0.5, 1.0, 1.5]
    counts = np.repeat([1, 2, 3, 4], [100, 40, 20, 10])
    y = 100 / 180
    assert kneser_ney.discounts(counts) == pytest.approx([0, 1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.5])


PARTS = [("str", "pl", "m", "gr", "t", "w", "ch", "b"), ("a", "ee", "o", "ou", "i"),
         ("nd", "st", "p", "l", "ng", "m", "k", "r"), ("", "er", "ing", "ly", "tion", "able", "y", "dle", "ow", "ment")]
WORDS = random.Random(0).sample([f"{a}{b}{c}{d}" for a in PARTS[0] for b in PARTS[1] for c in PARTS[2]
                                 for d in PARTS[3]], 3000)


def prose(seed, number):
    """Texts of 200 words with a frequent few, long enough for a model that knows noise."""
    pick = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(WORDS))]
    return [". ".join(" ".join(pick.choices(WORDS, weights, k=12)) for _ in range(20)) + "." for _ in range(number)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    (path / "a.jsonl").write_bytes(corpora.jsonl(prose(1, 200)))
    build_corpus(corpora.mixture(path / "mix.yaml", {"name": "a", "source": str(path / "a.jsonl")}), path / "corpus")
    return path / "corpus"


@pytest.fixture(scope="module")
def model(corpus):
    language_model.build(corpus, corpus.parent / "model", trainer="python")
    return corpus.parent / "model"


def test_perplexity_equals_that_of_kenlm(model):
    texts = [*prose(2, 5), "Unknown WORDS, strand!", "", " \n", "\x1c \x00a\u2028b", "strand\nplap"]
    judged = make_filter({"type": "perplexity", "model": str(model)}, "x").judge(make_batch(texts))
    scorer = ngram.load_arpa(model / "model.arpa")
    for text, ours in zip(texts, judged.scores["perplexity"], strict=True):
        line = ngram.spelled(pl.Series([text]))[0]
        steps = list(scorer.full_scores(line))
        if not line:
            assert ours is None
            continue
        assert len(steps) == len(line.split(" ")) + 1
        assert ours == pytest.approx(10**(-sum(step[0] for step in steps) / len(steps)), rel=1e-5)
    assert judged.reasons[:5].null_count() == 5
    assert judged.reasons[6] == judged.reasons[7] == "perplexity: no words"
    assert judged.reasons[8] == "perplexity: too high"


def test_words_are_lower_case_and_signs_stand_alone():
    assert ngram.spelled(pl.Series(["Don't STOP_it… x²!"]))[0] == "don ' t stop_it … x² !"


def test_training_again_does_nothing_and_the_model_is_described(model, corpus, capsys):
    before = (model / "model.arpa").stat().st_mtime_ns
    made = language_model.build(corpus, model, trainer="python")
    assert "up to date" in capsys.readouterr().err
    assert (model / "model.arpa").stat().st_mtime_ns == before
    assert made["documents"] + made["measured"]["held_out_documents"] == 200
    measured = made["measured"]
    assert measured["held_out"]["50"] < measured["random_words"]
    assert measured["random_letters"] > 5000
    resources = make_filter({"type": "perplexity", "model": str(model)}, "x").resources()
    assert resources == {"language model": made["files"][0]["sha256"]}


def test_noise_that_would_pass_is_refused(model, tmp_path):
    """A model of very few words finds nothing unlikely; so does a threshold above what noise has."""
    (tmp_path / "a.jsonl").write_bytes(corpora.jsonl([f"yes no {number % 3}" for number in range(60)]))
    build_corpus(corpora.mixture(tmp_path / "mix.yaml", {"name": "a", "source": str(tmp_path / "a.jsonl")}),
                 tmp_path / "corpus")
    language_model.build(tmp_path / "corpus", tmp_path / "model", trainer="python")
    with pytest.raises(DataError, match=r"random letters have perplexity .* would keep noise"):
        make_filter({"type": "perplexity", "model": str(tmp_path / "model")}, "x").judge(make_batch(["yes"]))
    with pytest.raises(DataError, match="set max_perplexity below"):
        make_filter({"type": "perplexity", "model": str(model), "max_perplexity": 1e9}, "x").judge(make_batch(["a"]))


def test_errors_say_what_to_do(model, corpus, tmp_path):
    with pytest.raises(DataError, match=r"no language model there.*language_model train --corpus"):
        make_filter({"type": "perplexity", "model": str(tmp_path)}, "x").resources()
    with pytest.raises(DataError, match="KenLM reads models of order 2 to 6"):
        language_model.build(corpus, tmp_path / "m", order=1)
    with pytest.raises(ValueError, match=r"x\.model: is missing"):
        make_filter({"type": "perplexity"}, "x")
    with pytest.raises(ValueError, match="min_perplexity"):
        make_filter({"type": "perplexity", "model": str(model), "min_perplexity": 6000.0}, "x")


def test_lmplz_is_used_where_it_is(corpus, model, tmp_path, monkeypatch):
    """A stand-in for lmplz that writes down how it was called and gives the model made above."""
    program = tmp_path / "lmplz"
    program.write_text(f"""#!{sys.executable}
import json, shutil, sys
arguments = sys.argv[1:]
name = dict(zip(arguments, arguments[1:]))
lines = open(name["--text"], encoding="utf-8").read().split("\\n")
json.dump([arguments, len(lines) - 1, lines[0]], open({str(tmp_path / "called.json")!r}, "w"))
if name["-o"] == "2":
    sys.exit("no memory")
shutil.copy({str(model / "model.arpa")!r}, name["--arpa"])
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    made = language_model.build(corpus, tmp_path / "made")
    assert made["trainer"] == "lmplz"
    arguments, lines, first = json.loads((tmp_path / "called.json").read_text())
    assert arguments[:3] == ["-o", "3", "--discount_fallback"]
    assert lines == made["documents"]
    assert first == first.lower()
    assert " . " in first
    assert (tmp_path / "made" / "model.arpa").read_bytes() == (model / "model.arpa").read_bytes()
    with pytest.raises(DataError, match="lmplz stopped with code 1: no memory"):
        language_model.build(corpus, tmp_path / "other", order=2)


def test_the_command(corpus, tmp_path):
    ran = subprocess.run([sys.executable, "-m", "data_pipeline.language_model", "train", f"--corpus={corpus}",
                          f"--output={tmp_path / 'm'}", "--order=2", "--trainer=python", "--limit-mb=0.1"],
                         capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    assert "random letters:" in ran.stdout
    assert "order 2" in ran.stdout


