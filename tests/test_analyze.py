"""The analysis of a corpus: figures that agree with a count by hand, and a page that only shows."""

import csv
import html.parser
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import documents, mixture

from data_pipeline.analysis import analysis_page
from data_pipeline.analysis.estimate import Inputs, estimate, formulas
from data_pipeline.analysis.facts import Lengths, analyze
from data_pipeline.analyze import write_analysis
from data_pipeline.corpus import build_corpus
from data_pipeline.pack import build_packed, pack_datasets
from data_pipeline.text.documents import language_of
from data_pipeline.tokenizer import TokenizerConfig, build_tokenizer
from nanollama.data.files import DataError

HOSTILE = '</style><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7*7 }} & "\'` שלום'


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two datasets with languages, duplicates and short rows, a tokenizer and packed sets."""
    directory = tmp_path_factory.mktemp("analyze")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls", "on"]
    rng = np.random.default_rng(0)
    one = [{"text": " ".join(rng.choice(words, size=int(rng.integers(5, 300)))), "lang": "en" if n % 4 else "de"}
           for n in range(200)]
    two = [{"text": " ".join(rng.choice(words, size=40))} for _ in range(50)]
    for name, rows in (("one", [*one, *one[:10], {"text": "no"}]), ("two", two)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = mixture(
        directory / "mix.yaml",
        {"name": "one", "source": str(directory / "one.jsonl"), "mix_ratio": 0.25, "estimated_tokens": 1000,
         "filters": [{"type": "length", "min_characters": 10}, {"type": "exact_duplicate"}]},
        {"name": "two", "source": str(directory / "two.jsonl"), "mix_ratio": 0.75, "sampling": {"rate": 0.5}},
        metadata={"phase": HOSTILE, "description": HOSTILE, "total_tokens": 100_000})
    build_corpus(config, directory / "corpus")
    build_tokenizer(directory / "corpus", directory / "tokenizer", TokenizerConfig(vocab_size=300))
    build_packed(directory / "corpus", directory / "tokenizer", directory / "whole", record_length=64)
    pack_datasets(directory / "corpus", directory / "tokenizer", directory / "sets", record_length=64)
    return directory


def test_the_figures_are_those_of_a_count_by_hand(room: Path) -> None:
    found = analyze(room / "corpus")
    one, two = found.datasets
    rows = documents(room / "corpus")
    texts = [row["text"] for row in rows if row["source"] == "one"]
    assert (one.rows_in, one.kept, one.wanted) == (211, 200, 211)
    assert sorted((item["reason"], item["rows"], item["wished"]) for item in one.yields) == [
        ("exact duplicate", 10, False), ("shorter than 10 characters", 1, False)]
    assert [(item["reason"], item["wished"]) for item in two.yields] == [("not sampled", True)]
    assert two.wanted == two.kept == len(rows) - 200
    assert one.languages == {"en": 150, "de": 50} and two.languages == {"not known": two.kept}
    assert one.characters == sum(map(len, texts)) and one.lengths.longest == max(map(len, texts))
    assert one.lengths.mean == pytest.approx(np.mean([len(text) for text in texts]))
    assert found.share(one, "bytes") == pytest.approx(one.bytes / (one.bytes + two.bytes))
    assert not one.measured and one.tokens == one.bytes / 4
    assert one.expected_tokens == 25_000 and one.epochs == pytest.approx(25_000 / one.tokens)


def test_tokens_are_counted_where_the_corpus_is_packed(room: Path) -> None:
    whole, sets = (analyze(room / "corpus", room / name) for name in ("whole", "sets"))
    for one, other in zip(whole.datasets, sets.datasets, strict=True):
        assert one.measured and one.tokens == other.tokens == one.token_lengths.sums.sum()
        assert one.token_lengths.documents == one.kept
        assert np.array_equal(one.token_lengths.counts, other.token_lengths.counts)


def test_a_dataset_of_which_nothing_is_left_makes_no_estimate_of_the_rest(room: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({"text": f"the fox {n}"}) + "\n" for n in range(50)))
    (tmp_path / "gone.jsonl").write_text(json.dumps({"text": "the lazy dog"}) + "\n")
    config = mixture(tmp_path / "mix.yaml", {"name": "kept", "source": str(tmp_path / "kept.jsonl")},
                     {"name": "gone", "source": str(tmp_path / "gone.jsonl"), "max_bytes": 5, "cap_order": "head"})
    done = subprocess.run([sys.executable, "-m", "data_pipeline.corpus", f"--config={config}",
                           f"--output={tmp_path / 'corpus'}"], capture_output=True, text=True, check=True)
    assert "note: nothing is left of gone, which has 50.0% of the weights" in done.stderr
    pack_datasets(tmp_path / "corpus", room / "tokenizer", tmp_path / "sets", record_length=64)
    found = analyze(tmp_path / "corpus", tmp_path / "sets")
    kept, gone = found.datasets
    assert kept.measured and gone.measured and not gone.tokens
    write_analysis(found, Inputs(tokens=1e8, parameters=1e9), tmp_path / "out")
    assert "counted in the packed set" in (tmp_path / "out" / "analysis.html").read_text()


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_percentiles_are_within_a_bin_of_numpys(spread: float) -> None:
    lengths = np.maximum(1, np.random.default_rng(1).lognormal(6, spread, 20_000).astype(np.int64))
    found = Lengths("characters")
    for part in np.array_split(lengths, 7):
        found.add(part)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        want = np.quantile(lengths, share, method="inverted_cdf")
        assert want / 1.0906 <= found.percentile(share) <= want * 1.0906  # 2 ** (1 / 8)
    octaves = found.octaves()
    assert sum(row[2] for row in octaves) == 20_000 and sum(row[3] for row in octaves) == lengths.sum()
    assert all(low * 2**0.5 == pytest.approx(high) for low, high, _, _ in octaves)
    assert Lengths("characters").octaves() == [] and Lengths("characters").percentile(0.5) == 0


def test_the_language_filter_goes_before_the_source() -> None:
    assert language_of({"lang": "en", "attributes": {"language": "fr"}}) == "fr"
    assert language_of({"lang": "", "language": "it"}) == "it"
    assert language_of({"lang": 5, "attributes": None}) == "not known"


class Page(html.parser.HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def test_the_files_and_the_page(room: Path, tmp_path: Path) -> None:
    found = analyze(room / "corpus", room / "whole")
    facts = write_analysis(found, Inputs(tokens=100_000, parameters=1e6, price=2.0), tmp_path)
    assert json.loads((tmp_path / "analysis.json").read_text()) == facts
    with open(tmp_path / "mixture.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], float(row["weight"]), int(row["tokens"])) for row in rows] == [
        (one.name, one.weight, one.tokens) for one in found.datasets]
    with open(tmp_path / "yield.csv", newline="") as file:
        assert sum(int(row["rows"]) for row in csv.DictReader(file)) == sum(
            one.rows_in - one.kept for one in found.datasets)
    with open(tmp_path / "lengths.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["unit"] for row in rows} == {"characters", "tokens"}
    assert sum(int(row["documents"]) for row in rows) == 2 * sum(one.kept for one in found.datasets)
    assert (tmp_path / "languages.csv").read_text().startswith("dataset,language,documents\none,en,150\none,de,50\n")

    text = (tmp_path / "analysis.html").read_text()
    page = Page(text)
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "img", "iframe", "link", "object", "form", "base", "a"}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in page.elements for name in attrs)
    assert HOSTILE in page.text
    policy = next(attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv"))
    assert policy and "default-src 'none'" in policy and "url(" not in text
    for words in ("counted in the packed set", "25.0%", "exact duplicate", "de", "NVIDIA H100",
                  "tokens in a document"):
        assert words in page.text
    assert 'aria-label="Lengths of documents in tokens' in text
    assert any(attrs.get("class") == "wished" for _, attrs in page.elements)


def test_a_page_of_an_empty_corpus_has_no_drawing() -> None:
    assert analysis_page.histogram(Lengths("tokens")) is None


def test_the_reasons_that_are_lumped_together_are_the_rare_ones() -> None:
    dropped = [{"stage": "s", "reason": f"r{number}", "rows": rows, "wished": False}
               for number, rows in enumerate([1, 5, 1, *range(10, 20), 900, 3])]
    facts = {"datasets": [{"name": "a", "rows_in": 2000, "documents": 940, "dropped": [
        *dropped, {"stage": "dsir", "reason": "chosen", "rows": 2, "wished": True}]}]}
    reasons = analysis_page._yields(facts)[0]["reasons"]
    assert [(item["reason"], item["rows"]) for item in reasons] == [
        ("r1", 5), *((f"r{number}", rows) for number, rows in enumerate(range(10, 20), 3)), ("r13", 900),
        ("3 rarer reasons", 5), ("chosen", 2)]


def test_long_names_break_at_their_joints_and_stay_escaped() -> None:
    assert analysis_page._breakable("news_us-<b>_") == "news_<wbr>us-<wbr>&lt;b&gt;_"


def test_an_estimate_by_hand() -> None:
    # Llama 2 7B: 6 x 6.74e9 x 2e12 tokens is 8.1e22 FLOPs; 184,320 A100 hours were reported (arXiv:2307.09288)
    inputs = Inputs(tokens=2e12, parameters=6.74e9, accelerator="a100", count=1000, mfu=0.4, price=1.5, pue=1.1,
                    carbon_intensity=0.5)
    result = estimate(inputs)
    assert result.flops == pytest.approx(8.088e22)
    assert result.device_hours == pytest.approx(8.088e22 / (312e12 * 0.4) / 3600)
    assert 0.9 < result.device_hours / 184_320 < 1.1
    assert result.seconds * 1000 / 3600 == pytest.approx(result.device_hours)
    assert result.kwh == pytest.approx(result.device_hours * 0.4 * 1.1)
    assert result.money == pytest.approx(result.device_hours * 1.5)
    assert result.carbon_kg == pytest.approx(result.device_hours * 0.4 * 1.1 * 0.5)
    with_attention = estimate(Inputs(tokens=1, parameters=1e9, layers=10, width=100, sequence_length=1000))
    assert with_attention.flops == 6e9 + 6e6
    text = dict(formulas(inputs))
    assert text["FLOPs a token"] == "6 x 6.74e+09 parameters = 4.044e+10" and "x 0.4 MFU" in text["Seconds"]
    small = dict(formulas(Inputs(tokens=8e7, parameters=1.1e9, accelerator="h100", count=8, mfu=0.4, price=2.5)))
    assert small["Device hours"].endswith("x 8 = 0.371") and small["Money"] == "0.371 h x 2.5 = 0.927"
    assert estimate(Inputs(tokens=1, parameters=1, accelerator="tpu-v5p")).carbon_kg is None
    assert estimate(Inputs(tokens=1, parameters=1, accelerator="tpu-v5p", watts=300)).carbon_kg is not None


@pytest.mark.parametrize(("change", "words"), [
    ({"accelerator": "h10"}, "--accelerator=h10: Did you mean"), ({"mfu": 40.0}, "share of the peak"),
    ({"count": 0}, "--count=0"), ({"pue": 0.5}, "--pue=0.5"), ({"price": -1.0}, "--price=-1.0"),
    ({"parameters": float("nan")}, "--parameters=nan"), ({"price": float("nan")}, "--price=nan"),
    ({"tokens": float("inf")}, "--tokens=inf")])
def test_inputs_that_cannot_be_meant(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        estimate(Inputs(**{"tokens": 1e9, "parameters": 1e9, **change}))


def test_command_line_and_a_packed_set_of_another_corpus(room: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.analyze", f"--corpus={room / 'corpus'}",
               f"--output={tmp_path / 'out'}"]
    ran = subprocess.run([*command, "--accelerator=a100", "--count=2", "--price=1"], capture_output=True, text=True,
                         timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "Money:" in ran.stdout and (tmp_path / "out" / "analysis.html").is_file()
    (tmp_path / "other").mkdir()
    ran = subprocess.run([*command, f"--packed={tmp_path / 'other'}"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and "no packed set there" in ran.stderr and "Traceback" not in ran.stderr
    manifest = json.loads((room / "whole" / "manifest.json").read_text())
    manifest["corpus"]["manifest_sha256"] = "0" * 64
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="packed from another corpus"):
        analyze(room / "corpus", tmp_path / "other")
