"""Explain: every decision about a document, from its id or from a row that training saw."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpora import documents, jsonl, mixture

from data_pipeline import explain
from data_pipeline.corpus import build_corpus
from data_pipeline.pack import build_packed
from data_pipeline.tokenizer import TokenizerConfig, build_tokenizer
from nanollama.config import DataConfig, PackedSetConfig
from nanollama.data.files import DataError, sha256_file, write_json
from nanollama.data.loader import Loader
from nanollama.data.mixture import open_mixture

ROWS = 4  # in a global batch


def long_text(number: int) -> str:
    return f"Document {number} tells of the number {number * number} and of little else. " * (2 + number % 3)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with every kind of fate, packed, and the folder of a run that read it."""
    room = tmp_path_factory.mktemp("explain")
    rows = [json.dumps({"text": long_text(n), "key": f"doc{n}", "date": f"2020-01-{n % 28 + 1:02d}"})
            for n in range(80)]
    rows[3] = '{"text": "short", "key": "doc3"}'
    rows[5] = json.dumps({"text": long_text(60), "key": "younger copy of 60", "date": "2022-05-01"})
    rows[7] = "no JSON at all"
    (room / "one.jsonl").write_text("\n".join(rows))
    (room / "two.jsonl").write_bytes(jsonl([long_text(60), long_text(900)]))
    config = mixture(room / "mix.yaml", {
        "name": "one", "source": str(room / "one.jsonl"), "id_field": "key", "licence": "CC0", "mix_ratio": 0.75,
        "filters": [{"type": "length", "min_characters": 20}, {"type": "length", "max_characters": 5000}]},
        {"name": "two", "source": str(room / "two.jsonl"), "mix_ratio": 0.25}, deduplication=[{"type": "exact"}])
    build_corpus(config, room / "corpus")
    build_tokenizer(room / "corpus", room / "tokenizer", TokenizerConfig(vocab_size=330))
    build_packed(room / "corpus", room / "tokenizer", room / "packed", record_length=64)
    write_json(room / "run" / "config.json", {
        "seed": 5, "steps": 20, "batch": {"global_rows": ROWS}, "data": dataclasses.asdict(data_of(room))})
    write_json(room / "run" / "lineage.json", {
        "sets": [{"manifest_sha256": sha256_file(room / "packed" / "manifest.json")}]})
    shutil.rmtree(room / "corpus" / ".cache")  # may be deleted: the decisions stay
    return room


def data_of(room: Path) -> DataConfig:
    return DataConfig((PackedSetConfig(str(room / "packed"), 1.0),), str(room / "tokenizer"), 64)


