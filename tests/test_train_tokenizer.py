"""Training a tokenizer: the same bytes twice, exact round trips, frozen once made."""

import csv
import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpora import jsonl, mixture

from data_pipeline.corpus import build_corpus
from data_pipeline.curation.corpus_format import ShardWriter, read_manifest, read_shard
from data_pipeline.engine.progress import Progress
from data_pipeline.sources.python_code import stdlib_files
from data_pipeline.text.documents import hash_fraction, text_digest
from data_pipeline.tokenization import tokenizer_report
from data_pipeline.tokenization.sample import Sample, chunks, language_sizes, plan_sample, sample_rates
from data_pipeline.tokenizer import TokenizerConfig, build_tokenizer
from data_pipeline.tokenizer_compare import compare
from nanollama.data.files import DataError
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer

CONFIG = TokenizerConfig(vocab_size=800)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real Python code and odd characters, 400 kB."""
    directory = tmp_path_factory.mktemp("tokenizer_corpus")
    texts = [
        path.read_text(encoding="utf-8") for name, path in stdlib_files()
        if re.fullmatch(r"(json|asyncio)/\w+\.py", name)
    ]
    (directory / "code.jsonl").write_bytes(jsonl([text for text in texts if text.strip()]))
    (directory / "odd.jsonl").write_bytes(jsonl(list(tokenizer_report.PROBES.values())))
    config = mixture(directory / "mix.yaml", {"name": "code", "source": str(directory / "code.jsonl")},
                     {"name": "odd", "source": str(directory / "odd.jsonl")})
    build_corpus(config, directory / "corpus")
    return directory / "corpus"


@pytest.fixture(scope="module")
def made(corpus: Path) -> Tokenizer:
    return build_tokenizer(corpus, corpus.parent / "tokenizer", CONFIG)


def test_special_ids_settings_and_pieces(made: Tokenizer) -> None:
    assert (made.unk_id, made.bos_id, made.eos_id, made.pad_id, made.vocab_size) == (0, 1, 2, 3, 800)
    assert [made.piece(token) for token in range(4)] == ["<unk>", "<s>", "</s>", "<|pad|>"]
    pieces = {made.piece(token) for token in range(800)}
    assert {"▁▁▁▁", "▁▁▁▁▁▁▁▁", ":\n", "self", "def", "<0x0A>"
            } <= pieces  # indentation and line ends have their own
    assert not [piece
                for piece in pieces if re.search(r"[^\n]\n+[^\n]", piece)]  # no piece runs on over a line end
    assert not [piece for piece in pieces if re.search(r"\d\d", piece) and not piece.startswith("<0x")
                ]  # digits alone
    assert json.loads((made.directory / "manifest.json").read_text())["algorithm"] == "bpe"


def test_round_trip_is_exact(made: Tokenizer) -> None:
    rng = random.Random(0)
    texts = list(tokenizer_report.PROBES.values())
    alphabet = "ab \t\n\r\u2028\u2581\u00e9\u6f22\U0001f600<s>\x01"
    texts += ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(500)]
    for text in texts:
        assert made.decode(made.encode(text)) == text
        assert made.unk_id not in made.encode(text)


def test_training_again_gives_the_same_bytes(corpus: Path, made: Tokenizer, tmp_path: Path,
                                             capsys: Any) -> None:
    again = build_tokenizer(corpus, tmp_path / "again", CONFIG)
    for name in ("tokenizer.model", "manifest.json"):
        assert (again.directory / name).read_bytes() == (made.directory / name).read_bytes()
    before = (made.directory / "tokenizer.model").stat().st_mtime_ns
    build_tokenizer(corpus, made.directory, CONFIG)
    assert "nothing to do" in capsys.readouterr().err
    assert (made.directory / "tokenizer.model").stat().st_mtime_ns == before
    assert not (made.directory / ".work").exists()


def test_a_frozen_tokenizer_is_not_replaced_unasked(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "frozen"
    first = build_tokenizer(corpus, output, TokenizerConfig(vocab_size=500))
    with pytest.raises(DataError, match=rf"holds a frozen tokenizer \({first.sha256[:16]}\).*--replace"):
        build_tokenizer(corpus, output, TokenizerConfig(vocab_size=510))
    assert load_tokenizer(output).sha256 == first.sha256
    with pytest.raises(DataError, match="is there already and is no tokenizer's"):
        build_tokenizer(corpus, corpus, TokenizerConfig(vocab_size=500), replace=True)
    (output / "manifest.json").rename(tmp_path
                                      / "kept.json")  # a model without its manifest is no free place either
    with pytest.raises(DataError, match="another tokenizer is there"):
        build_tokenizer(corpus, output, TokenizerConfig(vocab_size=510))
    assert build_tokenizer(corpus, output, TokenizerConfig(vocab_size=500)).sha256 == first.sha256
    assert (tmp_path / "kept.json").read_bytes() == (output / "manifest.json").read_bytes()
    replaced = build_tokenizer(corpus, output, TokenizerConfig(vocab_size=510), replace=True)
    assert replaced.vocab_size == 510 and "510 pieces" in (output / "TOKENIZER_CARD.md").read_text()


def test_a_vocabulary_the_corpus_cannot_fill_names_the_largest(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(["one two three", "two three four five"] * 5))
    build_corpus(mixture(tmp_path / "mix.yaml", {"name": "set", "source": str(tmp_path / "rows.jsonl")}),
                 tmp_path / "corpus")
    with pytest.raises(DataError, match=r"--vocab-size=5000: .*The largest possible is (\d+)") as caught:
        build_tokenizer(tmp_path / "corpus", tmp_path / "out", TokenizerConfig(vocab_size=5000))
    largest = int(re.search(r"largest possible is (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert 270 < largest < 400
    biggest = build_tokenizer(tmp_path / "corpus", tmp_path / "out", TokenizerConfig(vocab_size=largest))
    assert biggest.vocab_size == largest
    assert (TokenizerConfig().vocab_size, TokenizerConfig().algorithm) == (32_000, "bpe")  # as the models want it
    for config, words in [(TokenizerConfig(vocab_size=100), "270 or more"),
                          (TokenizerConfig(algorithm="wordpiece"), "unigram"),
                          (TokenizerConfig(character_coverage=0.5), "character-coverage"),
                          (TokenizerConfig(sample_mb=0), "above 0")]:
        with pytest.raises(DataError, match=words):
            build_tokenizer(tmp_path / "corpus", tmp_path / "out", config)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(["".join(chr(0x4E00 + n) for n in range(600))] * 20))
    build_corpus(mixture(tmp_path / "mix.yaml", {"name": "set", "source": str(tmp_path / "rows.jsonl")}),
                 tmp_path / "corpus")
    with pytest.raises(DataError, match=r"too small for the characters.*smallest possible is 8\d\d"):
        build_tokenizer(tmp_path / "corpus", tmp_path / "other", TokenizerConfig(vocab_size=300))


def test_unigram_is_exact_and_deterministic_too(tmp_path: Path) -> None:
    texts = [
        path.read_text(encoding="utf-8") for name, path in stdlib_files()
        if re.fullmatch(r"json/\w+\.py", name)
    ]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(texts))
    build_corpus(mixture(tmp_path / "mix.yaml", {"name": "set", "source": str(tmp_path / "rows.jsonl")}),
                 tmp_path / "corpus")
    config = TokenizerConfig(vocab_size=400, algorithm="unigram")
    first, second = (build_tokenizer(tmp_path / "corpus", tmp_path / name, config) for name in ("a", "b"))
    assert first.sha256 == second.sha256
    assert all(first.decode(first.encode(text)) == text for text in texts)


def test_the_card_tells_what_was_measured(corpus: Path, made: Tokenizer) -> None:
    card = (made.directory / "TOKENIZER_CARD.md").read_text(encoding="utf-8")
    assert made.sha256 in card and "exact round trip" in card
    line = next(line for line in card.split("\n") if line.startswith("| code "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    texts = [
        json.loads(line)["text"]
        for line in (corpus / "shards" / "part-00000.jsonl").read_text().split("\n")[:-1]
    ]
    tokens = sum(len(made.encode(text)) for text in texts)
    assert cells[1] == str(len(texts))
    assert cells[2] == f"{sum(map(len, texts)) / tokens:.3f}" and float(cells[2]) > 2
    assert cells[4] == "0.000%" and cells[6] == "100.00%"


def test_an_inexact_tokenizer_is_refused(corpus: Path, made: Tokenizer, monkeypatch: Any) -> None:
    manifest, _ = read_manifest(corpus)
    monkeypatch.setattr(type(made), "decode", lambda self, ids: self._processor.decode(ids).replace("\r", ""))
    with pytest.raises(DataError, match="'carriage returns'"):
        tokenizer_report.measure(made, corpus, manifest, Progress("test"))


def test_chunks_lose_nothing_and_stay_short() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("ab é漢\n\n\u2028\r", k=rng.randrange(400)))
        parts = list(chunks(text, 64))
        assert "".join(parts) == text
        assert all(0 < len(part.encode()) <= 64 for part in parts)
        if all(len(line.encode()) < 60 for line in text.split("\n")):
            assert all(part.endswith("\n") for part in parts[:-1])  # cut at line ends only


def test_the_sample_follows_the_mixture_and_its_size(corpus: Path) -> None:
    rows = [{"name": "big", "bytes": 900, "mix_ratio": 0.5}, {"name": "small", "bytes": 10, "mix_ratio": 0.3},
            {"name": "mid", "bytes": 500, "mix_ratio": 0.2}, {"name": "none", "bytes": 0, "mix_ratio": 0.0}]
    rates = sample_rates({"datasets": rows}, 290)
    assert rates == {"big": pytest.approx(200 / 900), "small": 1.0, "mid": pytest.approx(80 / 500)}
    assert sample_rates({"datasets": rows}, 10_000) == {"big": 1.0, "small": 1.0, "mid": 1.0}
    manifest, _ = read_manifest(corpus)
    rows_read = list(read_shard(corpus, manifest["shards"][0]))
    half, whole = (Sample(0, {"code": rate, "odd": 1.0}, {}) for rate in (0.5, 1.0))
    drawn = [list(half.pieces(row, "code")) for row in rows_read]
    for row, some in zip(rows_read, drawn, strict=True):  # each piece by its own hash
        digest = text_digest(row["text"].encode())
        assert some == [piece for number, piece in enumerate(chunks(row["text"])) if
                        hash_fraction(digest + number.to_bytes(8, "big"), 0, "tokenizer") < 0.5]
        assert "".join(whole.pieces(row, "code")) == row["text"]
    share = sum(len(piece) for some in drawn for piece in some) / sum(len(row["text"]) for row in rows_read)
    assert 0.35 < share < 0.65
    assert drawn != [list(dataclasses.replace(half, seed=1).pieces(row, "code")) for row in rows_read]


def test_one_long_document_is_sampled_as_evenly_as_many() -> None:
    text = "".join(f"line {number} of a very long document\n" for number in range(20_000))
    pieces = list(Sample(3, {"set": 0.25}, {}).pieces({"text": text, "meta": {}}, "set"))
    assert 0.2 < sum(map(len, pieces)) / len(text) < 0.3
    assert all(piece in text for piece in pieces)


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of one large language and two small ones."""
    directory = tmp_path_factory.mktemp("languages")
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(words, k=400)) + "\n", "lang": name}
            for name, words, count in (("en", ["the", "quick", "brown", "fox"], 200), ("el", ["γράμμα", "λέξη"], 10),
                                       ("he", ["שלום", "עולם"], 5)) for _ in range(count)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build_corpus(mixture(directory / "mix.yaml", {"name": "set", "source": str(directory / "rows.jsonl")}),
                 directory / "corpus")
    return directory / "corpus"


