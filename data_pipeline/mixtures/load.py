"""A mixture file (YAML): what text a corpus is made of. From the file to frozen dataclasses, strictly.

Owns every check that needs no data, and the weights that a sampling method computes; an error names file,
line, field, the nearest valid name and the fix. Knows nothing of how sources are read.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from data_pipeline.engine.variables import expand_variables
from data_pipeline.engine.yaml_lines import YamlError, line_of, load_with_lines
from data_pipeline.filters import Filter, make_filter
from data_pipeline.filters.url_blocklist import UrlBlocklistFilter
from data_pipeline.mixtures.schema import Metadata, MixtureConfig, epochs_of
from data_pipeline.mixtures.steps import BY_SIZE, SECTIONS, make_sampling, make_step
from data_pipeline.sources.conversations import LAYOUTS
from data_pipeline.sources.dataset import (
    PACKAGE_METADATA,
    PYTHON_STDLIB,
    DatasetConfig,
    available_tokens,
    format_of,
    paths_of,
)
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError, from_mapping, nearest, to_mapping

ROOT = "mixture"
RATIO_SLACK = 1e-3  # what the mix_ratio may miss 1 by


class MixtureError(DataError):
    """A mixture file that cannot be used; names file, line, field, what is wrong and how to mend it."""


def load_mixture(path: str | os.PathLike[str]) -> MixtureConfig:
    """Read and check the mixture file at `path`; weights that its sampling method computes are filled in.

    Raises MixtureError.
    """
    try:
        value, lines = load_with_lines(path, ROOT)
    except YamlError as error:
        raise MixtureError(str(error)) from error
    try:
        mixture = from_mapping(MixtureConfig, value, ROOT)
        _check(mixture, given=[isinstance(row, dict) and "mix_ratio" in row for row in value["datasets"]])
        mixture = _resolved(mixture)
    except FieldError as error:
        field = error.field.removeprefix(f"{ROOT}.")
        raise MixtureError(
            f"{path}:{line_of(error.field, lines)}: {field}: {error.problem}. {error.fix}") from error
    return mixture


def mixture_mapping(mixture: MixtureConfig) -> dict[str, Any]:
    """The resolved mixture as plain JSON: what is hashed and recorded. ${VARIABLES} stay unexpanded."""
    return to_mapping(mixture)


def _resolved(mixture: MixtureConfig) -> MixtureConfig:
    """The mixture with its common filters in every dataset, and the weights that its method computes."""
    datasets = [dataclasses.replace(dataset, filters=mixture.filters + dataset.filters)
                for dataset in mixture.datasets]
    method = mixture.built_sampling
    if method.method in BY_SIZE:
        sizes = [available_tokens(dataset) or 0.0 for dataset in datasets]
        weights = method.weights(sizes, mixture.metadata.total_tokens)
        datasets = [dataclasses.replace(dataset, mix_ratio=weight)
                    for dataset, weight in zip(datasets, weights, strict=True)]
    mixture = dataclasses.replace(mixture, datasets=tuple(datasets), filters=())
    _check_epochs(mixture)
    return mixture


def _check_epochs(mixture: MixtureConfig) -> None:
    for index, dataset in enumerate(mixture.datasets):
        epochs, most = epochs_of(dataset, mixture.metadata), dataset.sampling.max_epochs
        if most is not None and epochs is not None and epochs > most * (1 + RATIO_SLACK):
            raise FieldError(f"{ROOT}.datasets[{index}].sampling.max_epochs",
                             f"{most:g}, but mix_ratio {dataset.mix_ratio:.4g} of {mixture.metadata.total_tokens:,} "
                             f"tokens is {epochs:.2f} epochs of the dataset", "Lower its mix_ratio, or raise this.")


def _check(mixture: MixtureConfig, given: list[bool]) -> None:
    """`given`: for each dataset, whether the file states its mix_ratio."""
    where = f"{ROOT}.datasets"
    if not mixture.datasets:
        raise FieldError(where, "has no dataset", "Give at least one.")
    common = [make_filter(item, f"{ROOT}.filters[{index}]") for index, item in enumerate(mixture.filters)]
    for section in SECTIONS:
        for index, item in enumerate(getattr(mixture, section)):
            make_step(section, item, f"{ROOT}.{section}[{index}]")
    _check_targets(mixture)
    _check_metadata(mixture.metadata)
    names: set[str] = set()
    for index, dataset in enumerate(mixture.datasets):
        _check_dataset(dataset, f"{where}[{index}]", common)
        if dataset.name in names:
            raise FieldError(f"{where}[{index}].name", f"{dataset.name!r} is used twice",
                             "Names must differ: they are part of every document's id.")
        names.add(dataset.name)
    _check_weights(mixture, where, given)
    if not 0 <= mixture.validation.ratio < 1:
        raise FieldError(f"{ROOT}.validation.ratio", f"{mixture.validation.ratio} is not in [0, 1)",
                         "Try 0.02.")


def _check_targets(mixture: MixtureConfig) -> None:
    """What a selection step is to be like is a dataset of the mixture, or a file."""
    names = [dataset.name for dataset in mixture.datasets]
    for index, item in enumerate(mixture.selection):
        for target in item.get("target", ()):
            if target not in names and not any(mark in target for mark in "/.$*"):
                raise FieldError(f"{ROOT}.selection[{index}].target", f"{target!r} is neither a dataset of the mixture "
                                 "nor a path", nearest(target, names))


def _check_metadata(metadata: Metadata) -> None:
    for name in ("total_tokens", "steps", "max_seq_length"):
        value = getattr(metadata, name)
        if value is not None and value < 1:
            raise FieldError(f"{ROOT}.metadata.{name}", f"{value} is not above 0", "Give a positive number.")


def _check_weights(mixture: MixtureConfig, where: str, given: list[bool]) -> None:
    method = make_sampling(mixture.sampling, f"{ROOT}.sampling").method
    if method in BY_SIZE:
        for index, dataset in enumerate(mixture.datasets):
            if given[index]:
                raise FieldError(f"{where}[{index}].mix_ratio", f"is computed by sampling.method {method!r}",
                                 "Leave it out, or use method: weighted.")
            if dataset.estimated_tokens is None:
                raise FieldError(f"{where}[{index}].estimated_tokens", "is missing",
                                 f"sampling.method {method!r} computes the weights from it.")
        if method == "unimax" and mixture.metadata.total_tokens is None:
            raise FieldError(f"{ROOT}.metadata.total_tokens", "is missing",
                             "UniMax spreads it over the datasets.")
        return
    for index, dataset in enumerate(mixture.datasets):
        if not given[index]:
            raise FieldError(f"{where}[{index}].mix_ratio", "is missing", "Give it a value of type float.")
        if not (dataset.mix_ratio > 0 and math.isfinite(dataset.mix_ratio)):
            raise FieldError(f"{where}[{index}].mix_ratio", f"{dataset.mix_ratio} is not above 0",
                             "Give a positive number.")
    total = math.fsum(dataset.mix_ratio for dataset in mixture.datasets)
    if abs(total - 1) > RATIO_SLACK:
        raise FieldError(where, f"the mix_ratio of all datasets sum to {total:.6g}, not 1",
                         "Divide each of them by that sum.")


def _check_dataset(dataset: DatasetConfig, where: str, common: Sequence[Filter]) -> None:
    """`common`: the filters of every dataset."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", dataset.name):
        raise FieldError(f"{where}.name", f"{dataset.name!r} is not a plain name",
                         "Use letters, digits, '.', '_' and '-' only.")
    if not paths_of(dataset):
        raise FieldError(f"{where}.source", "is an empty list", "Give at least one path.")
    for name in ("max_bytes", "max_line_bytes", "estimated_tokens"):
        number = getattr(dataset, name)
        if number is not None and number <= 0:
            raise FieldError(f"{where}.{name}", f"{number} is not above 0", "Give a positive number.")
    if not 0 < dataset.sampling.rate <= 1:
        raise FieldError(f"{where}.sampling.rate", f"{dataset.sampling.rate} is not in (0, 1]",
                         "1.0 takes every document.")
    if dataset.sampling.max_epochs is not None and not dataset.sampling.max_epochs > 0:
        raise FieldError(f"{where}.sampling.max_epochs", f"{dataset.sampling.max_epochs} is not above 0",
                         "Give a positive number, such as 4.")
    if not 0 < dataset.max_loss <= 1:
        raise FieldError(f"{where}.max_loss", f"{dataset.max_loss} is not in (0, 1]",
                         "0.9 stops when more than 90 % of the rows are dropped, 1.0 never stops.")
    if dataset.separator == "":
        raise FieldError(f"{where}.separator", "is empty", "Leave it out for one document a file.")
    own = [make_filter(item, f"{where}.filters[{index}]") for index, item in enumerate(dataset.filters)]
    if dataset.meta_fields is not None:
        for judge in [*common, *own]:
            if isinstance(judge, UrlBlocklistFilter) and judge.field not in dataset.meta_fields:
                raise FieldError(f"{where}.meta_fields", f"leaves out {judge.field!r}, which a filter url_blocklist "
                                 "looks at", "Add it, or the filter would keep everything.")
    _check_rows(dataset, where)
    _check_source(dataset, where)


