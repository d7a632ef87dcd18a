"""Mixture files: the shipped ones load, and every mistake is told with file, line, field and the way out."""

import textwrap
from pathlib import Path

import pytest

from data_pipeline.mixtures.load import MixtureError, load_mixture, mixture_mapping
from data_pipeline.mixtures.steps import make_sampling
from data_pipeline.sources.dataset import format_of, layout_of
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


# 9 ** 9 values; whoever follows the aliases before counting does not come back
BOMB = "\n" + "\n".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}' if level else 'x'] * 9)}]"
                        for level in range(9))
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
    ("source: a.jsonl", "source: a.jsonl\n    filters: &f\n      - {type: *f}", 5, ["alias of what it stands in"]),
    ("source: a.jsonl", "source: a.jsonl\n    filters:\n      - {type: [length]}", 6, ["no filter", "length"]),
    ("source: a.jsonl", "source: a.jsonl\n    max_bytes: 1e9", 5, ["1_000_000_000 without quotes"]),
    ("source: a.jsonl", "source: a.jsonl\n    max_bytes: 1.5e+9", 5, ["such as 1_500_000_000"]),
    ("source: a.jsonl", "source: null", 4, ["NoneType", "a value of type str", "a list of str"]),
    ("phase: test", "phase: 2020-01-01", 1, ["metadata.phase", "put it in quotes"]),
    ("a test}", "a test", 2, ["not YAML"]),
    ("source: a.jsonl", "source: a.jsonl\n    date_field: 2023-02-29", 5, ["'2023-02-29'", "day", "in quotes"]),
    ("source: a.jsonl", "source: a.jsonl\n    meta_fields: []\n    filters: [{type: url_blocklist, domains: [a.b]}]", 5,
     ["datasets[0].meta_fields", "leaves out 'url'", "keep everything"]),
    ("source: a.jsonl", "source: a.jsonl\n    filters: [{type: url_blocklist, patterns: ['']}]", 5, ["every URL"]),
    ("datasets:\n", "decontamination: [{type: decontaminate, canaries: ['']}]\ndatasets:\n", 2,
     ["decontamination[0].canaries", "every document holds"]),
    ("source: a.jsonl", f"source: a.jsonl\n    fields: {BOMB.replace(chr(10), chr(10) + ' ' * 6)}", 2,
     ["more than 100,000 values", "mixture.datasets", "fewer aliases"]),
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
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(MixtureError, match=r"cannot be read \([A-Z]"):
            load_mixture(path)
    (tmp_path / "latin.yaml").write_bytes(b"metadata: {phase: \xff}\n")
    with pytest.raises(MixtureError, match="UTF-8"):
        load_mixture(tmp_path / "latin.yaml")


FULL = """\
metadata: {phase: test, description: a test, total_tokens: 1000, steps: 10, max_seq_length: 64}
filters:
  - {type: length, min_characters: 5}
datasets:
  - name: one
    source: a.jsonl
    estimated_tokens: 800
    sampling: {rate: 0.5, max_epochs: 2}
  - name: two
    source: b.json
    format: json
    rows: chat
    layout: instruction
    fields: {output: response}
    estimated_tokens: 200
    filters:
      - {type: exact_duplicate}
deduplication:
  - {type: exact}
  - {type: minhash, threshold: 0.7}
decontamination:
  - {type: decontaminate, sets: [gsm8k]}
selection:
  - {type: dsir, target: [two], rate: 0.95}
  - {type: attributes, attribute: quality, rates: {high: 1.0, low: 0.1}}
sampling: {method: alpha, alpha: 1.3}
validation: {ratio: 0.01, seed: 3}
"""


def test_every_section(tmp_path: Path) -> None:
    mixture = load_mixture(write(tmp_path, FULL))
    assert [item["type"] for item in mixture.datasets[1].filters] == ["length", "exact_duplicate"]
    assert mixture.filters == ()  # they are the datasets' now
    assert [step.type for step in mixture.steps("deduplication")] == ["exact", "minhash"]
    assert mixture.steps("deduplication")[1].threshold == 0.7
    assert mixture.steps("decontamination")[0].sets == ("gsm8k",)
    assert mixture.steps("selection")[1].rates == {"high": 1.0, "low": 0.1}
    # sizes after sampling.rate are 400 and 200
    want = 400**1.3 / (400**1.3 + 200**1.3)
    assert [dataset.mix_ratio for dataset in mixture.datasets] == pytest.approx([want, 1 - want])
    assert layout_of(mixture.datasets[1])["output"] == "response"
    again = load_mixture(write(tmp_path, FULL.replace("1.3}", "0.5}")))
    assert sha256_json(mixture_mapping(mixture)) != sha256_json(mixture_mapping(again))


