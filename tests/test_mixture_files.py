"""The shipped mixtures: every phase has one, its facts agree with the others', and its offline twin gives text."""

import os
import re
from pathlib import Path

import pytest
from corpora import data_folder, documents

from data_pipeline.corpus import build_corpus
from data_pipeline.mixture import compile_plan, count_rows, describe
from data_pipeline.mixtures.load import load_mixture
from data_pipeline.sources.dataset import PACKAGE_METADATA, PYTHON_STDLIB, format_of, paths_of

ROOT = Path(__file__).parents[1] / "configs" / "mixtures"
MIXTURES, OFFLINE = sorted(ROOT.glob("*.yaml")), sorted((ROOT / "offline").glob("*.yaml"))
DATA = data_folder()
PHASES = {
    "phase1", "phase1_code", "phase1_knowledge", "phase1_domains", "phase2_quality", "phase2_domain",
    "midtrain1_reasoning", "midtrain1_code", "midtrain2_instruct", "long_context", "phase3_crystallize",
    "sft_general", "sft_code", "sft_reasoning", "sft_tools", "dpo_helpful", "dpo_safety", "reward", "rlaif"}
TWINS = [path for path in OFFLINE if path.stem in PHASES]  # what else is offline has tests of its own
ROWS = {"sft": "chat", "dpo": "preference", "reward": "preference", "rlaif": "prompt"}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures that name ${NANOLLAMA_DATA} compile wherever it points."""
    monkeypatch.setenv("NANOLLAMA_DATA", str(DATA or "/nowhere"))


def needs_the_folder(path: Path) -> bool:
    return "${NANOLLAMA_DATA}" in path.read_text()


@pytest.mark.parametrize("path", [*MIXTURES, *OFFLINE], ids=lambda path: "-".join(path.parts[-2:]))
def test_a_mixture_compiles(path: Path) -> None:
    plan = compile_plan(path)
    text = describe(plan)
    assert plan["metadata"]["phase"] in text and plan["metadata"]["max_seq_length"]
    assert sum(row["weight"] for row in plan["datasets"]) == pytest.approx(1)
    assert all(row["licence"] for row in plan["datasets"])
    assert not any(row["epochs"] and row["epochs"] > 4.001 for row in plan["datasets"])
    assert "is repeated" not in text


def test_every_phase_has_a_mixture_and_a_twin() -> None:
    assert {path.stem for path in MIXTURES} == PHASES | {"quickstart"}
    assert {path.stem for path in TWINS} == PHASES


@pytest.mark.parametrize("path", [path for path in MIXTURES if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_hub_datasets_are_named_in_full(path: Path) -> None:
    mixture = load_mixture(path)
    wanted = ROWS.get(path.stem.split("_")[0])
    for dataset in mixture.datasets:
        assert format_of(dataset) == "huggingface" and dataset.estimated_tokens
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", source) for source in paths_of(dataset))
        assert wanted is None or dataset.rows == wanted
        assert dataset.revision is None or re.fullmatch(r"[0-9a-f]{40}|refs/pr/\d+", dataset.revision)


def test_the_same_dataset_has_the_same_facts_everywhere() -> None:
    facts: dict[tuple, tuple] = {}
    for path in MIXTURES:
        if path.stem in ("phase1", "quickstart"):  # states what it takes of each, not what there is
            continue
        for dataset in load_mixture(path).datasets:
            key = (dataset.source, dataset.subset, dataset.data_dir, dataset.splits, dataset.rows, dataset.fields and
                   tuple(dataset.fields.items()))
            fact = (dataset.revision, dataset.estimated_tokens, dataset.licence, dataset.text_field, dataset.layout)
            assert facts.setdefault(key, fact) == fact, (path.stem, dataset.name)


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_a_twin_gives_rows(path: Path) -> None:
    if needs_the_folder(path) and DATA is None:
        pytest.skip("the folder of real text is not here (NANOLLAMA_DATA)")
    mixture = load_mixture(path)
    counts = count_rows(mixture, most=40)
    for dataset in mixture.datasets:
        count = counts[dataset.name]
        assert count.kept and count.tokens
        assert (count.turns >= count.kept) == (dataset.rows != "text")


@pytest.mark.parametrize("path", [path for path in TWINS if not needs_the_folder(path)], ids=lambda path: path.stem)
def test_a_twin_of_the_machine_makes_a_corpus(path: Path, tmp_path: Path) -> None:
    assert {source for dataset in load_mixture(path).datasets for source in paths_of(dataset)} <= {
        PYTHON_STDLIB, PACKAGE_METADATA}
    manifest = build_corpus(path, tmp_path / "corpus", limit_mb=0.3)
    rows = documents(tmp_path / "corpus")
    assert len(rows) == sum(row["kept"] for row in manifest["datasets"]) > 3
    assert all(row["kept"] for row in manifest["datasets"])


def test_the_folder_is_found_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pretrain").mkdir()
    monkeypatch.setenv("NANOLLAMA_DATA", os.fspath(tmp_path))
    assert data_folder() == tmp_path