def verdicts(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [(stage["stage"], stage["verdict"]) for stage in told["stages"]]


def test_each_fate_is_told(room: Path) -> None:
    corpus = explain.Corpus(room / "corpus")
    kept = corpus.explain("one/doc60")
    assert verdicts(kept) == [("read", "kept"), ("length", "kept"), ("length", "kept"), ("unique-ids", "kept"),
                              ("exact", "kept")]
    assert kept["source"]["place"] == "one.jsonl:61" and kept["source"]["licence"] == "CC0" and kept["kept"]
    assert kept["source"]["input"]["sha256"] == sha256_file(room / "one.jsonl")
    assert kept["weight"] == {"dataset": 0.75} and kept["date"] == "2020-01-05"
    assert [(copy["doc_id"], copy["stage"]) for copy in kept["copies_dropped"]] == [
        ("one/younger copy of 60", "exact"), ("two/two.jsonl:1", "exact")]
    copy = corpus.explain("one/younger copy of 60")
    assert verdicts(copy)[-1] == ("exact", "dropped: exact duplicate")
    assert copy["stages"][-1]["facts"]["duplicate_of"] == "one/doc60" and "corpus" not in copy and not copy["kept"]
    short = corpus.explain("one/doc3")
    assert verdicts(short)[1:] == [("length", "dropped: shorter than 20 characters"), ("length", "not reached"),
                                   ("unique-ids", "not reached"), ("exact", "not reached")]
    broken = corpus.explain("one/one.jsonl:8")
    assert verdicts(broken)[0] == ("read", "dropped: broken JSON")
    assert "Expecting" in broken["stages"][0]["facts"]["detail"]


def test_the_line_and_the_packed_position_are_where_the_document_is(room: Path) -> None:
    corpus = explain.Corpus(room / "corpus")
    for row in documents(room / "corpus"):
        told = corpus.explain(row["id"])
        with open(room / "corpus" / told["corpus"]["path"], "rb") as file:
            line = file.read().split(b"\n")[told["corpus"]["line"] - 1]
        assert json.loads(line)["id"] == row["id"]
    at = explain.packed_position(room / "packed", "one/doc60")
    assert at is not None and at["split"] in ("train", "validation") and at["tokens"] > 20
    assert explain.packed_position(room / "packed", "one/doc3") is None
    for wrong, message in [("one/none", "no row of dataset one"), ("three/doc1", "no dataset of .* 'three'")]:
        with pytest.raises(DataError, match=message):
            corpus.explain(wrong)


def test_a_training_row_leads_to_the_texts_that_are_in_it(room: Path) -> None:
    data = open_mixture(data_of(room))
    texts = {row["id"]: row["text"] for row in documents(room / "corpus")}
    for step, row in [(0, 0), (0, 3), (17, 2)]:
        tokens = Loader(data, seed=5, global_batch=ROWS).batch(step).arrays["tokens"][row]
        told = explain.explain_row(room / "run", step, row)
        seen = data.tokenizer.decode(tokens.tolist())
        assert told and all(one["kept"] for one in told)
        for one in told:
            at = one["row"]
            part = data.tokenizer.decode(tokens[at["first_token"]:at["first_token"] + at["tokens_here"]].tolist())
            assert part and part in texts[one["doc_id"]] and part in seen
            assert one["packed"]["split"] == "train"
    for step, row in [(0, 4), (0, -1), (20, 0), (-1, 0)]:
        with pytest.raises(DataError, match="steps count from 0 to 19, rows from 0 to 3"):
            explain.explain_row(room / "run", step, row)


def test_what_was_found_of_an_evaluation_set_is_told_in_words() -> None:
    hit = {"kind": "exact", "set": "boolq", "items": ["boolq/7"], "field": "question", "position": 833, "words": 13,
           "jaccard": 0.5556, "text": "taken and brought it me"}
    assert explain._hit(hit) == ("exact: boolq/7 (question), 13 words from word 833 on, likeness 0.56: text taken and "
                                 "brought it me")
    assert explain._hit({**hit, "kind": "canary", "text": "canary GUID 1"}) == "canary: canary GUID 1"


def test_a_folder_that_is_no_run(room: Path) -> None:
    with pytest.raises(DataError, match="no training run's folder"):
        explain.explain_row(room / "corpus", 0, 0)


def test_the_command_and_folders_that_do_not_fit(room: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.explain"]
    ran = subprocess.run([*command, "one/doc60", f"--corpus={room / 'corpus'}", f"--packed={room / 'packed'}"],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for words in ("one.jsonl:61 of one", "licence CC0", "copy        two/two.jsonl:1 was dropped by exact",
                  "in corpus   shards/part-00000.jsonl, line", "packed      ", "weight      dataset 0.75"):
        assert words in ran.stdout, ran.stdout
    ran = subprocess.run([*command, "one/doc60"], capture_output=True, text=True)
    assert ran.returncode == 2 and "needs --corpus" in ran.stderr
    other = tmp_path / "room"
    shutil.copytree(room, other)
    config = json.loads((other / "run" / "config.json").read_text())
    config["data"]["sets"][0]["path"], config["data"]["tokenizer"] = str(other / "packed"), str(other / "tokenizer")
    write_json(other / "run" / "config.json", config)
    manifest = other / "corpus" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"CC0"', '"CC1"'))
    with pytest.raises(DataError, match="was packed from another corpus"):
        explain.explain_row(other / "run", 0, 0)
    (other / "corpus" / "decisions" / "index.json").write_text("{}")
    with pytest.raises(DataError, match="is not the one of this corpus"):
        explain.Corpus(other / "corpus")
    write_json(other / "run" / "lineage.json", {"sets": [{"manifest_sha256": "0" * 64}]})
    with pytest.raises(DataError, match="is not the packed set that"):
        explain.explain_row(other / "run", 0, 0)