def _check_rows(dataset: DatasetConfig, where: str) -> None:
    if dataset.rows == "text":
        for name in ("layout", "fields"):
            if getattr(dataset, name) is not None:
                raise FieldError(f"{where}.{name}", "is for rows of chat, preference or prompt",
                                 "Leave it out, or set rows.")
        return
    layouts = LAYOUTS[dataset.rows]
    if dataset.layout is None:
        raise FieldError(f"{where}.layout", "is missing",
                         f"How are the {dataset.rows} rows written? One of {', '.join(layouts)}.")
    if dataset.layout not in layouts:
        raise FieldError(f"{where}.layout", f"{dataset.rows} rows have no layout {dataset.layout!r}",
                         nearest(dataset.layout, list(layouts)))
    for name in dataset.fields or {}:
        if name not in layouts[dataset.layout]:
            raise FieldError(f"{where}.fields.{name}", f"layout {dataset.layout} has no such field",
                             nearest(name, list(layouts[dataset.layout])))


def _check_source(dataset: DatasetConfig, where: str) -> None:
    first, kind = paths_of(dataset)[0], format_of(dataset)
    allowed = {PYTHON_STDLIB: ("code", "docstrings"), PACKAGE_METADATA: ("text",)}.get(first)
    if allowed and (kind not in allowed or len(paths_of(dataset)) > 1):
        raise FieldError(f"{where}.format", f"source {first} has no format {kind!r}",
                         f"Use {' or '.join(allowed)}.")
    if kind == "unknown":
        raise FieldError(
            f"{where}.source", f"{first!r} is neither {PYTHON_STDLIB} nor {PACKAGE_METADATA}, and its suffix "
            "tells no format", "Add format: jsonl, json, text, parquet, arrow, warc, code, docstrings, "
            "huggingface or tfds.")
    if dataset.separator is not None and (kind != "text" or allowed):
        raise FieldError(f"{where}.separator", f"is for text files, not for {kind}", "Leave it out.")
    if kind not in ("huggingface", "tfds"):
        for name, default in (("subset", None), ("data_dir", None), ("revision", None), ("splits", ("train",))):
            if getattr(dataset, name) != default:
                raise FieldError(f"{where}.{name}", f"is for hub datasets, not for {kind}",
                                 "Leave it out, or set format: huggingface.")
        for path in paths_of(dataset):
            expand_variables(path, f"{where}.source")