FULL_MISTAKES = [
    ("{type: minhash, threshold: 0.7}", "{type: minhahs}", 20,
     ["deduplication[1].type", "'minhahs'", "'minhash'"]),
    ("threshold: 0.7", "treshold: 0.7", 20, ["deduplication[1].treshold", "'threshold'"]),
    ("threshold: 0.7", "threshold: 1.7", 20, ["deduplication[1].threshold", "(0, 1]"]),
    ("{type: exact}", "exact", 19, ["deduplication[0]", "not a mapping"]),
    ("{type: decontaminate, sets: [gsm8k]}", "{sets: [gsm8k]}", 22, ["decontamination[0]", "no `type`"]),
    ("rate: 0.95", "rate: 0", 24, ["selection[0].rate", "(0, 1]"]),
    ("low: 0.1", "low: 1.1", 25, ["selection[1].rates"]),
    ("method: alpha, alpha: 1.3", "method: alhpa", 26, ["sampling.method", "'alhpa'", "'alpha'"]),
    ("method: alpha, alpha: 1.3", "method: unimax, alpha: 1.3", 26, ["sampling.alpha", "no such field"]),
    ("alpha: 1.3", "alpha: -1.0", 26, ["sampling.alpha", "above 0"]),
    ("method: alpha, alpha: 1.3", "method: temporal", 26, ["sampling.method", "between documents", "selection: ["]),
    ("type: attributes, attribute: quality, rates: {high: 1.0, low: 0.1}", "type: temporal, reference: soon", 25,
     ["selection[1].reference", "'soon'"]),
    ("target: [two]", "target: [tow]", 24, ["selection[0].target", "'tow'", "'two'"]),
    ("method: alpha, alpha: 1.3", "method: weighted", 5, ["datasets[0].mix_ratio", "missing"]),
    ("    estimated_tokens: 800\n", "", 5, ["datasets[0].estimated_tokens", "'alpha'"]),
    ("estimated_tokens: 800", "estimated_tokens: 800\n    mix_ratio: 0.5", 8,
     ["datasets[0].mix_ratio", "computed by", "Leave it out"]),
    ("estimated_tokens: 800", "estimated_tokens: -1", 7, ["datasets[0].estimated_tokens", "not above 0"]),
    ("total_tokens: 1000", "total_tokens: 0", 1, ["metadata.total_tokens", "not above 0"]),
    ("rate: 0.5", "rate: 1.5", 8, ["datasets[0].sampling.rate", "(0, 1]"]),
    ("max_epochs: 2", "max_epoch: 2", 8, ["datasets[0].sampling.max_epoch", "'max_epochs'"]),
    ("layout: instruction", "layout: instructions", 13, ["datasets[1].layout", "'instruction'"]),
    ("    layout: instruction\n", "", 9, ["datasets[1].layout", "is missing", "sharegpt"]),
    ("fields: {output: response}", "fields: {outptu: response}", 14,
     ["datasets[1].fields.outptu", "'output'"]),
    ("    rows: chat\n", "", 12, ["datasets[1].layout", "chat, preference or prompt"]),
    ("min_characters: 5", "min_character: 5", 3, ["filters[0].min_character", "'min_characters'"]),
    ("selection:", "selecton:", 23, ["selecton", "'selection'"]),
]


@pytest.mark.parametrize(("old", "new", "line", "words"), FULL_MISTAKES,
                         ids=[case[1][:30] for case in FULL_MISTAKES])
def test_a_mistake_in_a_section_is_told_with_its_line(tmp_path: Path, old: str, new: str, line: int,
                                                      words: list[str]) -> None:
    assert old in FULL
    path = write(tmp_path, FULL.replace(old, new, 1))
    with pytest.raises(MixtureError) as caught:
        load_mixture(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: "), message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("sampling", "sizes", "budget", "want"),
    [
        ({"method": "proportional"}, [300, 100], None, [0.75, 0.25]),
        ({"method": "alpha", "alpha": 1.0}, [300, 100], None, [0.75, 0.25]),
        ({"method": "alpha", "alpha": 2.0}, [300, 100], None, [0.9, 0.1]),
        ({"method": "temperature", "temperature": 1.0}, [300, 100], None, [0.75, 0.25]),
        ({"method": "temperature", "temperature": 2.0}, [400, 100], None, [2 / 3, 1 / 3]),
        ({"method": "unimax", "max_epochs": 4.0}, [1e12, 2e11, 1e9, 1e8], 1e11,
         [0.4778, 0.4778, 0.04, 0.004]),  # the smallest two are capped at four epochs
        ({"method": "unimax", "max_epochs": 4.0}, [1e8, 1e12, 1e9, 2e11], 1e11, [0.004, 0.4778, 0.04, 0.4778]),
        ({"method": "unimax", "max_epochs": 1.0}, [30, 10], 1e6, [0.75, 0.25]),  # all are capped
    ])
def test_weights_by_size(sampling: dict, sizes: list[float], budget: float | None, want: list[float]) -> None:
    weights = make_sampling(sampling, "sampling").weights(sizes, budget)
    assert weights == pytest.approx(want, rel=2e-3)
    assert sum(weights) == pytest.approx(1)


def test_very_large_sizes_do_not_overflow() -> None:
    weights = make_sampling({"method": "alpha", "alpha": 40.0}, "sampling").weights([1e13, 1e12], None)
    assert weights == pytest.approx([1, 0])


def test_aliases_are_counted_also_where_mappings_are_merged(tmp_path: Path) -> None:
    levels = "".join(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 9))
    for text in (levels, levels.replace("<<: [", "<<: ").replace("]", "").replace(", *", ", <<: *")):
        path = write(tmp_path, "a0: &a0 {k: 1}\n" + text + GOOD)
        with pytest.raises(MixtureError, match=r"mix.yaml:\d: the file has more than 100,000 values"):
            load_mixture(path)
    shared = GOOD.replace("metadata", "filters: [&f {type: length, min_characters: 5}, *f, {<<: *f}]\nmetadata")
    assert [len(dataset.filters) for dataset in load_mixture(write(tmp_path, shared)).datasets] == [3, 5]


def test_a_file_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, f"metadata: {'[' * 3000}{']' * 3000}\n")
    with pytest.raises(MixtureError, match=r"mix.yaml: .*nested too deeply.*flatter"):
        load_mixture(path)
