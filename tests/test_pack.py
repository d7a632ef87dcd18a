"""Packing: every token once, every document in one split, whatever happens on the way."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from corpora import documents, files_of, jsonl, mixture
from killing import kill_when

from data_pipeline.corpus import build_corpus
from data_pipeline.curation import corpus_format
from data_pipeline.pack import build_packed, pack_datasets
from data_pipeline.packing import files as packed_files
from data_pipeline.packing import records as pack_records
from data_pipeline.packing import tokens as pack_tokens
from data_pipeline.packing.bestfit import Piece, plan
from data_pipeline.sources.python_code import stdlib_files
from data_pipeline.tokenizer import TokenizerConfig, build_tokenizer
from nanollama.data.files import DataError
from nanollama.data.format import derive_row
from nanollama.data.packed import PackedSet, verify
from nanollama.data.tokenizer_folder import load_tokenizer

RECORD = 128


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of real code, prose and repeated texts in several shards, and a tokenizer."""
    directory = tmp_path_factory.mktemp("pack")
    rng = random.Random(0)
    texts = [path.read_text(encoding="utf-8") for name, path in stdlib_files()
             if name.startswith(("json/", "asyncio/", "urllib/"))]
    texts = [text for text in texts if text.strip()]
    lines = [line.strip() for text in texts for line in text.split("\n") if len(line.strip()) > 20]
    short = [" ".join(rng.sample(lines, rng.randrange(1, 4))) for _ in range(1500)]
    (directory / "code.jsonl").write_bytes(jsonl(texts))
    (directory / "short.jsonl").write_bytes(jsonl(short + short[:100] + texts[:3], year=2020))
    config = mixture(directory / "mix.yaml",
                     {"name": "code", "source": str(directory / "code.jsonl"), "mix_ratio": 0.75},
                     {"name": "short", "source": str(directory / "short.jsonl"), "mix_ratio": 0.25})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_format, "SHARD_BYTES", 300_000)
        build_corpus(config, directory / "corpus")
    build_tokenizer(directory / "corpus", directory / "tokenizer", TokenizerConfig(vocab_size=2000))
    return directory


def pack(room: Path, output: Path, **changes: Any) -> dict[str, Any]:
    settings = {"record_length": RECORD, "validation_fraction": 0.1, "seed": 0, **changes}
    return build_packed(room / "corpus", room / "tokenizer", output, **settings)


@pytest.fixture(scope="module")
def packed(room: Path) -> Path:
    pack(room, room / "packed")
    return room / "packed"


def texts_of(packed: Path, room: Path) -> dict[str, list[tuple[str, str, str]]]:
    """{split: [(doc_id, source, text)]} read back from the records, by the tokenizer and docs.parquet."""
    tokenizer = load_tokenizer(room / "tokenizer")
    opened = PackedSet(packed)
    rows = pyarrow.parquet.read_table(packed / "docs.parquet").to_pylist()
    found = {}
    for split in ("train", "validation"):
        pieces: dict[int, list[int]] = {}
        records = opened.split(split)
        for number in range(len(records)):
            record = records.record(number)
            ends = [*record.starts[1:].tolist(), len(record.tokens)]
            for segment, (start, end, doc, source) in enumerate(
                    zip(record.starts.tolist(),
                        ends,
                        record.documents.tolist(),
                        record.sources.tolist(),
                        strict=True)):
                if doc not in pieces:
                    assert (rows[doc]["record"], rows[doc]["segment"]) == (number, segment)
                assert rows[doc]["split"] == split and rows[doc]["source"] == opened.sources[source]
                pieces.setdefault(doc, []).extend(record.tokens[start:end].tolist())
        found[split] = []
        for doc, tokens in sorted(pieces.items()):
            assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id and len(
                tokens) == rows[doc]["tokens"]
            found[split].append((rows[doc]["doc_id"], rows[doc]["source"], tokenizer.decode(tokens[1:-1])))
    return found


def test_the_records_hold_the_corpus_exactly(room: Path, packed: Path) -> None:
    found = texts_of(packed, room)
    wanted = [(row["id"], row["source"], row["text"]) for row in documents(room / "corpus")]
    assert sorted(found["train"] + found["validation"]) == sorted(wanted)
    manifest = verify(packed)  # the reader's own check
    for split in ("train", "validation"):
        assert manifest["splits"][split]["documents"] == len(found[split])
        assert manifest["splits"][split]["bytes_of_text"] == sum(
            len(text.encode()) for _, _, text in found[split])
        for source in ("code", "short"):
            mine = [text for _, name, text in found[split] if name == source]
            counts = manifest["source_counts"][split][source]
            assert (counts["documents"], counts["characters"]) == (len(mine), sum(map(len, mine)))
    slots = manifest["splits"]["train"]["records"] * RECORD
    assert manifest["splits"]["train"]["padding"] <= 0.001 * slots
    assert manifest["weights"] == {"code": 0.75, "short": 0.25}
    assert all(row["kept"] == row["rows_in"] for row in manifest["rows"].values())
    rows = pyarrow.parquet.read_table(packed / "docs.parquet").to_pylist()
    assert [row["doc"] for row in rows] == list(range(len(wanted)))
    assert [row["doc_id"] for row in rows] == [row["id"] for row in documents(room / "corpus")]
    assert json.loads(rows[-1]["meta"]) == {"year": 2020}
    assert {(row["source"], row["date"]) for row in rows} == {("code", None), ("short", "2020")}
    assert "none is lost, none is\nrepeated" in (packed / "DATA_CARD.md").read_text()


