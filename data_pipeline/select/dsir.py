"""DSIR: documents are kept by how much more likely the target's text makes their n-grams than the corpus's does.

A document is a bag of words and word pairs, hashed to `buckets`; with p the buckets' shares in the target and q in the
corpus, log w_d = sum over its n-grams of log(p + 1e-8) - log(q + 1e-8), and `rate` of the documents are drawn without
replacement in proportion to w (Gumbel top-k). Xie et al. 2023, "Data Selection for Language Models via Importance
Resampling", arXiv:2302.03169.

`hashing: sha256` has the words, buckets and weights of the authors' package, to the last bits; `words` (the default)
takes the hashes that deduplication has made anyway, without punctuation, and costs next to nothing.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.spool import file_array
from data_pipeline.engine.variables import expand_variables
from data_pipeline.filters.base import Batch
from data_pipeline.filters.corpus_step import FeatureFile
from data_pipeline.select.resample import Floats, draws, gumbel_keys, top
from data_pipeline.sources import open_source, read_all
from data_pipeline.sources.dataset import DatasetConfig
from data_pipeline.text import words
from data_pipeline.text.documents import Document
from data_pipeline.text.words import Hashes, Positions, WordHashes, word_hashes
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

REASON = "not selected by importance"
_SMALL = 1e-8  # added to every share, as the authors do
_TARGET_BATCH = 256  # documents of the target hashed at a time
Buckets = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True)
class ImportanceResampling:
    """Keeps `rate` of each source's documents (or of the corpus's), those whose n-grams are most like the target's."""

    type: Literal["dsir"] = "dsir"
    target: tuple[str, ...] = ()  # datasets of this mixture, kept whole, or files
    rate: float = 0.95
    level: Literal["source", "corpus"] = "source"  # documents compete inside their dataset, or with all
    hashing: Literal["words", "sha256"] = "words"
    buckets: int = 10_000
    noise: bool = True  # draw in proportion to the weights; off: just the largest weights
    seed: int = 0
    version: ClassVar[int] = 1

    def check(self, where: str) -> None:
        """Raises FieldError on a parameter that cannot be used."""
        if not self.target:
            raise FieldError(f"{where}.target", "names nothing", "Name a dataset of the mixture or a file.")
        if not 0 < self.rate <= 1:
            raise FieldError(f"{where}.rate", f"{self.rate} is not in (0, 1]", "Try 0.95.")
        if not 1 <= self.buckets <= 1 << 16:
            raise FieldError(f"{where}.buckets", f"{self.buckets} is not in 1 to 65536", "Try 10000.")

    def features(self, batch: Batch) -> pa.Table:
        """row, buckets of all n-grams (in no meant order)."""
        offsets, values = self._bucketed(batch.words if self.hashing == "words" else None, batch.text)
        return pa.table({"row": pa.array(range(len(batch)), pa.int32()),
                         "buckets": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))})

    def resolve(self, shards: Sequence[FeatureFile], work: Path) -> Iterator[pa.Table]:
        """row, reason, log_importance. In memory: 16 bytes a document of one dataset (or of the corpus)."""
        names = {shard.dataset for shard in shards}
        corpus = np.zeros(self.buckets, np.int64)
        target = np.zeros(self.buckets, np.int64)
        for shard in shards:
            for _, values in _read(shard):
                counts = np.bincount(values, minlength=self.buckets)
                corpus += counts
                if shard.dataset in self.target:
                    target += counts
        for path in self.target:
            if path not in names:
                target += self._count_file(path)
        gain = log_gain(target, corpus)
        first = np.append(0, np.cumsum([shard.rows for shard in shards])).astype(np.int64)
        weights = file_array(work / "log_importance", int(first[-1]), np.float64)
        for start, shard in zip(first, shards, strict=False):
            at = int(start)
            for offsets, values in _read(shard):
                weights[at:at + len(offsets) - 1] = log_weights(offsets, values, gain)
                at += len(offsets) - 1
        kept = self._choose(shards, first, weights)
        for number, shard in enumerate(shards):
            part = slice(first[number], first[number + 1])
            reasons = [None if keep else REASON for keep in kept[part].tolist()]
            yield pa.table({"row": pa.array(range(shard.rows), pa.int32()), "reason": pa.array(reasons, pa.string()),
                            "log_importance": pa.array(np.array(weights[part]))})

    def resources(self) -> dict[str, str]:
        """The content of the target's files. A name without a file is a dataset's, whose shards are in the key."""
        result = {"words": str(words.VERSION)}
        for path in self.target:
            dataset = _dataset(path)
            if dataset is not None:
                result[path] = " ".join(one.sha256 for part in open_source(dataset).parts() for one in part.inputs())
        return result

    def _bucketed(self, made: WordHashes | None, texts: pl.Series) -> tuple[Positions, Buckets]:
        if self.hashing == "sha256":
            rows = [sha256_buckets(text, self.buckets) for text in texts.fill_null("").to_list()]
            return (np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int64),
                    np.array([value for row in rows for value in row], np.uint16))
        made = made or word_hashes(texts)
        return hashed_buckets(made, self.buckets)

    def _count_file(self, path: str) -> npt.NDArray[np.int64]:
        dataset = _dataset(path)
        if dataset is None:
            raise DataError(f"selection: target {path!r} is no dataset of this mixture and no file. Name one of them.")
        counts = np.zeros(self.buckets, np.int64)
        texts: list[str] = []

        def add() -> None:
            counts[:] += np.bincount(self._bucketed(None, pl.Series(texts, dtype=pl.String))[1], minlength=self.buckets)
            texts.clear()

        for item in read_all(open_source(dataset)):
            if isinstance(item, Document):
                texts.append(item.text)
            if len(texts) == _TARGET_BATCH:
                add()
        add()
        return counts

    def _choose(self, shards: Sequence[FeatureFile], first: Positions, weights: Floats) -> npt.NDArray[np.bool_]:
        kept = np.zeros(len(weights), dtype=bool)
        groups: dict[str, list[int]] = {}
        for number, shard in enumerate(shards):
            if shard.dataset in self.target:
                kept[first[number]:first[number + 1]] = True
            else:
                groups.setdefault(shard.dataset if self.level == "source" else "", []).append(number)
        for numbers in groups.values():
            docs = np.concatenate([np.arange(first[number], first[number + 1]) for number in numbers])
            keys = np.array(weights[docs])
            if self.noise:
                uniform = [draws(pq.read_table(shards[number].documents, columns=["id"])["id"].to_pylist(),
                                 self.seed, "dsir") for number in numbers]
                keys = gumbel_keys(keys, np.concatenate(uniform))
            kept[docs[top(keys, round(self.rate * len(docs)))]] = True
        return kept


