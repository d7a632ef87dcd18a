"""What a filter is: documents in, one reason (or none), scores and perhaps a new text per document out.

Owns the types that every filter and every caller shares, and what identifies a filter (`filter_key`). Knows no
filter, and nothing of files of documents.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import polars as pl

from data_pipeline.filters.words import Definition, WordTable, word_table
from data_pipeline.text.words import WordHashes, word_hashes
from nanollama.data.strict import to_mapping


@dataclasses.dataclass(frozen=True)
class Batch:
    """Documents of one shard or a slice of it; all columns aligned."""

    ids: pl.Series  # String, "dataset/id"
    text: pl.Series  # String
    meta: list[dict[str, Any]]  # parsed; may hold date, year, url, lang, title, score ...

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.text) == len(self.meta):
            raise ValueError(f"columns of {len(self.ids)} ids, {len(self.text)} texts and {len(self.meta)} "
                             "meta are not aligned: give one of each per document.")
        if self.text.null_count():
            raise ValueError(f"{self.text.null_count()} documents have no text: leave them out before filtering.")

    def __len__(self) -> int:
        return len(self.text)

    def word_table(self, definition: Definition) -> WordTable:
        """The words of the texts, made once for all filters that ask."""
        if definition not in self._tables:
            self._tables[definition] = word_table(self.text, definition)
        return self._tables[definition]

    @functools.cached_property
    def _tables(self) -> dict[str, WordTable]:
        return {}

    @functools.cached_property
    def words(self) -> WordHashes:
        """The words of the texts, hashed once for all steps that are given this batch."""
        return word_hashes(self.text)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One entry per document."""

    reasons: pl.Series  # String; null = keep
    scores: dict[str, pl.Series] = dataclasses.field(default_factory=dict)  # stored beside the documents
    text: pl.Series | None = None  # the new text, from filters that rewrite (cleaning, masking)


class Filter(Protocol):
    """One filter: a frozen dataclass whose fields are the parameters of the mixture file."""

    version: ClassVar[int]  # raised when the same input would be judged otherwise

    @property
    def type(self) -> str:
        """The name by which a mixture file asks for it."""

    def judge(self, batch: Batch) -> Judgement:
        """A judgement of each document of `batch`, which depends on that document alone."""

    def resources(self) -> dict[str, str]:
        """SHA-256 of every model or list file that the judgement depends on, by name."""

    def check(self, where: str) -> None:
        """Raises FieldError on a parameter that cannot be used. `where` names the filter in the file."""


class Parameters:
    """Defaults of a filter that reads no file and takes every value of its fields' types."""

    version: ClassVar[int] = 1

    def resources(self) -> dict[str, str]:
        """No file."""
        return {}

    def check(self, where: str) -> None:
        """Nothing to refuse."""


def filter_key(item: Filter) -> dict[str, Any]:
    """What decides a filter's judgement, as plain JSON: hash it into the key of a stage."""
    return {"fields": to_mapping(item), "version": item.version, "resources": item.resources()}


def make_batch(texts: Sequence[str], ids: Sequence[str] | None = None,
               meta: Sequence[dict[str, Any]] | None = None) -> Batch:
    """A batch of plain Python values. Raises ValueError on a lone surrogate, which no UTF-8 can hold."""
    try:
        text = pl.Series("text", list(texts), dtype=pl.String)
    except UnicodeEncodeError as error:
        raise ValueError(f"a text has a lone surrogate ({error}): leave it out before filtering.") from error
    return Batch(pl.Series("ids", [str(number) for number in range(len(texts))] if ids is None else list(ids),
                           dtype=pl.String),
                 text,
                 [{} for _ in texts] if meta is None else list(meta))


def keep_all(batch: Batch) -> pl.Series:
    """Reasons that drop nothing."""
    return pl.Series("reason", [None] * len(batch), dtype=pl.String)
