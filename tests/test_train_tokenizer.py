"""Training a tokenizer: the same bytes twice, exact round trips, frozen once made."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from corpora import jsonl, mixture

from data_pipeline import tokenizer_report
from data_pipeline.corpus import build_corpus
from data_pipeline.corpus_format import read_manifest
from data_pipeline.documents import hash_fraction, text_digest
from data_pipeline.progress import Progress
from data_pipeline.sources.python_code import stdlib_files
from data_pipeline.tokenizer import TokenizerConfig, build_tokenizer, chunks, sample_rates, sampled_rows
from nanollama.data.files import DataError
from nanollama.data.tokenizer import Tokenizer

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
    assert Tokenizer.load(output).sha256 == first.sha256
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
    for config, words in [(TokenizerConfig(vocab_size=100), "270 or more"),
                          (TokenizerConfig(algorithm="wordpiece"), "unigram"),
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
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: self._processor.decode(ids).replace("\r", ""))
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
    half = {"code": 0.5, "odd": 1.0}
    names = [row["id"] for row in sampled_rows(corpus, manifest, half, 0)]
    everything = list(sampled_rows(corpus, manifest, {"code": 1.0, "odd": 1.0}, 0))
    assert names == [row["id"] for row in everything if row["source"] == "odd"
                     or hash_fraction(text_digest(row["text"].encode()), 0, "tokenizer") < 0.5]
    sampled, all_code = (sum(name.startswith("code/") for name in some)
                         for some in (names, [row["id"] for row in everything]))
    assert 5 < sampled < all_code - 5
    assert names != [row["id"] for row in sampled_rows(corpus, manifest, half, 1)]


def test_an_error_while_reading_comes_through_the_trainer(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    shard = copy / "shards" / "part-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"import", b"export", 1))
    with pytest.raises(DataError, match="changed since it was made"):
        build_tokenizer(copy, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out" / "manifest.json").exists()
