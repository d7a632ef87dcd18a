"""What is in a corpus, measured: shares, lengths, languages, and what each filter took.

Owns reading a corpus and its packed sets, in one pass and bounded memory. Knows nothing of pages or files to write.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from data_pipeline.curation.account import WISHES
from data_pipeline.curation.corpus_format import read_manifest, read_shard
from data_pipeline.engine.progress import Progress
from data_pipeline.sources.dataset import BYTES_PER_TOKEN
from data_pipeline.text.documents import language_of
from nanollama.data.files import DataError, read_json
from nanollama.data.packed import DOCUMENTS_FILE, MANIFEST_FILE

BINS_PER_OCTAVE = 8  # a percentile is known to within 9 %
_BINS = 64 * BINS_PER_OCTAVE


@dataclasses.dataclass
class Lengths:
    """How long documents are: a histogram with eight bins a doubling."""

    unit: str
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(_BINS, np.int64))
    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(_BINS, np.float64))
    longest: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count documents of these lengths."""
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return
        bins = np.minimum((np.log2(lengths) * BINS_PER_OCTAVE).astype(np.int64), _BINS - 1)
        self.counts += np.bincount(bins, minlength=_BINS)
        self.sums += np.bincount(bins, weights=lengths, minlength=_BINS)
        self.longest = max(self.longest, int(lengths.max()))

    @property
    def documents(self) -> int:
        """Documents counted."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean length."""
        return float(self.sums.sum()) / max(self.documents, 1)

    def percentile(self, share: float) -> float:
        """The length that `share` of the documents do not exceed: the mean of the bin it falls into."""
        at = int(np.searchsorted(np.cumsum(self.counts), share * self.documents - 1e-9))
        at = min(at, _BINS - 1)
        return float(self.sums[at] / self.counts[at]) if self.counts[at] else 0.0

    def octaves(self) -> list[tuple[float, float, int, float]]:
        """(from, to, documents, summed length) by half doublings, from the first that has any to the last."""
        step = BINS_PER_OCTAVE // 2
        counts = self.counts.reshape(-1, step).sum(1)
        sums = self.sums.reshape(-1, step).sum(1)
        used = np.flatnonzero(counts)
        if not len(used):
            return []
        return [(2.0**(bin / 2), 2.0**((bin + 1) / 2), int(counts[bin]), float(sums[bin]))
                for bin in range(used[0], used[-1] + 1)]


@dataclasses.dataclass
class Dataset:
    """One dataset of the corpus."""

    name: str
    weight: float
    rows_in: int
    kept: int
    bytes: int
    characters: int
    tokens: float
    measured: bool  # tokens are counted, not estimated from bytes
    expected_tokens: float | None
    estimated_tokens: int | None  # what the mixture file says there would be
    yields: list[dict[str, Any]]  # {stage, reason, rows, wished: not taken by choice, so no loss}
    lengths: Lengths = dataclasses.field(default_factory=lambda: Lengths("characters"))
    token_lengths: Lengths = dataclasses.field(default_factory=lambda: Lengths("tokens"))
    languages: dict[str, int] = dataclasses.field(default_factory=dict)  # documents

    @property
    def wanted(self) -> int:
        """Rows that the mixture's caps, samples and selection did not wish away."""
        return self.rows_in - sum(item["rows"] for item in self.yields if item["wished"])

    @property
    def epochs(self) -> float | None:
        """How often training goes over what is here."""
        return None if self.expected_tokens is None or not self.tokens else self.expected_tokens / self.tokens


@dataclasses.dataclass
class Analysis:
    """Everything measured of a corpus."""

    mixture: dict[str, Any]
    manifest_sha256: str
    datasets: list[Dataset]
    packed: list[str]

    @property
    def metadata(self) -> dict[str, Any]:
        """The mixture's metadata."""
        return dict(self.mixture["config"]["metadata"])

    def share(self, dataset: Dataset, what: str) -> float:
        """The dataset's share of the corpus's bytes, characters or tokens."""
        return getattr(dataset, what) / max(math.fsum(getattr(one, what) for one in self.datasets), 1)

    def total(self, what: str) -> float:
        """Sum over the datasets."""
        return math.fsum(getattr(one, what) for one in self.datasets)


