"""Mixture files: the shipped ones load, and every mistake is told with file, line, field and the way out."""

import textwrap
from pathlib import Path

import pytest

from data_pipeline.config import MixtureError, format_of, load_mixture, mixture_mapping
from nanollama.data.files import sha256_json

MIXTURES = sorted((Path(__file__).parents[1] / "configs" / "mixtures").glob("*.yaml"))
GOOD = """\
metadata: {phase: test, description: a test}
datasets:
  - name: one
    source: a.jsonl
    mix_ratio: 0.25
  - name: two
    source: b.txt
    mix_ratio: 0.75
    filters:
      - {type: length, min_characters: 10}
      - {type: exact_duplicate}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mix.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_shipped_mixtures_load(path: Path) -> None:
    mixture = load_mixture(path)
    assert abs(sum(dataset.mix_ratio for dataset in mixture.datasets) - 1) < 1e-9
    assert all(dataset.licence for dataset in mixture.datasets)
    assert mixture.metadata.max_seq_length


def test_quickstart_needs_no_network_and_phase1_names_hub_sets() -> None:
    by_name = {path.stem: load_mixture(path) for path in MIXTURES}
    quickstart, phase1 = by_name["quickstart"], by_name["phase1"]
    assert {format_of(dataset) for dataset in quickstart.datasets} == {"code", "docstrings", "text"}
    assert {format_of(dataset) for dataset in phase1.datasets} == {"huggingface"}
    assert all("/" in str(dataset.source) for dataset in phase1.datasets)


def test_a_good_file(tmp_path: Path) -> None:
    mixture = load_mixture(write(tmp_path, GOOD))
    assert [format_of(dataset) for dataset in mixture.datasets] == ["jsonl", "text"]
    assert [item.type for item in mixture.datasets[1].built_filters] == ["length", "exact_duplicate"]
    assert mixture.validation.ratio == 0.02
    # order of keys and comments are no part of what is hashed
    other = load_mixture(write(tmp_path, "# a comment\n" + GOOD.replace(
        "    source: a.jsonl\n    mix_ratio: 0.25\n", "    mix_ratio: 0.25\n    source: a.jsonl\n")))
    assert sha256_json(mixture_mapping(mixture)) == sha256_json(mixture_mapping(other))


MISTAKES = [
    # (replace, by, line, words of the message)
    ("mix_ratio: 0.25", "mix_rato: 0.25", 5, ["datasets[0].mix_rato", "no such field", "'mix_ratio'"]),
    ("mix_ratio: 0.25", "mix_ratio: much", 5, ["datasets[0].mix_ratio", "'much'", "float"]),
    ("mix_ratio: 0.25", "mix_ratio: 0.5", 2, ["sum to 1.25, not 1"]),
    ("mix_ratio: 0.25", "mix_ratio: -0.25", 5, ["datasets[0].mix_ratio", "not above 0"]),
    ("mix_ratio: 0.25", "mix_ratio: .nan", 5, ["datasets[0].mix_ratio", "nan"]),
    ("    mix_ratio: 0.25\n", "", 3, ["datasets[0].mix_ratio", "missing"]),
    ("name: two", "name: one", 6, ["datasets[1].name", "'one' is used twice"]),
    ("name: two", "name: a/b", 6, ["datasets[1].name", "plain name"]),
    ("type: length", "type: lenght", 10, ["filters[0].type", "'lenght'", "'length'"]),
    ("min_characters: 10", "min_chars: 10", 10, ["filters[0].min_chars", "'min_characters'"]),
    ("min_characters: 10", "min_characters: 10, max_characters: 5", 10,
     ["max_characters", "below min_characters"]),
    ("{type: length, min_characters: 10}", "length", 10, ["filters[0]", "not a mapping"]),
    ("source: a.jsonl", "source: ${NOT_SET_ANYWHERE}/a.jsonl", 4,
     ["datasets[0].source", "NOT_SET_ANYWHERE", "export"]),
    ("source: a.jsonl", "source: python-stdlb", 4, ["datasets[0].source", "python-stdlib", "format"]),
    ("source: a.jsonl", "source: python-stdlib\n    format: parquet", 5,
     ["datasets[0].format", "code or docstrings"]),
    ("source: a.jsonl", "source: a.jsonl\n    separator: x", 5, ["datasets[0].separator", "text files"]),
    ("source: a.jsonl", "source: a.jsonl\n    subset: en", 5, ["datasets[0].subset", "hub datasets"]),
    ("source: a.jsonl", "source: a.jsonl\n    on_error: ignore", 5, ["datasets[0].on_error", "skip, stop"]),
    ("source: a.jsonl", "source: a.jsonl\n    max_bytes: 0", 5, ["datasets[0].max_bytes", "not above 0"]),
    ("source: a.jsonl", "source: a.jsonl\n    max_loss: 2", 5, ["datasets[0].max_loss", "(0, 1]"]),
    ("source: a.jsonl", "source: a.jsonl\n    source: b.jsonl", 5, ["'source' is given twice"]),
    ("phase: test", "phase: test, phaze: 1", 1, ["metadata.phaze", "'phase'"]),
    ("datasets:\n", "validation: {ratio: 1.5}\ndatasets:\n", 2, ["validation.ratio", "[0, 1)"]),
    ("datasets:\n", "datasets: [\n", 3, ["not YAML"]),
    ("a test}", "a test", 2, ["not YAML"]),
]


@pytest.mark.parametrize(("old", "new", "line", "words"), MISTAKES, ids=[case[1][:30] for case in MISTAKES])
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, line: int,
                                         words: list[str]) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(MixtureError) as caught:
        load_mixture(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: "), message
    for word in words:
        assert word in message


def test_other_files_that_are_no_mixture(tmp_path: Path) -> None:
    for text, words in [("", "expected a mapping"), ("- 1\n", "expected a mapping"),
                        ("metadata: {}\n", "is missing")]:
        with pytest.raises(MixtureError, match=words):
            load_mixture(write(tmp_path, textwrap.dedent(text)))
    with pytest.raises(MixtureError, match="has no dataset"):
        load_mixture(write(tmp_path, "metadata: {phase: a, description: b}\ndatasets: []\n"))
    with pytest.raises(MixtureError, match="cannot be read"):
        load_mixture(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"metadata: {phase: \xff}\n")
    with pytest.raises(MixtureError, match="UTF-8"):
        load_mixture(tmp_path / "latin.yaml")