def log_gain(target: npt.NDArray[np.int64], corpus: npt.NDArray[np.int64]) -> Floats:
    """For every bucket log(p + 1e-8) - log(q + 1e-8). Errors: DataError when either has no text."""
    if target.sum() == 0 or corpus.sum() == 0:
        raise DataError("selection by importance: the target or the corpus has not one word. Check the target's "
                        "files and their text field.")
    return np.log(target / target.sum() + _SMALL) - np.log(corpus / corpus.sum() + _SMALL)


def log_weights(offsets: Positions, values: npt.NDArray[Any], gain: Floats) -> Floats:
    """log w of every document: the sum of its n-grams' gains."""
    sums = np.zeros(len(offsets) - 1)
    filled = np.flatnonzero(np.diff(offsets) > 0)
    if len(filled):
        sums[filled] = np.add.reduceat(gain[values], offsets[filled])
    return sums


def hashed_buckets(made: WordHashes, buckets: int) -> tuple[Positions, Buckets]:
    """Buckets of the words and word pairs of every document: first all its words, then its pairs."""
    pair_offsets, pairs = made.ngrams(2)
    offsets = made.offsets + pair_offsets
    values = np.empty(int(offsets[-1]), np.uint16)
    at = np.arange(len(made.hashes)) + np.repeat(pair_offsets[:-1], np.diff(made.offsets))
    values[at] = _bucket(made.hashes, buckets)
    at = np.arange(len(pairs)) + np.repeat(made.offsets[1:], np.diff(pair_offsets))
    values[at] = _bucket(pairs, buckets)
    return offsets, values


def sha256_buckets(text: str, buckets: int) -> list[int]:
    """The same as the data-selection package counts: words and punctuation runs, SHA-256 of the joined n-gram."""
    found = _splitter()(text.lower())
    pairs = [f"{one} {other}" for one, other in itertools.pairwise(found)]
    return [_sha256_bucket(gram, buckets) for gram in [*found, *pairs]]


def _bucket(hashes: Hashes, buckets: int) -> Hashes:
    return ((hashes >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)


@functools.lru_cache(maxsize=1 << 20)
def _sha256_bucket(gram: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(gram.encode()).digest(), "big") % buckets


@functools.cache
def _splitter() -> Callable[[str], list[str]]:
    try:
        import regex
    except ImportError as error:
        raise DataError("hashing: sha256 needs the package regex, whose words differ from those of re. Install it "
                        "with: pip install 'nanollama[curate]', or use hashing: words") from error
    pattern: Any = regex.compile(r"\w+|[^\w\s]+")
    return pattern.findall


def _read(shard: FeatureFile) -> Iterator[tuple[Positions, npt.NDArray[Any]]]:
    with pq.ParquetFile(shard.path) as file:
        for part in file.iter_batches(256, columns=["buckets"]):
            offsets = part["buckets"].offsets.to_numpy()
            yield offsets - offsets[0], part["buckets"].flatten().to_numpy()


def _dataset(path: str) -> DatasetConfig | None:
    """A dataset that reads `path`, or None where it names no file."""
    if not any(mark in path for mark in "/.*$"):
        return None
    return DatasetConfig("target", expand_variables(path, "target"), 1.0)
