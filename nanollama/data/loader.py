"""Batch = f(mixture, seed, step): the whole state of the data is one integer.

Owns the order of rows (Grain: shuffled per set and epoch, mixed by weight), their place in a batch and on a
host, and the accounts of what was read. Knows nothing of devices or of what a row is for. Threads only, never
Grain's worker processes: their state depends on the worker count, and a row takes 0.1 ms.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from nanollama.data.files import DataError
from nanollama.data.format import Record, derive_rows
from nanollama.data.interleave import Interleave
from nanollama.data.mixture import Mixture, MixtureSet
from nanollama.data.strict import FieldError

DEVICE_ARRAYS = ("tokens", "targets", "weights", "positions", "first_key")


class RowKey(NamedTuple):
    """A row of a mixture: which set, and which row of it."""

    set: int
    row: int


@dataclasses.dataclass(frozen=True, eq=False)
class HostBatch:
    """The rows of one host, B of T positions."""

    arrays: dict[str, np.ndarray]  # [B, T]: DEVICE_ARRAYS, see format.derive_rows
    segment_ids_BT: np.ndarray  # int32, 1.. per document of the row, 0 in padding
    source_ids_BT: np.ndarray  # int32, index in Mixture.sources, 0 in padding
    source_tokens: np.ndarray  # [sources] int64: labels of these rows per source


class Loader:
    """Training batches of one host.

    Row j of the global batch of step n is row n * global_batch + j of the mixture; host h of H has the h-th of H
    equal blocks of them. So neither hosts nor threads change a global batch, nor which device computes which row.
    """

    def __init__(self, mixture: Mixture, *, seed: int, global_batch: int, host: int = 0, hosts: int = 1,
                 threads: int | None = None):
        """`global_batch` in rows. Errors: FieldError when hosts do not divide it."""
        _check_hosts(global_batch, host, hosts)
        self.mixture, self.global_batch, self.host, self.hosts = mixture, global_batch, host, hosts
        self.threads = mixture.threads if threads is None else threads
        self.sources = mixture.sources
        self._keys = row_order(mixture, seed)
        mine = block(global_batch, host, hosts)
        self._batches = self._keys.batch(global_batch, batch_fn=list).map(lambda keys: read_rows(mixture, keys[mine]))

    def batch(self, step: int) -> HostBatch:
        """The batch of `step`, in constant time whatever the step."""
        return self._batches[step]

    def iterate(self, start_step: int = 0) -> Iterator[HostBatch]:
        """batch(start_step), batch(start_step + 1), ... without end, read ahead by `threads` threads."""
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads + 1)
        iterator = iter(self._batches.to_iter_dataset(options))
        iterator.set_state({"next_index": start_step})
        try:
            yield from iterator
        finally:
            iterator.close()

    def where(self, step: int, row: int) -> dict[str, Any]:
        """Packed set, split and records of row `row` of the global batch of `step`; `packed why` goes on."""
        key = RowKey(*self._keys[step * self.global_batch + row])
        member = self.mixture.sets[key.set]
        return {"set": str(member.packed.directory), "split": self.mixture.split,
                "records": list(_records(member, key))}

    def epochs(self, tokens_per_source: Sequence[int] | np.ndarray) -> dict[str, float]:
        """Equivalent epochs per source: labels seen over labels of one pass through its split."""
        return {name: float(seen) / one if one else 0.0 for name, seen, one
                in zip(self.sources, tokens_per_source, self.mixture.source_labels, strict=True)}


def row_order(mixture: Mixture, seed: int) -> grain.MapDataset:
    """Endless Grain dataset of (set, row): every set shuffled anew each epoch, mixed by weight.

    A set's own order depends on its content and `seed` only, so other sets may come and go beside it.
    """
    orders = []
    for number, member in enumerate(mixture.sets):
        digest = hashlib.sha256(f"{seed} {member.packed.dataset_id} {mixture.split}".encode()).digest()
        order = grain.MapDataset.range(member.rows).seed(int.from_bytes(digest[:4])).shuffle().repeat()
        orders.append(order.map(lambda row, number=number: RowKey(number, row)))
    return grain.MapDataset.select_from_datasets(orders, _SelectionMap(mixture.interleave))


def read_rows(mixture: Mixture, keys: Sequence[RowKey | None]) -> HostBatch:
    """The rows `keys`, in that order; None gives a row of padding, whose weights are 0.

    Errors: DataError when a record cannot be read, or a row has nothing to learn.
    """
    records: list[list[Record]] = [[] for _ in keys]
    for number, member in enumerate(mixture.sets):
        spans = {place: _records(member, key) for place, key in enumerate(keys) if key and key.set == number}
        found = iter(member.records.read([index for span in spans.values() for index in span]))
        for place, span in spans.items():
            records[place] = [next(found) for _ in span]
    arrays = derive_rows(records, sequence_length=mixture.sequence_length, pad_id=mixture.tokenizer.pad_id,
                         mask_documents=mixture.mask_documents,
                         first_sources=[mixture.sets[key.set].first_source if key else 0 for key in keys])
    labels_B = arrays["weights"].sum(axis=1)
    for key, labels in zip(keys, labels_B.tolist(), strict=True):
        if key and not labels:
            member = mixture.sets[key.set]
            where = f"{member.packed.directory}, split {mixture.split}, records {list(_records(member, key))}"
            raise DataError(f"{where}: no token to learn. Drop such documents and pack again.")
    source_tokens = np.bincount(arrays["source_ids"].ravel(), arrays["weights"].ravel(), len(mixture.sources))
    return HostBatch({name: arrays[name] for name in DEVICE_ARRAYS}, arrays["segment_ids"],
                     arrays["source_ids"], source_tokens.astype(np.int64))


def validation_batches(mixture: Mixture, *, global_batch: int, host: int = 0, hosts: int = 1,
                       limit: int = 0) -> Iterator[HostBatch]:
    """Every row of the mixture's split once, in one order; the last batch is filled with rows of weight 0.

    The mixture's weights play no part. With a `limit` above 0, at most so many batches, of rows spread evenly
    over all sets. Errors: FieldError when hosts do not divide `global_batch`.
    """
    _check_hosts(global_batch, host, hosts)
    at = np.concatenate([(np.arange(member.rows) + 0.5) / member.rows for member in mixture.sets])
    number = np.repeat(np.arange(len(mixture.sets)), [member.rows for member in mixture.sets])
    row = np.concatenate([np.arange(member.rows) for member in mixture.sets])
    order = np.argsort(at, kind="stable")
    if limit and len(order) > limit * global_batch:
        order = order[np.arange(limit * global_batch) * len(order) // (limit * global_batch)]
    for start in range(0, len(order), global_batch):
        chosen = order[start:start + global_batch]
        keys: list[RowKey | None] = [RowKey(int(number[i]), int(row[i])) for i in chosen]
        keys += [None] * (global_batch - len(keys))
        yield read_rows(mixture, keys[block(global_batch, host, hosts)])


def block(global_batch: int, host: int, hosts: int) -> slice:
    """The rows of a global batch that host `host` of `hosts` has."""
    rows = global_batch // hosts
    return slice(host * rows, (host + 1) * rows)


class _SelectionMap(grain.transforms.DatasetSelectionMap):
    """Grain's name for an index map."""

    def __init__(self, interleave: Interleave):
        self._interleave = interleave

    def __len__(self) -> int:
        return len(self._interleave)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._interleave[index]


def _records(member: MixtureSet, key: RowKey) -> range:
    first = key.row * member.records_per_row
    return range(first, min(first + member.records_per_row, len(member.records)))


def _check_hosts(global_batch: int, host: int, hosts: int) -> None:
    if not 0 <= host < hosts or global_batch % hosts:
        raise FieldError("config.batch.global_rows", f"{global_batch} rows cannot be dealt to host {host} of "
                         f"{hosts}", f"Use a multiple of {hosts}.")