def test_windows_go_through_all_parts_of_the_corpus() -> None:
    first = np.array([0, 1000, 1010, 1010, 3010])  # shards of 1000, 10, 0 and 2000 documents
    order = pack_records.interleaved(first)
    assert sorted(order.tolist()) == list(range(3010))
    for start, stop in pairwise(first):
        part = order[(order >= start) & (order < stop)]
        assert part.tolist() == list(range(start, stop))  # read in order
    assert 320 < (order[:1000] < 1000).sum() < 345 and 2 <= ((order[:1000] >= 1000) & (order[:1000] < 1010)).sum() <= 4
    many = np.arange(0, 10_001, 10)  # more shards than lanes
    assert sorted(pack_records.interleaved(many).tolist()) == list(range(10_000))
    assert list(pack_records.windows(np.full(25_000, 300), 128)) == [(0, 10_000), (10_000, 20_000), (20_000, 25_000)]


def check_splits(found: dict[str, list[tuple[str, str, str]]]) -> None:
    """A document, and a text, is in exactly one split; both splits have about their share."""
    ids = Counter(name for rows in found.values() for name, _, _ in rows)
    assert max(ids.values()) == 1
    assert not {text for _, _, text in found["train"]} & {text for _, _, text in found["validation"]}
    assert 0.05 < len(found["validation"]) / len(ids) < 0.15


def test_a_document_is_in_exactly_one_split(room: Path, packed: Path, tmp_path: Path,
                                            monkeypatch: Any) -> None:
    found = texts_of(packed, room)
    check_splits(found)
    assert Counter(text for rows in found.values()
                   for _, _, text in rows).most_common(1)[0][1] > 1  # repeats are there
    with pytest.raises(AssertionError):
        check_splits({**found, "validation": found["validation"] + found["train"][:1]})

    # mutant: the split decided by position instead of by text lets a repeated text into both
    calls = iter(range(1 << 30))
    with monkeypatch.context() as patch:
        patch.setattr(pack_tokens, "place", lambda *arguments: next(calls) % 10 / 10)
        pack(room, tmp_path / "mutant")
    with pytest.raises(AssertionError):
        check_splits(texts_of(tmp_path / "mutant", room))
    other = pack(room, tmp_path / "other", seed=1)
    assert {row[0] for row in texts_of(tmp_path / "other", room)["validation"]
            } != {row[0] for row in found["validation"]}
    assert other["dataset_id"] != PackedSet(packed).dataset_id


def test_derived_and_equal_texts_follow_the_held_out_one(tmp_path: Path) -> None:
    rng = random.Random(0)
    code = [f"def f{number}():\n    '''{rng.random()} docs'''\n" for number in range(300)]
    for number, text in enumerate(code):
        (tmp_path / f"m{number:03d}.py").write_text(text)
    prose = {"name": "prose", "source": str(tmp_path / "*.py"), "format": "docstrings"}
    copies = {"name": "copies", "source": str(tmp_path / "copies.jsonl")}
    (tmp_path / "copies.jsonl").write_bytes(
        jsonl([f"f{number}\n\n{text.split(chr(39) * 3)[1]}" for number, text in enumerate(code)]))
    build_corpus(mixture(tmp_path / "mix.yaml", {**prose, "name": "code", "format": "code"}, prose, copies),
                 tmp_path / "corpus")
    build_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer", TokenizerConfig(vocab_size=300))
    pack(tmp_path, tmp_path / "packed", validation_fraction=0.2)
    split = {
        row["doc_id"]: row["split"]
        for row in pyarrow.parquet.read_table(tmp_path / "packed" / "docs.parquet").to_pylist()
    }
    for number in range(300):
        name = f"m{number:03d}.py"
        assert split[f"code/{name}"] == split[
            f"prose/{name}"], name  # else held-out prose would be read in training
        assert split[f"prose/{name}"] == split[f"copies/copies.jsonl:{number + 1}"]


