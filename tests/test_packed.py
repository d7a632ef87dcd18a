"""Packed sets on disk: one changed byte is found, a document is in one split, tokens lead to documents."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from packed_sets import make_packed_set, make_texts, make_tokenizer

from nanollama.data import packed
from nanollama.data.files import DataError, read_json, sha256_file, write_json
from nanollama.data.format import Record, encode_record
from nanollama.data.packed import PackedSet, dataset_id, verify, why
from nanollama.data.tokenizer import Tokenizer

TEXTS = [*make_texts(60, seed=5), "a document of many tokens, " * 40]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def whole(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed_set(tmp_path_factory.mktemp("set"), tokenizer=tokenizer, documents=TEXTS)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def rewrite_manifest(directory: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest as somebody would who also mends its dataset_id."""
    manifest = read_json(directory / "manifest.json")
    change(manifest)
    write_json(directory / "manifest.json", {**manifest, "dataset_id": dataset_id(manifest)})


def replace_records(directory: Path, split: str, data: list[bytes]) -> None:
    """Put other records into a split, with a manifest that agrees with the file."""
    path = directory / f"{split}-00000.array_record"
    for old in directory.glob(f"{split}-*.array_record"):
        old.unlink()
    writer = ArrayRecordWriter(str(path), packed.WRITER_OPTIONS)
    for item in data:
        writer.write(item)
    writer.close()
    file = {"path": path.name, "split": split, "bytes": path.stat().st_size, "sha256": sha256_file(path),
            "records": len(data)}

    def change(manifest: dict) -> None:
        manifest["files"] = [f for f in manifest["files"] if f["split"] != split] + [file]
        manifest["splits"][split]["records"] = len(data)

    rewrite_manifest(directory, change)


