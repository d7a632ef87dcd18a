"""Everything that can be wrong with the data stops before the first row, and says how to mend it."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from packed_sets import make_packed_set, make_tokenizer

from nanollama.config import DataConfig, PackedSetConfig
from nanollama.data.files import DataError
from nanollama.data.mixture import open_mixture
from nanollama.data.strict import FieldError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    tokenizer = make_tokenizer(root / "tokenizer")
    make_packed_set(root / "books", tokenizer=tokenizer, seed=1, sources=("novels",))
    make_packed_set(root / "code", tokenizer=tokenizer, seed=2, record_length=32, documents=100)
    make_packed_set(root / "notes", tokenizer=tokenizer, seed=3, validation=0, sources=("mail",))
    return root


def data_of(root: Path, *names: str, **changes: object) -> DataConfig:
    sets = tuple(PackedSetConfig(str(root / name), weight, recipe="configs/mixtures/m.yaml")
                 for name, weight in zip(names, (3.0, 1.0, 0.5), strict=False))
    data = DataConfig(sets=sets, tokenizer=str(root / "tokenizer"), sequence_length=128)
    return dataclasses.replace(data, **changes)  # type: ignore[arg-type]


def test_a_mixture_knows_its_sets_sources_and_shares(root: Path) -> None:
    mixture = open_mixture(data_of(root, "books", "code"), vocab_size=400)
    assert mixture.sources == ["books/novels", "code/alpha", "code/beta"]
    assert [member.records_per_row for member in mixture.sets] == [2, 4]
    assert [member.first_source for member in mixture.sets] == [0, 1]
    assert mixture.interleave.shares == (3, 1)
    labels, tokens = mixture.source_labels, mixture.source_counts("tokens")
    documents = mixture.source_counts("documents")
    assert labels == [t - d for t, d in zip(tokens, documents, strict=True)]
    assert sum(documents) == 180 + 90


def test_missing_sets_and_tokenizers_name_the_commands_that_make_them(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        open_mixture(data_of(root, "books", "poems"))
    assert str(error.value).splitlines()[1:] == [
        f"  python -m data_pipeline.corpus --config=configs/mixtures/m.yaml --output={root}/poems-corpus",
        f"  python -m data_pipeline.pack --corpus={root}/poems-corpus --tokenizer={root}/tokenizer "
        f"--output={root}/poems --record-length=128"]
    sets = (PackedSetConfig("data/a/packed", recipe="a.yaml"),)
    nothing = DataConfig(sets=sets, tokenizer=str(tmp_path / "none"), sequence_length=12288)
    with pytest.raises(DataError) as error:
        open_mixture(nothing, vocab_size=32000)
    assert str(error.value).splitlines()[1:] == [
        "  python -m data_pipeline.corpus --config=a.yaml --output=data/a/corpus",
        f"  python -m data_pipeline.tokenizer --corpus=data/a/corpus --output={tmp_path}/none --vocab-size=32000",
        f"  python -m data_pipeline.pack --corpus=data/a/corpus --tokenizer={tmp_path}/none "
        "--output=data/a/packed --record-length=4096"]


def test_a_set_packed_with_another_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other", vocab_size=320)
    mine = open_mixture(data_of(root, "books")).tokenizer
    with pytest.raises(DataError) as error:
        open_mixture(data_of(root, "books", tokenizer=str(tmp_path / "other")))
    for part in (mine.sha256, other.sha256, str(root / "books"), "python -m data_pipeline.pack"):
        assert part in str(error.value)
    with pytest.raises(DataError, match=rf"checkpoint was made with tokenizer {other.sha256}.*{mine.sha256}"):
        open_mixture(data_of(root, "books"), tokenizer_sha256=other.sha256)
    open_mixture(data_of(root, "books"), tokenizer_sha256=mine.sha256)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(root: Path) -> None:
    with pytest.raises(FieldError, match=r"config.model.vocab_size: 399 is less than.*Use 400 or more"):
        open_mixture(data_of(root, "books"), vocab_size=399)
    open_mixture(data_of(root, "books"), vocab_size=512)


@pytest.mark.parametrize(("length", "fix"), [(96, "Use 64 or 128"), (32, "Use 64,"), (129, "Use 128 or 192")])
def test_a_row_length_that_records_do_not_fill_is_refused(root: Path, length: int, fix: str) -> None:
    with pytest.raises(FieldError, match=fix) as error:
        open_mixture(data_of(root, "books", sequence_length=length))
    assert error.value.field == "config.data.sequence_length"


def test_an_empty_split_stops_training_and_is_left_out_of_validation(root: Path, tmp_path: Path) -> None:
    mixture = open_mixture(data_of(root, "books", "notes"), split="validation")
    assert mixture.sources == ["books/novels"]
    with pytest.raises(DataError, match="notes: split 'validation' is empty"):
        open_mixture(data_of(root, "notes"), split="validation")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    make_packed_set(tmp_path / "heldout", tokenizer=tokenizer, documents=3, validation=1)
    with pytest.raises(DataError, match=r"heldout: split 'train' is empty. Splits with records: validation"):
        open_mixture(data_of(tmp_path, "heldout"))


def test_one_set_twice_is_refused_and_equal_names_are_told_apart(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"config.data.sets\[1\].path"):
        open_mixture(data_of(root, "books", "books"))
    shutil.copytree(root / "books", tmp_path / "copy")
    with pytest.raises(FieldError, match="is there twice"):
        open_mixture(data_of(root, "books", str(tmp_path / "copy")))
    shutil.copytree(root / "code", tmp_path / "books")
    mixture = open_mixture(data_of(root, "books", str(tmp_path / "books")))
    assert [name.split("-")[0] for name in mixture.sources] == ["books"] * 3
    assert len(set(mixture.sources)) == 3


def test_weights_that_cannot_be_mixed_name_the_field(root: Path) -> None:
    data = data_of(root, "books", "code")
    tiny = dataclasses.replace(data.sets[1], weight=1e-9)
    with pytest.raises(FieldError, match=r"config.data.sets: .*less than 1/100000"):
        open_mixture(dataclasses.replace(data, sets=(data.sets[0], tiny)))


def test_a_checkpoint_of_another_mixture_is_refused_with_the_difference(root: Path, tmp_path: Path) -> None:
    mixture = open_mixture(data_of(root, "books", "code"))
    shutil.copytree(root / "books", tmp_path / "moved")
    moved = open_mixture(data_of(root, str(tmp_path / "moved"), "code"))
    moved.require_same(mixture.describe(), "checkpoint 5")  # moving a set changes nothing
    assert moved.sha256 == mixture.sha256
    for other in (data_of(root, "code", "books"), data_of(root, "books", "code", mask_documents=False),
                  data_of(root, "books", "code", sequence_length=64), data_of(root, "books")):
        assert open_mixture(other).sha256 != mixture.sha256
        with pytest.raises(DataError, match="checkpoint 5 was fed by another mixture"):
            open_mixture(other).require_same(mixture.describe(), "checkpoint 5")