def test_rare_languages_can_be_lifted(languages: Path) -> None:
    manifest, _ = read_manifest(languages)
    sizes = language_sizes(languages, manifest)["set"]
    assert set(sizes) == {"en", "el", "he"} and sum(sizes.values()) == manifest["datasets"][0]["bytes"]
    budget = manifest["datasets"][0]["bytes"] // 4
    as_they_come = plan_sample(languages, manifest, budget)
    assert as_they_come.language_rates == {} and as_they_come.rates["set"] == pytest.approx(0.25, rel=1e-3)
    lifted = plan_sample(languages, manifest, budget, language_alpha=0.3).language_rates["set"]
    assert lifted["he"] == 1 and 0.7 < lifted["el"] < 1 and lifted["en"] < 0.25
    taken = {name: rate * sizes[name] for name, rate in lifted.items()}
    assert sum(taken.values()) == pytest.approx(budget, rel=1e-3)
    some = plan_sample(languages, manifest, budget // 20, language_alpha=0.3).language_rates["set"]
    ratio = some["el"] * sizes["el"] / (some["en"] * sizes["en"])
    assert ratio == pytest.approx((sizes["el"] / sizes["en"]) ** 0.3)
    alike = plan_sample(languages, manifest, budget // 20, language_alpha=0.0).language_rates["set"]
    assert len({round(rate * sizes[name]) for name, rate in alike.items()}) == 1


def test_what_is_held_out_is_not_trained_on_and_all_that_is_measured(languages: Path, tmp_path: Path) -> None:
    made = build_tokenizer(languages, tmp_path / "out", TokenizerConfig(vocab_size=320, holdout=0.2,
                                                                        language_alpha=0.5))
    card = (made.directory / "TOKENIZER_CARD.md").read_text(encoding="utf-8")
    assert "held out of training (20%)" in card and "### By language" in card and "| el " in card
    sample = made.manifest["corpus"]["sample"]
    assert sample["holdout"] == 0.2 and set(sample["language_rates"]["set"]) == {"en", "el", "he"}
    manifest, _ = read_manifest(languages)
    rows_read = list(read_shard(languages, manifest["shards"][0]))
    plan = Sample(0, {"set": 1.0}, {}, 0.2)
    trained = [row for row in rows_read if list(plan.pieces(row, "set"))]
    report = tokenizer_report.measure(made, languages, manifest, Progress("test"), holdout=0.2)
    assert report.sources["set"].documents == len(rows_read) - len(trained) > 10
    assert sum(one.documents for one in report.languages.values()) == report.sources["set"].documents
    for config in (TokenizerConfig(holdout=1.0), TokenizerConfig(language_alpha=1.5)):
        with pytest.raises(DataError, match=r"holdout|language-alpha"):
            build_tokenizer(languages, tmp_path / "never", config)


def test_an_error_while_reading_comes_through_the_trainer(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    shard = copy / "shards" / "part-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"import", b"export", 1))
    with pytest.raises(DataError, match="changed since it was made"):
        build_tokenizer(copy, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_card_has_a_table_of_domains_where_a_filter_named_them(made: Tokenizer, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "part.jsonl") as writer:
        for number in range(30):
            domain = {"attributes": {"domain": ["law", "games"][number % 2]}} if number < 20 else {}
            writer.write(f"set/{number}", f"text {number} " * (1 + number % 2), "set", domain, None)
    manifest = {"datasets": [{"name": "set", "kept": 30, "bytes": 1000}],
                "shards": [{"path": "part.jsonl", "sha256": writer.sha256, "dataset": "set"}]}
    report = tokenizer_report.measure(made, tmp_path, manifest, Progress("test"))
    assert {name: one.documents for name, one in report.domains.items()} == {"law": 10, "games": 10}
    assert report.domains["games"].characters == sum(2 * len(f"text {number} ") for number in range(1, 20, 2))
    tables = tokenizer_report.further_tables(report)
    assert "By language" not in tables and tables.index("| games ") < tables.index("| law ")


def test_vocabularies_compared_on_what_none_has_seen(languages: Path, made: Tokenizer, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "data_pipeline.tokenizer_compare", f"--corpus={languages}", f"--output={tmp_path / 'c'}",
         "--vocab-sizes=295,308", "--algorithms=bpe,unigram", "--holdout=0.3", f"--tokenizer={made.directory}"],
        capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    with open(tmp_path / "c" / "comparison.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ["bpe-295", "bpe-308", "unigram-295", "unigram-308", made.directory.name]
    assert list(dict.fromkeys(row["tokenizer"] for row in rows)) == names
    assert {row["name"] for row in rows if row["by"] == "language"} == {"en", "el", "he"}
    for name in names:  # the same documents for all, each in one source and one language
        own = [row for row in rows if row["tokenizer"] == name]
        assert sum(int(row["bytes"]) for row in own if row["by"] == "source") == sum(
            int(row["bytes"]) for row in own if row["by"] == "language") == int(rows[0]["bytes"])
        assert all(row["exact"] == row["documents"] and row["unknown"] == "0" for row in own)
    tokens = {row["tokenizer"]: int(row["tokens"]) for row in rows if row["by"] == "source"}
    assert tokens["bpe-308"] < tokens["bpe-295"]  # more pieces, fewer tokens
    card = (tmp_path / "c" / "COMPARISON.md").read_text(encoding="utf-8")
    assert card == ran.stdout.rstrip("\n") + "\n" and "by language" in card
    facts = json.loads((tmp_path / "c" / "comparison.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in facts["tokenizers"]] == names
    with pytest.raises(DataError, match="nothing to compare"):
        compare(languages, tmp_path / "d", [])
    with pytest.raises(DataError, match="same seed and holdout"):
        compare(languages, tmp_path / "d", [TokenizerConfig(), TokenizerConfig(seed=1)])
