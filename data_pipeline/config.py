"""A mixture file (YAML): what text a corpus is made of. From the file to frozen dataclasses, strictly.

Owns every field's name, type, default and check that needs no data; an error names file, line, field, the
nearest valid name and the fix. Knows nothing of how sources are read.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

from data_pipeline.filters import ExactDuplicateFilter, Filter, make_filter
from data_pipeline.variables import expand_variables
from data_pipeline.yaml_lines import YamlError, line_of, load_with_lines
from nanollama.data.strict import FieldError, from_mapping, to_mapping

ROOT = "mixture"
PYTHON_STDLIB, PACKAGE_METADATA = "python-stdlib", "package-metadata"
_SUFFIX_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".md": "text",
                   ".rst": "text", ".parquet": "parquet"}


class MixtureError(ValueError):
    """A mixture file that cannot be used; names file, line, field, what is wrong and how to mend it."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the mixture is for. Recorded with everything made from it."""

    phase: str
    description: str
    total_tokens: int | None = None  # tokens the training phase is meant to see
    steps: int | None = None
    max_seq_length: int | None = None


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One dataset of the mixture: where its text is, what of it is kept, how much it weighs."""

    name: str
    # python-stdlib, package-metadata, path(s) with globs and ${VARIABLES}, or the id of a hub dataset
    source: str | tuple[str, ...]
    mix_ratio: float  # share of training; all of a mixture sum to 1
    format: Literal["auto", "jsonl", "text", "parquet", "code", "docstrings", "huggingface"] = "auto"
    text_field: str = "text"
    id_field: str | None = None  # a field that names the document; default: path and line
    meta_fields: tuple[str, ...] | None = None  # fields kept beside the text; default: every scalar one
    separator: str | None = None  # splits a text file into documents; default: one file, one document
    splits: tuple[str, ...] = ("train",)  # of a hub dataset
    subset: str | None = None  # configuration name of a hub dataset
    revision: str | None = None  # commit of a hub dataset, so that it never changes
    estimated_tokens: int | None = None
    licence: str | None = None  # shown in the data card
    filters: tuple[dict, ...] = ()
    max_bytes: int | None = None  # UTF-8 bytes of text taken at most
    cap_order: Literal["hash", "head"] = "hash"  # max_bytes takes an even sample, or the first documents
    on_error: Literal["skip", "stop"] = "skip"  # a broken row: count it and go on, or stop
    max_line_bytes: int = 50_000_000  # a longer line or document is broken; never held whole in memory
    max_loss: float = 0.9  # stop when more than this share of the rows is dropped

    @property
    def built_filters(self) -> tuple[Filter, ...]:
        """The filters as objects, in the order of the file."""
        return tuple(make_filter(item, "filters") for item in self.filters)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Documents held out of training, chosen by a hash of their text."""

    ratio: float = 0.02
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """A whole mixture file."""

    metadata: Metadata
    datasets: tuple[DatasetConfig, ...]
    validation: Validation = Validation()


def load_mixture(path: str | os.PathLike[str]) -> MixtureConfig:
    """Read and check the mixture file at `path`. Raises MixtureError."""
    try:
        value, lines = load_with_lines(path, ROOT)
    except YamlError as error:
        raise MixtureError(str(error)) from error
    try:
        mixture = from_mapping(MixtureConfig, value, ROOT)
        _check(mixture)
    except FieldError as error:
        field = error.field.removeprefix(f"{ROOT}.")
        raise MixtureError(
            f"{path}:{line_of(error.field, lines)}: {field}: {error.problem}. {error.fix}") from error
    return mixture


def mixture_mapping(mixture: MixtureConfig) -> dict[str, Any]:
    """The resolved mixture as plain JSON: what is hashed and recorded. ${VARIABLES} stay unexpanded."""
    return to_mapping(mixture)


def paths_of(dataset: DatasetConfig) -> tuple[str, ...]:
    """The dataset's sources as a tuple, as written."""
    return (dataset.source,) if isinstance(dataset.source, str) else dataset.source


