"""From a mixture file to the rows of training: each dataset's share of them is its ratio, within one row, always."""

from pathlib import Path

import numpy as np
import pytest
from corpora import jsonl, mixture
from packed_sets import make_texts, make_tokenizer

from data_pipeline.corpus import build_corpus
from data_pipeline.mixture import compile_plan, trainer_sets
from data_pipeline.pack import pack_datasets
from nanollama.config import DataConfig, PackedSetConfig
from nanollama.data.loader import Loader
from nanollama.data.mixture import open_mixture

RATIOS = {"small": 0.65, "large": 0.25, "middle": 0.1}  # not in the proportion of the texts, which are repeated
TEXTS = {"small": 30, "large": 200, "middle": 90}
ROWS = 8


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    root = tmp_path_factory.mktemp("weights")
    for seed, (name, count) in enumerate(TEXTS.items()):
        (root / f"{name}.jsonl").write_bytes(jsonl(make_texts(count, seed=seed)))
    config = mixture(root / "mix.yaml", *({"name": name, "source": str(root / f"{name}.jsonl"), "mix_ratio": ratio}
                                          for name, ratio in RATIOS.items()))
    build_corpus(config, root / "corpus")
    make_tokenizer(root / "tokenizer")
    pack_datasets(root / "corpus", root / "tokenizer", root / "packed", record_length=64, validation_fraction=0.1)
    sets = tuple(PackedSetConfig(item["path"], item["weight"])
                 for item in trainer_sets(compile_plan(config), str(root / "packed")))
    return Loader(open_mixture(DataConfig(sets=sets, tokenizer=str(root / "tokenizer"), sequence_length=64)),
                  seed=0, global_batch=ROWS)


def check_shares(names: list[str]) -> None:
    """After every row, each dataset was read within one row of its ratio."""
    for name, ratio in RATIOS.items():
        seen = np.cumsum([one == name for one in names])
        assert np.abs(seen - ratio * np.arange(1, len(names) + 1)).max() <= 1, name


def test_every_prefix_of_training_has_the_ratios_of_the_mixture_file(loader: Loader) -> None:
    names = [Path(loader.where(step, row)["set"]).name for step in range(60) for row in range(ROWS)]
    check_shares(names)
    assert loader.epochs([1, 1, 1]).keys() == {f"{name}/{name}" for name in RATIOS}


def test_the_rows_that_are_read_are_those_of_the_sets(loader: Loader) -> None:
    for step in (0, 7):
        batch = loader.batch(step)
        for row in range(ROWS):
            name = Path(loader.where(step, row)["set"]).name
            found = set(batch.source_ids_BT[row][batch.segment_ids_BT[row] > 0].tolist())
            assert found == {loader.sources.index(f"{name}/{name}")}


def test_a_dataset_of_one_document_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "play.jsonl").write_bytes(jsonl([" ".join(make_texts(40))]))
    build_corpus(mixture(tmp_path / "mix.yaml", {"name": "play", "source": str(tmp_path / "play.jsonl")}),
                 tmp_path / "corpus")
    make_tokenizer(tmp_path / "tokenizer")
    made = pack_datasets(tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "packed", record_length=64)
    assert {name: split["documents"] for name, split in made["play"]["splits"].items()} == {"train": 1, "validation": 0}
    data = DataConfig(sets=(PackedSetConfig(str(tmp_path / "packed" / "play")),), tokenizer=str(tmp_path / "tokenizer"),
                      sequence_length=64)
    assert Loader(open_mixture(data), seed=0, global_batch=2).batch(0).source_tokens.sum() > 0


def test_the_check_catches_shares_of_the_texts_that_are_there() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        check_shares(rng.choice(list(TEXTS), 480, p=np.array([*TEXTS.values()]) / sum(TEXTS.values())).tolist())
    with pytest.raises(AssertionError):  # right on average only
        check_shares(rng.choice(list(RATIOS), 480, p=[*RATIOS.values()]).tolist())