def test_an_undamaged_set_verifies(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = verify(whole)
    assert packed.main(["verify", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert manifest["dataset_id"] in printed
    assert f"{manifest['splits']['train']['tokens']:,} tokens" in printed


@pytest.mark.parametrize("name", ["train-00000.array_record", "train-00001.array_record",
                                  "validation-00000.array_record", "docs.parquet", "manifest.json"])
def test_one_changed_byte_anywhere_is_found(damaged: Path, name: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((damaged / name).read_bytes())
    at = data.index(b'"record_length": 64') + 17 if name == "manifest.json" else len(data) // 2
    data[at] ^= 1
    (damaged / name).write_bytes(data)
    assert packed.main(["verify", str(damaged)]) == 1
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train-00001.array_record", "docs.parquet"])
def test_a_cut_off_or_missing_file_is_found_when_opened(damaged: Path, name: str) -> None:
    (damaged / name).write_bytes((damaged / name).read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name}: \d+ bytes, the manifest says"):
        PackedSet(damaged)
    (damaged / name).unlink()
    with pytest.raises(DataError, match=f"{name}: no such file"):
        PackedSet(damaged)


@pytest.mark.parametrize(("change", "problem"), [
    (lambda m: m.update(schema_version=2), "schema_version 2, this code reads 1"),
    (lambda m: m.update(kind="preferences"), "kind 'preferences'"),
    (lambda m: m.pop("sources"), "lacks sources"),
    (lambda m: m["splits"]["train"].update(tokens=7), "tokens, the manifest says 7"),
    (lambda m: m["splits"]["train"].update(records=1), "records, the manifest says 1"),
    (lambda m: m["tokenizer"].update(vocab_size=50), "the vocabulary has 50"),
    (lambda m: m.update(sources=["alpha"]), "source id 1, the manifest has 1 sources"),
    (lambda m: m.update(record_length=60), "record_length is 60"),
])
def test_a_manifest_that_lies_is_found(damaged: Path, change: Callable[[dict], object], problem: str) -> None:
    rewrite_manifest(damaged, change)
    with pytest.raises(DataError, match=problem):
        verify(damaged)


def test_an_edited_manifest_is_found_when_opened(damaged: Path) -> None:
    manifest = read_json(damaged / "manifest.json")
    write_json(damaged / "manifest.json", {**manifest, "seed": 99})
    with pytest.raises(DataError, match="it was edited"):
        PackedSet(damaged)


def test_times_and_paths_are_no_part_of_the_identity() -> None:
    manifest = {"seed": 1, "corpus": {"path": "here", "sha256": "ab"}, "times": {"pack": 1.0}, "code": "v1"}
    moved = {"seed": 1, "corpus": {"path": "there", "sha256": "ab"}, "dataset_id": "x"}
    assert dataset_id(manifest) == dataset_id(moved)
    assert dataset_id(manifest) != dataset_id({**manifest, "seed": 2})
    assert dataset_id(manifest) != dataset_id({**manifest, "corpus": {"path": "here", "sha256": "cd"}})


def test_records_come_in_the_order_asked_for_from_all_files(whole: Path) -> None:
    train = PackedSet(whole).split("train")
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    for index, record in zip(order, train.read(order), strict=True):
        assert encode_record(record) == encode_record(train.record(index))
    assert train.read([]) == []
    with pytest.raises(IndexError):
        train.record(len(train))


def test_a_split_that_is_not_there_names_those_that_are(whole: Path) -> None:
    with pytest.raises(DataError, match=r"split 'test' is empty. Splits with records: train, validation"):
        PackedSet(whole).split("test")


def test_a_broken_record_is_named_with_its_place(damaged: Path) -> None:
    good = encode_record(Record(np.array([1, 5, 2]), np.array([0]), np.array([0]), np.array([0])))
    replace_records(damaged, "train", [good, good[:-1], good])
    train = PackedSet(damaged).split("train")
    train.record(0)
    problem = r"train-00000.array_record, split train, record 1: .*truncated.*packed verify"
    with pytest.raises(DataError, match=problem):
        train.read([2, 0, 1])


def test_bytes_changed_inside_a_file_are_found_when_read(damaged: Path) -> None:
    """ArrayRecord keeps checksums: a flipped bit is an error, or was in the file's own padding."""
    path = damaged / "validation-00000.array_record"
    good = np.frombuffer(path.read_bytes(), np.uint8)
    places = np.random.default_rng(0).choice(np.flatnonzero(good), 40, replace=False)
    expected = [encode_record(r) for r in PackedSet(damaged).split("validation").read(range(5))]
    problems = []
    for place in places:
        path.write_bytes(np.where(np.arange(len(good)) == place, good ^ 4, good).tobytes())
        try:
            found = PackedSet(damaged).split("validation").read(range(5))
        except DataError as error:
            problems.append(str(error))
        else:
            assert [encode_record(record) for record in found] == expected
    assert len(problems) > 10
    assert all("validation-00000.array_record" in problem for problem in problems)


def check_each_document_in_one_split(directory: Path) -> None:
    data = PackedSet(directory)
    found: dict[int, str] = {}
    for split in data.manifest["splits"]:
        records = data.split(split)
        for index in range(len(records)):
            for document in records.record(index).documents.tolist():
                assert found.setdefault(document, split) == split
    assert sorted(found) == list(range(len(TEXTS)))


def test_a_document_is_in_exactly_one_split(whole: Path) -> None:
    check_each_document_in_one_split(whole)


def test_a_document_in_two_splits_is_found(damaged: Path) -> None:
    """The mutant: a validation record that is a copy of a training record."""
    data = PackedSet(damaged)
    validation = data.split("validation")
    records = [*validation.read(range(1, len(validation))), data.split("train").record(0)]
    replace_records(damaged, "validation", [encode_record(record) for record in records])
    with pytest.raises(AssertionError):
        check_each_document_in_one_split(damaged)
    with pytest.raises(DataError, match="is in split train too"):
        verify(damaged)


def test_a_record_without_a_label_is_found(damaged: Path) -> None:
    replace_records(damaged, "train", [encode_record(Record(np.array([2]), *(np.array([0]),) * 3))])
    with pytest.raises(DataError, match="nothing to learn"):
        verify(damaged)


def test_why_leads_from_a_record_to_its_documents(whole: Path, tokenizer: Tokenizer,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    train = PackedSet(whole).split("train")
    pieces: dict[int, str] = {}
    for index in range(len(train)):
        record = train.record(index)
        for segment in why(whole, "train", index):
            begin = segment["first_token"]
            number = json.loads(segment["document"]["meta"])["number"]
            text = tokenizer.decode(record.tokens[begin:begin + segment["tokens_here"]])
            pieces[number] = pieces.get(number, "") + text
            assert segment["document"]["split"] == "train"
            assert segment["document"]["source"] == ("alpha", "beta")[number % 2]
    assert len(pieces) > 40
    for number, text in pieces.items():
        assert text == TEXTS[number]
    assert packed.main(["why", str(whole), "--record", "0"]) == 0
    assert "doc_id=document-0, source=alpha" in capsys.readouterr().out
    assert packed.main(["why", str(whole), "--record", "100000"]) == 1
    assert "--record 100000: split train" in capsys.readouterr().err