def format_of(dataset: DatasetConfig) -> str:
    """The format, with "auto" resolved from the source's name."""
    if dataset.format != "auto":
        return dataset.format
    first = paths_of(dataset)[0]
    if first == PYTHON_STDLIB:
        return "code"
    if first == PACKAGE_METADATA:
        return "text"
    suffixes = [suffix for suffix in Path(first).suffixes if suffix not in (".gz", ".zst")]
    return _SUFFIX_FORMATS.get(suffixes[-1].lower(), "unknown") if suffixes else "unknown"


def _check(mixture: MixtureConfig) -> None:
    where = f"{ROOT}.datasets"
    if not mixture.datasets:
        raise FieldError(where, "has no dataset", "Give at least one.")
    names: set[str] = set()
    for index, dataset in enumerate(mixture.datasets):
        _check_dataset(dataset, f"{where}[{index}]")
        if dataset.name in names:
            raise FieldError(f"{where}[{index}].name", f"{dataset.name!r} is used twice",
                             "Names must differ: they are part of every document's id.")
        names.add(dataset.name)
    total = math.fsum(dataset.mix_ratio for dataset in mixture.datasets)
    if abs(total - 1) > 1e-3:
        raise FieldError(where, f"the mix_ratio of all datasets sum to {total:.6g}, not 1",
                         "Divide each of them by that sum.")
    if not 0 <= mixture.validation.ratio < 1:
        raise FieldError(f"{ROOT}.validation.ratio", f"{mixture.validation.ratio} is not in [0, 1)",
                         "Try 0.02.")


def _check_dataset(dataset: DatasetConfig, where: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", dataset.name):
        raise FieldError(f"{where}.name", f"{dataset.name!r} is not a plain name",
                         "Use letters, digits, '.', '_' and '-' only.")
    if not paths_of(dataset):
        raise FieldError(f"{where}.source", "is an empty list", "Give at least one path.")
    limits = {"max_bytes": dataset.max_bytes or 1, "max_line_bytes": dataset.max_line_bytes,
              "mix_ratio": dataset.mix_ratio}
    for name, number in limits.items():
        if not (number > 0 and math.isfinite(number)) or getattr(dataset, name) == 0:
            raise FieldError(f"{where}.{name}", f"{getattr(dataset, name)} is not above 0",
                             "Give a positive number.")
    if not 0 < dataset.max_loss <= 1:
        raise FieldError(f"{where}.max_loss", f"{dataset.max_loss} is not in (0, 1]",
                         "0.9 stops when more than 90 % of the rows are dropped, 1.0 never stops.")
    if dataset.separator == "":
        raise FieldError(f"{where}.separator", "is empty", "Leave it out for one document a file.")
    for index, item in enumerate(dataset.filters):
        make_filter(item, f"{where}.filters[{index}]")
    _check_source(dataset, where)


def _check_source(dataset: DatasetConfig, where: str) -> None:
    first, kind = paths_of(dataset)[0], format_of(dataset)
    allowed = {PYTHON_STDLIB: ("code", "docstrings"), PACKAGE_METADATA: ("text",)}.get(first)
    if allowed and (kind not in allowed or len(paths_of(dataset)) > 1):
        raise FieldError(f"{where}.format", f"source {first} has no format {kind!r}",
                         f"Use {' or '.join(allowed)}.")
    if kind == "unknown":
        raise FieldError(
            f"{where}.source", f"{first!r} is neither {PYTHON_STDLIB} nor {PACKAGE_METADATA}, and its suffix "
            "tells no format", "Add format: jsonl, text, parquet, code, docstrings or huggingface.")
    if dataset.separator is not None and (kind != "text" or allowed):
        raise FieldError(f"{where}.separator", f"is for text files, not for {kind}", "Leave it out.")
    if kind != "huggingface":
        for name, default in (("subset", None), ("revision", None), ("splits", ("train",))):
            if getattr(dataset, name) != default:
                raise FieldError(f"{where}.{name}", f"is for hub datasets, not for {kind}",
                                 "Leave it out, or set format: huggingface.")
        for path in paths_of(dataset):
            expand_variables(path, f"{where}.source")


def removes_duplicates(dataset: DatasetConfig) -> bool:
    """Whether the dataset asks for exact duplicates to be dropped."""
    return any(isinstance(item, ExactDuplicateFilter) for item in dataset.built_filters)
