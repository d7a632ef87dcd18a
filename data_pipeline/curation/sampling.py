"""Step four of the corpus command: how much of each dataset is taken, by the hash of its texts or from its head.

Owns the shares (`sampling.rate`) and the caps (`max_bytes`). A document over a cap is no loss: it was wished away.
Knows nothing of weights between datasets, which training applies.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from data_pipeline.curation.shards import Shard, sidecar_table, text_facts, write_table
from data_pipeline.sources.dataset import DatasetConfig
from data_pipeline.text.documents import hash_fraction
from nanollama.data.files import sha256_json

STAGE_VERSION = 1  # raise it when the same shards would be sampled otherwise
OVER_CAP, NOT_SAMPLED = "over max_bytes", "not sampled"
SECTION = "sampling"


def sample(shards: Sequence[Shard], datasets: Sequence[DatasetConfig], decisions: Path) -> list[Shard]:
    """The shards after the shares and caps of their datasets."""
    result = []
    for dataset in datasets:
        members = [shard for shard in shards if shard.dataset == dataset.name]
        if dataset.max_bytes is not None or dataset.sampling.rate < 1:
            members = _sample_dataset(dataset, members, decisions)
        result += members
    return result


def _sample_dataset(dataset: DatasetConfig, shards: list[Shard], decisions: Path) -> list[Shard]:
    settings = [dataset.max_bytes, dataset.cap_order, dataset.sampling.rate, dataset.sampling.seed]
    key = sha256_json([SECTION, STAGE_VERSION, settings, [shard.key for shard in shards]])
    after = [shard.after_step("sample", SECTION, key, decisions) for shard in shards]
    if all(shard.sidecars[-1].is_there() for shard in after):
        return after
    facts = [text_facts(shard) for shard in shards]
    sizes = np.concatenate([one.bytes for one in facts])
    digests = [digest.tobytes() for one in facts for digest in one.digests]
    reasons: list[str | None] = [None] * len(sizes)
    if dataset.sampling.rate < 1:
        for number, digest in enumerate(digests):
            if hash_fraction(digest, dataset.sampling.seed, "sample") >= dataset.sampling.rate:
                reasons[number] = NOT_SAMPLED
    if dataset.max_bytes is not None:
        left = np.array([reason is None for reason in reasons], bool)
        over = (_over_by_hash if dataset.cap_order == "hash" else _over_head)(digests, sizes, left,
                                                                              dataset.max_bytes)
        reasons = [OVER_CAP if beyond else reason for beyond, reason in zip(over.tolist(), reasons, strict=True)]
    start = 0
    for shard, one in zip(after, facts, strict=True):
        own_reasons = pl.Series(reasons[start:start + len(one.rows)], dtype=pl.String)
        write_table(shard.sidecars[-1].path, sidecar_table(one.rows, own_reasons, {}))
        start += len(one.rows)
    return after


def _over_head(digests: list[bytes], sizes: np.ndarray, left: np.ndarray, limit: int) -> np.ndarray:
    """What comes after the first documents that fit."""
    return left & (np.cumsum(np.where(left, sizes, 0)) > limit)


def _over_by_hash(digests: list[bytes], sizes: np.ndarray, left: np.ndarray, limit: int) -> np.ndarray:
    """What is not among the lowest hashes that fit together.

    By hash of the text, so that the sample is even over the source and the same on every run; the head of a
    sorted source would be one corner of it. Documents larger than the limit by themselves are left aside.
    """
    fits = np.flatnonzero(left & (sizes <= limit)).tolist()
    fits.sort(key=lambda number: (hash_fraction(digests[number], 0, "cap"), number))
    total, kept = 0, np.zeros(len(sizes), bool)
    for number in fits:
        total += int(sizes[number])
        if total > limit:
            break
        kept[number] = True
    return left & ~kept