@pytest.mark.parametrize("mutant", ["loses", "repeats", "cuts", "changes", "mixes"])
def test_a_lost_or_changed_token_stops_the_packing(room: Path, tmp_path: Path, monkeypatch: Any,
                                                   mutant: str) -> None:
    def wrong(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
        records = plan(lengths, capacity)
        if mutant == "loses":
            return records[:-1]
        if mutant == "cuts":  # a document's end before its beginning
            return records[::-1]
        return [*records, records[-1]] if mutant == "repeats" else records

    original = packed_files.TokenStore.get
    calls = {"count": 0}

    def damaged(self: Any, recipe: Any) -> np.ndarray:
        tokens = original(self, recipe)
        calls["count"] += 1
        if calls["count"] == 1:  # while the file is written
            if mutant == "changes":
                tokens[40] += 1
            elif mutant == "mixes":
                tokens[40:50] = tokens[40:50][::-1].copy()
        return tokens

    monkeypatch.setattr(pack_records, "plan", wrong)
    monkeypatch.setattr(packed_files.TokenStore, "get", damaged)
    found = {"loses": "tokens in, .* planned", "repeats": "not the next", "cuts": "not the next",
             "changes": "their tokens are not", "mixes": "their tokens are not"}
    with pytest.raises(DataError, match=found[mutant]):
        pack(room, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_any_number_of_workers_and_a_second_run(room: Path, packed: Path, capsys: Any) -> None:
    pack(room, room / "two_workers", workers=2)
    assert files_of(room / "two_workers") == files_of(packed)
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir() if path.name != ".lock"}
    capsys.readouterr()
    pack(room, packed)
    assert "nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in packed.iterdir() if path.name != ".lock"}
    # the set's identity does not know where the corpus lies
    elsewhere = pack(room, room / "deep" / "er" / "packed")
    assert elsewhere["dataset_id"] == PackedSet(packed).dataset_id
    assert elsewhere["corpus"]["path"] != PackedSet(packed).manifest["corpus"]["path"]


def test_a_finished_file_is_not_written_again(room: Path, packed: Path, monkeypatch: Any) -> None:
    def stopped(task: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.pack.check_records", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(room, room / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(packed_files, "ArrayRecordWriter", None)
        pack(room, room / "stopped")
    assert files_of(room / "stopped") == files_of(packed)


@pytest.mark.parametrize(("most", "count"), [(4 * RECORD * 50, None), (1 << 40, pack_records.FILES)])
def test_records_are_the_same_in_several_files(room: Path, packed: Path, tmp_path: Path, monkeypatch: Any, most: int,
                                               count: int | None) -> None:
    monkeypatch.setattr(pack_records, "FILE_BYTES", (0, most))
    manifest = pack(room, tmp_path / "out")
    verify(tmp_path / "out")
    train = [row["records"] for row in manifest["files"] if row["split"] == "train"]
    assert count <= len(train) <= count + 1 if count else len(train) > 2 and set(train[:-1]) == {50}
    one, several = PackedSet(packed).split("train"), PackedSet(tmp_path / "out").split("train")
    assert len(one) == len(several)
    for number in range(0, len(one), 7):
        assert np.array_equal(one.record(number).tokens, several.record(number).tokens)


def test_a_set_for_each_dataset_holds_what_the_whole_set_holds(room: Path, packed: Path, tmp_path: Path) -> None:
    made = pack_datasets(room / "corpus", room / "tokenizer", tmp_path, record_length=RECORD, validation_fraction=0.1,
                         seed=0)
    whole = PackedSet(packed)
    assert {name: manifest["sources"] for name, manifest in made.items()} == {"code": ["code"], "short": ["short"]}
    for name, manifest in made.items():
        assert manifest["weights"] == {name: whole.manifest["weights"][name]}
        for split in ("train", "validation"):  # also: a document is in the same split as in the whole set
            assert manifest["source_counts"][split][name] == whole.manifest["source_counts"][split][name]
        verify(tmp_path / name)
    one = pack_datasets(room / "corpus", room / "tokenizer", tmp_path, record_length=RECORD, validation_fraction=0.1,
                        seed=0)
    assert one == made  # nothing to do
    with pytest.raises(DataError, match=r"no dataset 'cod'.*'code'"):
        pack(room, tmp_path / "wrong", dataset="cod")


def test_a_long_document_is_one_segment_of_a_long_row(room: Path, packed: Path) -> None:
    rows = pyarrow.parquet.read_table(packed / "docs.parquet").to_pylist()
    split = PackedSet(packed).split("train")
    longest = max((row for row in rows if row["split"] == "train" and row["tokens"] < 12 * RECORD),
                  key=lambda row: row["tokens"])
    records = [split.record(number) for number in range(longest["record"], longest["record"] + 14)]
    row_T = derive_row(records,
                       sequence_length=14 * RECORD,
                       record_length=RECORD,
                       pad_id=3,
                       mask_documents=True)
    first = int(np.sum([len(record.tokens)
                        for record in records[:0]])) + int(records[0].starts[longest["segment"]])
    segment = row_T["segment_ids"][first]
    here = np.flatnonzero(row_T["segment_ids"] == segment)
    assert len(here) == longest["tokens"] > 8 * RECORD
    assert row_T["positions"][here].tolist() == list(range(longest["tokens"]))


def test_other_inputs_make_another_set_and_damage_is_named(room: Path, packed: Path, tmp_path: Path) -> None:
    for name in ("corpus", "tokenizer"):
        shutil.copytree(room / name, tmp_path / name)
    first = pack(tmp_path, tmp_path / "packed")
    assert pack(tmp_path, tmp_path / "packed", record_length=256)["record_length"] == 256  # remade in place
    assert sorted(path.name for path in (tmp_path / "packed").iterdir() if path.name[0] != ".") == sorted(
        path.name for path in packed.iterdir() if path.name[0] != ".")
    assert pack(tmp_path, tmp_path / "packed")["dataset_id"] == first["dataset_id"]
    file = tmp_path / "packed" / "train-00000.array_record"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert pack(tmp_path, tmp_path / "packed")["dataset_id"] == first["dataset_id"]
    verify(tmp_path / "packed")
    shard = tmp_path / "corpus" / "shards" / "part-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"import", b"export", 1))
    with pytest.raises(DataError, match="changed since it was made"):
        pack(tmp_path, tmp_path / "other")
    model = tmp_path / "tokenizer" / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(DataError, match="changed after it was frozen"):
        pack(tmp_path, tmp_path / "other")


def test_settings_that_cannot_work(room: Path, tmp_path: Path) -> None:
    for changes, words in [({"record_length": 4}, "8 to 65536"),
                           ({"validation_fraction": 1.5}, r"in \[0, 1\)"),
                           ({"workers": 0}, "--workers=0: give 1 or more"),
                           ({"validation_fraction": 0.99999999}, "all .* fall into the validation split")]:
        with pytest.raises(DataError, match=words):
            pack(room, tmp_path / "out", **changes)
    assert pack(room, tmp_path / "out", validation_fraction=0.0)["splits"]["validation"]["records"] == 0
    # a share of less than one document still holds one out
    assert pack(room, tmp_path / "out", validation_fraction=1e-9)["splits"]["validation"]["documents"] == 1
    with pytest.raises(DataError, match="no finished corpus"):
        build_packed(tmp_path, room / "tokenizer", tmp_path / "out", record_length=64)
    manifest = room / "corpus" / "manifest.json"
    before = manifest.read_bytes()
    with pytest.raises(DataError, match=f"{manifest}: is there already and was made by something else"):
        pack(room, room / "corpus")
    assert manifest.read_bytes() == before


def test_a_full_disk_leaves_the_earlier_set_untouched(room: Path, packed: Path, tmp_path: Path,
                                                      monkeypatch: Any) -> None:
    output = tmp_path / "packed"
    shutil.copytree(packed, output)
    before = files_of(output)
    for limit in (100_000, 250_000):  # while writing tokens; while ArrayRecord writes records
        script = (
            f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "from data_pipeline import pack; from data_pipeline.engine.stage import command\n"
            f"command(lambda: pack.build_packed({str(room / 'corpus')!r}, {str(room / 'tokenizer')!r},"
            f" {str(output)!r}, record_length=64, validation_fraction=0.1, seed=0))")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 1 and "the disk is full" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and "untouched" in done.stderr
        assert {name: data for name, data in files_of(output).items()
                if not name.startswith(".work")} == before
    usage = shutil.disk_usage(output)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(DataError, match=r"needs about .* GB, the disk has 0.00 GB free"):
            pack(room, output, record_length=64)
    assert pack(room, output, record_length=64)["record_length"] == 64  # goes on once there is space


@pytest.mark.parametrize("moment", ["tokens", "records"])
def test_kill_9_and_run_again_gives_the_same_bytes(room: Path, packed: Path, moment: str) -> None:
    output = room / f"killed_{moment}"
    command = [
        sys.executable, "-m", "data_pipeline.pack", f"--corpus={room / 'corpus'}",
        f"--tokenizer={room / 'tokenizer'}", f"--output={output}", f"--record-length={RECORD}",
        "--validation-fraction=0.1", "--seed=0", "--workers=1"
    ]
    pattern = {"tokens": "*/tokens/*.parquet", "records": "*/set/train*"}[moment]
    kill_when(lambda: bool(list((output / ".work").glob(pattern))),
              lambda: subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
              lambda: shutil.rmtree(output))
    assert not (output / "manifest.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(output) == files_of(packed)
    assert "dataset_id" in done.stdout and "| train" in done.stdout
    assert not (output / ".work").exists() and os.listdir(output)
