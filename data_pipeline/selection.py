"""Which rows of a dataset are kept: broken rows, filters, exact duplicates, the byte cap, all counted.

Owns the order of these decisions and the law "rows in = kept + dropped by reason". Knows nothing of where
rows come from or where documents go.
"""

import dataclasses
import heapq
from collections.abc import Iterator

from data_pipeline.config import DatasetConfig, removes_duplicates
from data_pipeline.documents import Bad, Document, Place, hash_fraction, text_digest
from data_pipeline.filters import Filter, make_batch
from data_pipeline.sources.base import Source
from nanollama.data.files import DataError

OVER_CAP = "over max_bytes"
DUPLICATE = "exact duplicate"


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A document that goes into the corpus."""

    document: Document
    digest: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """A row that does not."""

    place: Place
    reason: str
    detail: str = ""
    id: str | None = None  # None: broken input that never became a document


@dataclasses.dataclass
class Counts:
    """The account of one dataset."""

    rows_in: int = 0
    kept: int = 0
    bytes: int = 0  # UTF-8 of the kept texts
    characters: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, item: Kept | Dropped) -> None:
        """Count what became of one row. (`rows_in` is counted apart, where the source gives it.)"""
        if isinstance(item, Kept):
            self.kept += 1
            self.bytes += len(item.document.encoded)
            self.characters += len(item.document.text)
        else:
            self.dropped[item.reason] = self.dropped.get(item.reason, 0) + 1

    @property
    def lost(self) -> int:
        """Rows dropped for another reason than the cap, which is a wish and no loss."""
        return sum(self.dropped.values()) - self.dropped.get(OVER_CAP, 0)

    def check(self, dataset: DatasetConfig) -> None:
        """Raises DataError when rows are unaccounted for, or more are lost than the dataset allows."""
        if self.rows_in != self.kept + sum(self.dropped.values()):
            raise DataError(
                f"dataset {dataset.name}: {self.rows_in} rows in, {self.kept} kept, "
                f"{sum(self.dropped.values())} dropped: rows are lost. This is a bug; please report it.")
        if self.rows_in == 0:
            raise DataError(
                f"dataset {dataset.name}: its source has no rows. Give a source with text, or remove the "
                "dataset from the mixture.")
        if self.lost > dataset.max_loss * self.rows_in:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in _by_count(self.dropped))
            raise DataError(
                f"dataset {dataset.name}: {self.lost:,} of {self.rows_in:,} rows are dropped "
                f"({self.lost / self.rows_in:.1%}, allowed {dataset.max_loss:.0%}): {reasons}. "
                "Check text_field, format and filters; if it is meant, set max_loss: 1.0 for this dataset.")


def select(dataset: DatasetConfig, source: Source, seen: set[bytes],
           counts: Counts) -> Iterator[Kept | Dropped]:
    """One item per row of `source`, in its order; `counts.rows_in` is added to for each row the source gives.

    `seen` holds the digests of all kept texts and is added to (16 bytes a document plus the set's overhead,
    about 100 bytes in all; corpora of over 100 million documents need the partitioned form). Duplicates are
    judged against it only where the dataset asks for it. Errors: DataError on a broken row with `stop`.
    """
    filters, unique = dataset.built_filters, removes_duplicates(dataset)
    limit = _hash_limit(dataset, source, seen) if dataset.max_bytes and dataset.cap_order == "hash" else None
    taken = 0
    for document, bad in _judge_input(dataset, source, counts):
        if bad is not None:
            if dataset.on_error == "stop":
                raise DataError(f"{bad}. Mend the row, or set on_error: skip for dataset {dataset.name}.")
            yield Dropped(bad.place, bad.reason, bad.detail)
            continue
        assert document is not None
        reason = _reason(filters, document)
        digest = text_digest(document.encoded)
        if reason is None and unique and digest in seen:
            reason = DUPLICATE
        if reason is None and dataset.max_bytes:
            if limit is None and taken + len(document.encoded) > dataset.max_bytes:
                yield Dropped(document.place, OVER_CAP, "", document.id)
                return  # head order: what follows is not read
            if limit is not None and not _under(digest, document, dataset, limit):
                reason = OVER_CAP
        if reason is not None:
            yield Dropped(document.place, reason, "", document.id)
            continue
        seen.add(digest)
        taken += len(document.encoded)
        yield Kept(document, digest)


def _judge_input(dataset: DatasetConfig, source: Source,
                 counts: Counts) -> Iterator[tuple[Document | None, Bad | None]]:
    """The source's rows, an id that comes a second time turned into a bad row."""
    ids: set[bytes] = set()  # only ids from a field can repeat; the others are positions
    for item in source.read():
        counts.rows_in += 1
        if isinstance(item, Bad):
            yield None, item
            continue
        if dataset.id_field is not None:
            key = text_digest(item.id.encode())
            if key in ids:
                yield None, Bad(item.place, "duplicate id", item.id[:200])
                continue
            ids.add(key)
        yield item, None


def _hash_limit(dataset: DatasetConfig, source: Source, seen: set[bytes]) -> float:
    """The largest hash such that the kept documents below it fit in max_bytes: one pass over the source.

    By hash of the text, so that the sample is even over the source and the same on every run; the head of a
    sorted source would be one corner of it.
    """
    assert dataset.max_bytes
    filters, unique = dataset.built_filters, removes_duplicates(dataset)
    fresh: set[bytes] = set()
    largest_first: list[tuple[float, int]] = []
    total, limit = 0, float("inf")
    for document, _ in _judge_input(dataset, source, Counts()):
        if document is None or len(document.encoded) > dataset.max_bytes:
            continue
        digest = text_digest(document.encoded)
        if _reason(filters, document) or (unique and (digest in seen or digest in fresh)):
            continue
        if unique:
            fresh.add(digest)
        place = hash_fraction(digest, 0, "cap")
        if place < limit:
            heapq.heappush(largest_first, (-place, len(document.encoded)))
            total += len(document.encoded)
        while total > dataset.max_bytes:
            worst, size = heapq.heappop(largest_first)
            total, limit = total - size, min(limit, -worst)
    return limit


def _reason(filters: tuple[Filter, ...], document: Document) -> str | None:
    batch = make_batch([document.text], [document.id], [document.meta])
    return next((why for item in filters if (why := item.judge(batch).reasons[0])), None)


def _under(digest: bytes, document: Document, dataset: DatasetConfig, limit: float) -> bool:
    assert dataset.max_bytes
    return len(document.encoded) <= dataset.max_bytes and hash_fraction(digest, 0, "cap") < limit


def _by_count(dropped: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
