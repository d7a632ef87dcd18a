"""One dataset of a mixture: where its text is, what of it is kept, how much it weighs.

Owns the frozen dataclass that sources read and what follows from its fields alone. Knows nothing of the other datasets,
of YAML, or of how a source is read.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from data_pipeline.filters import ExactDuplicateFilter, Filter, make_filter
from data_pipeline.sources.conversations import LAYOUTS

PYTHON_STDLIB, PACKAGE_METADATA = "python-stdlib", "package-metadata"
_SUFFIX_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".md": "text",
                   ".rst": "text", ".parquet": "parquet", ".arrow": "arrow", ".warc": "warc"}
BYTES_PER_TOKEN = 4.0  # where no tokenizer is at hand: English under a vocabulary of 32,000 (docs/log.md)


@dataclasses.dataclass(frozen=True)
class DatasetSampling:
    """How much of one dataset is taken, and how often it may be repeated."""

    rate: float = 1.0  # share of its documents, drawn by hash after all filters
    max_epochs: float | None = None  # passes in training at most; a mixture that needs more is refused
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One dataset of the mixture: where its text is, what of it is kept, how much it weighs."""

    name: str
    # python-stdlib, package-metadata, path(s) with globs and ${VARIABLES}, or the id of a hub dataset
    source: str | tuple[str, ...]
    # Share of training; all of a mixture sum to 1. Left out (0) where sampling.method computes it: a loaded
    # mixture always has it.
    mix_ratio: float = 0.0
    format: Literal["auto", "jsonl", "json", "text", "parquet", "arrow", "warc", "code", "docstrings",
                    "huggingface", "tfds"] = "auto"
    rows: Literal["text", "chat", "preference", "prompt"] = "text"  # what a row is
    layout: str | None = None  # how a chat, preference or prompt row is written; see conversations.LAYOUTS
    fields: dict[str, str] | None = None  # fields of the layout that are called otherwise here
    text_field: str = "text"
    date_field: str = "date"  # the oldest duplicate is kept; for temporal sampling
    id_field: str | None = None  # a field that names the document; default: path and line
    meta_fields: tuple[str, ...] | None = None  # fields kept beside the text; default: every scalar one
    separator: str | None = None  # splits a text file into documents; default: one file, one document
    splits: tuple[str, ...] = ("train",)  # of a hub dataset
    subset: str | None = None  # configuration name of a hub dataset
    data_dir: str | None = None  # folder of a hub dataset that has no configurations
    revision: str | None = None  # commit of a hub dataset, so that it never changes
    estimated_tokens: int | None = None
    licence: str | None = None  # shown in the data card
    filters: tuple[dict, ...] = ()  # after those of the mixture
    sampling: DatasetSampling = DatasetSampling()
    max_bytes: int | None = None  # UTF-8 bytes of text taken at most
    cap_order: Literal["hash", "head"] = "hash"  # max_bytes takes an even sample, or the first documents
    on_error: Literal["skip", "stop"] = "skip"  # a broken row: count it and go on, or stop
    max_line_bytes: int = 50_000_000  # a longer line or document is broken; never held whole in memory
    max_loss: float = 0.9  # stop when more than this share of the rows is dropped

    @property
    def built_filters(self) -> tuple[Filter, ...]:
        """The filters as objects, in the order of the file."""
        return tuple(make_filter(item, "filters") for item in self.filters)


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


def brings_ids(dataset: DatasetConfig) -> bool:
    """Whether documents have ids of their own, which may come twice; ids made of file and line cannot."""
    return dataset.id_field is not None or format_of(dataset) == "warc"


def available_tokens(dataset: DatasetConfig) -> float | None:
    """Tokens of one pass over what is taken of the dataset, as far as the file says."""
    if dataset.estimated_tokens is None:
        return None
    taken = dataset.estimated_tokens * dataset.sampling.rate
    return min(taken, dataset.max_bytes / BYTES_PER_TOKEN) if dataset.max_bytes else taken


def layout_of(dataset: DatasetConfig) -> dict[str, str]:
    """{field of the layout: its name in this dataset's rows}, for rows that are no plain text."""
    assert dataset.rows != "text" and dataset.layout is not None
    usual = {field: name for field, (name, _) in LAYOUTS[dataset.rows][dataset.layout].items()}
    return usual | (dataset.fields or {})


def removes_duplicates(dataset: DatasetConfig) -> bool:
    """Whether the dataset asks for exact duplicates to be dropped."""
    return any(isinstance(item, ExactDuplicateFilter) for item in dataset.built_filters)