def analyze(corpus: str | os.PathLike[str], packed: str | os.PathLike[str] | None = None,
            total_tokens: float | None = None, progress: Progress | None = None) -> Analysis:
    """Measure the corpus in `corpus`; tokens from the packed set(s) in `packed`, if given. Errors: DataError.

    `total_tokens`: of training; default the mixture's.
    """
    manifest, sha256 = read_manifest(corpus)
    sets = _packed_sets(packed, sha256) if packed is not None else []
    tokens = _packed_tokens(sets)
    total = total_tokens or manifest["mixture"]["config"]["metadata"]["total_tokens"]
    settings = {row["name"]: row for row in manifest["mixture"]["config"]["datasets"]}
    datasets = {}
    for row in manifest["datasets"]:
        measured = row["name"] in tokens or bool(sets and not row["kept"])  # of nothing there is no packed set
        datasets[row["name"]] = Dataset(
            row["name"], row["mix_ratio"], row["rows_in"], row["kept"], row["bytes"], row["characters"],
            tokens.get(row["name"], 0) if measured else row["bytes"] / BYTES_PER_TOKEN, measured,
            None if total is None else total * row["mix_ratio"], settings[row["name"]].get("estimated_tokens"),
            _yields(row))
    for shard in manifest["shards"]:
        _read_shard(corpus, shard, datasets[shard["dataset"]], progress)
    for directory, _ in sets:
        _read_documents(directory, datasets)
    return Analysis(manifest["mixture"], sha256, list(datasets.values()), [str(directory) for directory, _ in sets])


def _yields(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What was dropped, stage by stage, the largest reasons first."""
    return [{"stage": stage["stage"], "reason": reason, "rows": count, "wished": stage["section"] in WISHES}
            for stage in row["stages"]
            for reason, count in sorted(stage["dropped"].items(), key=lambda item: (-item[1], item[0]))]


def _read_shard(corpus: str | os.PathLike[str], shard: dict[str, Any], dataset: Dataset,
                progress: Progress | None) -> None:
    held: list[int] = []
    for row in read_shard(corpus, shard):
        held.append(len(row["text"]))
        language = language_of(row["meta"])
        dataset.languages[language] = dataset.languages.get(language, 0) + 1
        if len(held) == 4096:
            dataset.lengths.add(np.array(held))
            held.clear()
            if progress is not None:
                progress.update(dataset.name, dataset.lengths.documents / max(dataset.kept, 1))
    dataset.lengths.add(np.array(held, np.int64))


def _packed_sets(packed: str | os.PathLike[str], corpus_sha256: str) -> list[tuple[Path, dict[str, Any]]]:
    """The packed set in `packed`, or the sets in its folders. Errors: DataError when they are of another corpus."""
    root = Path(packed)
    directories = [root] if (root / MANIFEST_FILE).is_file() else sorted(
        path.parent for path in root.glob(f"*/{MANIFEST_FILE}"))
    sets = [(directory, read_json(directory / MANIFEST_FILE)) for directory in directories]
    if not sets:
        raise DataError(f"{packed}: no packed set there, and none in its folders. Make it with: "
                        "python -m data_pipeline.pack")
    for directory, manifest in sets:
        if manifest.get("kind") != "packed":
            raise DataError(f"{directory}: not a packed set. Give the --output of data_pipeline.pack.")
        if manifest["corpus"]["manifest_sha256"] != corpus_sha256:
            raise DataError(f"{directory}: packed from another corpus than the one analysed. Pack it again, or give "
                            "the --corpus it was made from.")
    return sets


def _packed_tokens(sets: list[tuple[Path, dict[str, Any]]]) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for _, manifest in sets:
        for counts in manifest["source_counts"].values():
            for source, row in counts.items():
                tokens[source] = tokens.get(source, 0) + row["tokens"]
    return tokens


def _read_documents(directory: Path, datasets: dict[str, Dataset]) -> None:
    with pyarrow.parquet.ParquetFile(directory / DOCUMENTS_FILE) as file:
        for batch in file.iter_batches(batch_size=65_536, columns=["source", "tokens"]):
            sources = np.asarray(batch.column("source").to_pylist(), object)
            lengths = batch.column("tokens").to_numpy(zero_copy_only=False).astype(np.int64)
            for name in set(sources.tolist()):
                datasets[name].token_lengths.add(lengths[sources == name])
