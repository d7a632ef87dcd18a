"""Batch = f(mixture, seed, step): no row lost or repeated whatever dies; every label accounted for."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packed_sets import make_packed_set, make_tokenizer

from nanollama.config import DataConfig, PackedSetConfig
from nanollama.data.files import DataError
from nanollama.data.interleave import Interleave
from nanollama.data.loader import (
    DEVICE_ARRAYS,
    HostBatch,
    Loader,
    RowKey,
    read_rows,
    row_order,
    validation_batches,
)
from nanollama.data.mixture import Mixture, open_mixture
from nanollama.data.packed import PackedSet
from nanollama.data.strict import FieldError

BATCH = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets; every document has ids of its own, so that a token tells where it comes from."""
    root = tmp_path_factory.mktemp("loader")
    tokenizer = make_tokenizer(root / "tokenizer")
    make_packed_set(root / "books", tokenizer=tokenizer, seed=1, documents=160, longest=40)
    make_packed_set(root / "long", tokenizer=tokenizer, seed=2, documents=60, longest=400,
                    sources=("reports",))
    return root


def mixture_of(root: Path, *, weights: Sequence[float] = (3, 1), split: str = "train", length: int = 64,
               mask_documents: bool = True) -> Mixture:
    sets = tuple(PackedSetConfig(str(root / name), weight)
                 for name, weight in zip(("books", "long"), weights, strict=True) if weight)
    data = DataConfig(sets=sets, tokenizer=str(root / "tokenizer"), sequence_length=length,
                      mask_documents=mask_documents, threads=2)
    return open_mixture(data, split=split)


def assert_same_batch(a: HostBatch, b: HostBatch) -> None:
    for name in DEVICE_ARRAYS:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)
    np.testing.assert_array_equal(a.segment_ids_BT, b.segment_ids_BT)
    np.testing.assert_array_equal(a.source_ids_BT, b.source_ids_BT)
    np.testing.assert_array_equal(a.source_tokens, b.source_tokens)


def global_tokens(mixture: Mixture, step: int, hosts: int, batch: int = BATCH) -> np.ndarray:
    """The global batch of `hosts` hosts, each with its block of rows."""
    loaders = [Loader(mixture, seed=0, global_batch=batch, host=host, hosts=hosts) for host in range(hosts)]
    return np.concatenate([loader.batch(step).arrays["tokens"] for loader in loaders])


def test_a_batch_has_the_contracted_arrays(root: Path) -> None:
    batch = Loader(mixture_of(root), seed=0, global_batch=BATCH).batch(0)
    assert tuple(batch.arrays) == DEVICE_ARRAYS
    for name, array in batch.arrays.items():
        assert array.shape == (BATCH, 64)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
    labelled = batch.arrays["weights"] > 0
    np.testing.assert_array_equal(batch.arrays["targets"][:, :-1][labelled[:, :-1]],
                                  batch.arrays["tokens"][:, 1:][labelled[:, :-1]])
    assert not batch.arrays["targets"][~labelled].any()
    assert not labelled[:, -1].any()


def test_a_batch_is_a_pure_function_of_mixture_seed_and_step(root: Path) -> None:
    one, two = (Loader(mixture_of(root), seed=7, global_batch=BATCH) for _ in range(2))
    for step in (3, 0, 500, 3):
        assert_same_batch(one.batch(step), two.batch(step))
    other = Loader(mixture_of(root), seed=8, global_batch=BATCH)
    assert (other.batch(3).arrays["tokens"] != one.batch(3).arrays["tokens"]).any()


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_global_batch_is_the_same_for_any_number_of_hosts(root: Path, hosts: int) -> None:
    mixture = mixture_of(root, length=128)
    for step in range(6):
        np.testing.assert_array_equal(global_tokens(mixture, step, hosts), global_tokens(mixture, step, 1))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_reading_ahead_gives_the_same_batches_for_any_number_of_threads(root: Path, threads: int) -> None:
    loader = Loader(mixture_of(root), seed=0, global_batch=BATCH, threads=threads)
    for start in (0, 37):
        for step, batch in zip(range(start, start + 12), loader.iterate(start), strict=False):
            assert_same_batch(batch, loader.batch(step))


def test_entering_at_step_ten_million_is_as_fast_as_at_step_one(root: Path) -> None:
    loader = Loader(mixture_of(root), seed=0, global_batch=BATCH)
    loader.batch(0)  # opens the files
    begin = time.perf_counter()
    batch = loader.batch(10_000_000)
    assert time.perf_counter() - begin < 0.5
    assert_same_batch(batch, Loader(mixture_of(root), seed=0, global_batch=BATCH).batch(10_000_000))
    assert_same_batch(batch, next(loader.iterate(10_000_000)))


def keys_of(loader: Loader, steps: Iterable[int]) -> list[RowKey]:
    """Rows of one host, as (set, row), in order."""
    local = loader.global_batch // loader.hosts
    order, first = row_order(loader.mixture, 0), loader.host * local
    return [order[step * loader.global_batch + first + j] for step in steps for j in range(local)]


def check_schedule(read: Callable[[int, int, int], list[RowKey]], unbroken: Sequence[RowKey],
                   seed: int) -> None:
    """Twenty kills with changes of host count: after each the run goes on from its last checkpoint."""
    rng = np.random.default_rng(seed)
    seen: list[RowKey] = []
    step = 0
    for _ in range(20):
        hosts, saved, lost = int(rng.choice([1, 2, 4, 8])), int(rng.integers(0, 6)), int(rng.integers(0, 3))
        dealt = [[read(host, hosts, step + n) for host in range(hosts)] for n in range(saved + lost)]
        for rows_of_hosts in dealt[:saved]:  # what was read after the checkpoint died with the process
            seen += [row for rows in rows_of_hosts for row in rows]
        step += saved
    assert seen == unbroken[:len(seen)]
    assert len(seen) == step * BATCH > 100


def test_no_row_is_lost_or_repeated_over_twenty_kills_and_host_counts(root: Path) -> None:
    mixture = mixture_of(root)
    unbroken = keys_of(Loader(mixture, seed=0, global_batch=BATCH), range(120))
    readers = {(host, hosts): Loader(mixture, seed=0, global_batch=BATCH, host=host, hosts=hosts)
               for hosts in (1, 2, 4, 8) for host in range(hosts)}
    for seed in range(5):
        check_schedule(lambda host, hosts, step: keys_of(readers[host, hosts], [step]), unbroken, seed)

    def one_step_late(host: int, hosts: int, step: int) -> list[RowKey]:
        return keys_of(readers[host, hosts], [step + 1])

    def in_blocks(host: int, hosts: int, step: int) -> list[RowKey]:  # a host's place in its own stream
        local = BATCH // hosts
        return unbroken[host * 100 + step * local:host * 100 + (step + 1) * local]

    for mutant in (one_step_late, in_blocks):
        with pytest.raises(AssertionError):
            check_schedule(mutant, unbroken, seed=0)


def segments_of(batches: Iterable[HostBatch]) -> list[bytes]:
    """Every document of the batches as bytes of its tokens, sorted."""
    found = []
    for batch in batches:
        for tokens, ids in zip(batch.arrays["tokens"], batch.segment_ids_BT, strict=True):
            found += [tokens[ids == number].tobytes() for number in range(1, ids.max(initial=0) + 1)]
    return sorted(found)


@pytest.mark.parametrize("length", [64, 128, 256])
def test_an_epoch_has_every_token_of_the_split_once(root: Path, length: int) -> None:
    mixture = mixture_of(root, weights=(0, 1), length=length)
    loader = Loader(mixture, seed=0, global_batch=1)
    rows = mixture.sets[0].rows
    epochs = [segments_of(loader.batch(step) for step in range(n * rows, (n + 1) * rows)) for n in range(2)]
    in_order = segments_of(validation_batches(mixture, global_batch=1))
    assert epochs[0] == epochs[1] == in_order
    assert sum(map(len, in_order)) == 4 * sum(mixture.source_counts("tokens"))
    first, second = (keys_of(loader, range(n * rows, (n + 1) * rows)) for n in range(2))
    assert first != second  # shuffled anew
    assert sorted(first) == sorted(second) == [(0, row) for row in range(rows)]


def test_a_long_document_goes_on_across_the_records_of_a_row(root: Path) -> None:
    records = PackedSet(root / "long").split("train")
    whole: dict[int, list[int]] = {}
    for index in range(len(records)):
        record = records.record(index)
        for document in set(record.documents.tolist()):
            whole.setdefault(document, []).append(index)
    document = next(d for d, where in whole.items() if len(where) >= 3 and where[0] % 4 == 0)
    row = read_rows(mixture_of(root, weights=(0, 1), length=256), [RowKey(0, whole[document][0] // 4)])
    assert records.record(whole[document][0]).documents.tolist() == [document]
    first = row.segment_ids_BT[0] == 1
    assert first.sum() > 128
    np.testing.assert_array_equal(row.arrays["positions"][0][first], np.arange(first.sum()))
    assert not row.arrays["first_key"][0][first].any()
    assert row.arrays["weights"][0][:first.sum()].tolist() == [1.0] * (first.sum() - 1) + [0.0]


def test_documents_can_be_left_unmasked(root: Path) -> None:
    batch = Loader(mixture_of(root, mask_documents=False), seed=0, global_batch=BATCH).batch(0)
    real = batch.segment_ids_BT > 0
    places = np.broadcast_to(np.arange(64), real.shape)
    np.testing.assert_array_equal(batch.arrays["first_key"], np.where(real, 0, places))
    np.testing.assert_array_equal(batch.arrays["positions"], np.where(real, places, 0))
    assert (batch.arrays["weights"].sum(axis=1) == real.sum(axis=1) - 1).all()
    assert (batch.segment_ids_BT.max(axis=1) > 1).any()


def test_sets_are_mixed_by_weight_at_every_prefix(root: Path) -> None:
    mixture = mixture_of(root, weights=(0.7, 0.3))
    sets = np.array([key.set for key in keys_of(Loader(mixture, seed=0, global_batch=BATCH), range(100))])
    for number, share in enumerate((0.7, 0.3)):
        assert np.abs(np.cumsum(sets == number) - share * np.arange(1, 801)).max() < 1 + 1e-9


def test_a_set_keeps_its_order_when_others_come_and_go(root: Path) -> None:
    alone = keys_of(Loader(mixture_of(root, weights=(1, 0)), seed=0, global_batch=BATCH), range(5))
    mixed = keys_of(Loader(mixture_of(root), seed=0, global_batch=BATCH), range(20))
    assert [key for key in mixed if key.set == 0][:len(alone)] == alone


def test_the_order_of_rows_never_changes() -> None:
    """A run begun with one version of Grain must go on with another: these are the rows of today's."""
    sets = tuple(SimpleNamespace(rows=rows, packed=SimpleNamespace(dataset_id=name))
                 for name, rows in (("a", 1000), ("b", 77)))
    mixture: Any = SimpleNamespace(sets=sets, split="train", interleave=Interleave([0.8, 0.2]))
    order = row_order(mixture, seed=5)
    assert [tuple(order[index]) for index in range(8)] == [
        (0, 498), (0, 187), (0, 755), (0, 352), (1, 9), (0, 649), (0, 551), (0, 242)]
    text = " ".join(f"{key.set}:{key.row}" for key in (order[index] for index in range(0, 100_000, 97)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "305576754f690ec0"


@pytest.mark.parametrize(("batch", "hosts"), [(1, 1), (4, 1), (4, 2), (8, 8), (64, 4)])
def test_validation_has_every_row_once_for_any_batch_and_hosts(root: Path, batch: int, hosts: int) -> None:
    mixture = mixture_of(root, split="validation", length=128)
    parts = [list(validation_batches(mixture, global_batch=batch, host=h, hosts=hosts)) for h in range(hosts)]
    steps = -(-sum(member.rows for member in mixture.sets) // batch)
    assert {len(part) for part in parts} == {steps}
    everything = [b for part in parts for b in part]
    expected = [read_rows(mixture, [RowKey(number, row)]) for number, member in enumerate(mixture.sets)
                for row in range(member.rows)]
    assert segments_of(everything) == segments_of(expected)
    total = sum(b.source_tokens for b in everything)
    np.testing.assert_array_equal(total, sum(b.source_tokens for b in expected))
    assert sum(b.arrays["weights"].sum() for b in everything) == total.sum()
    assert {b.arrays["tokens"].shape for b in everything} == {(batch // hosts, 128)}


def test_rows_that_fill_the_last_validation_batch_weigh_nothing(root: Path) -> None:
    mixture = mixture_of(root, split="validation")
    rows = sum(member.rows for member in mixture.sets)
    *_, last = validation_batches(mixture, global_batch=rows + 3)
    assert not last.arrays["weights"][rows:].any()
    assert (last.arrays["tokens"][rows:] == mixture.tokenizer.pad_id).all()
    np.testing.assert_array_equal(last.arrays["first_key"][rows:], np.tile(np.arange(64), (3, 1)))
    assert last.arrays["weights"][:rows].any(axis=1).all()


def test_a_few_validation_batches_are_a_fair_sample(root: Path) -> None:
    mixture = mixture_of(root, split="validation")
    rows = sum(member.rows for member in mixture.sets)
    every = [batch.arrays["tokens"][0].tobytes() for batch in validation_batches(mixture, global_batch=1)]
    few = [row.tobytes() for batch in validation_batches(mixture, global_batch=2, limit=4)
           for row in batch.arrays["tokens"]]
    places = [every.index(row) for row in few]
    assert len(few) == 8
    assert np.abs(np.diff([*places, rows]) - rows / 8).max() < 1  # evenly from the first row to the last
    assert len(list(validation_batches(mixture, global_batch=8, limit=100))) == -(-rows // 8)


def test_labels_are_accounted_to_their_sources(root: Path) -> None:
    mixture = mixture_of(root)
    loader = Loader(mixture, seed=0, global_batch=BATCH)
    for step in range(5):
        batch = loader.batch(step)
        for number in range(len(loader.sources)):
            mine = batch.arrays["weights"][batch.source_ids_BT == number].sum()
            assert batch.source_tokens[number] == mine
        assert batch.source_tokens.sum() == batch.arrays["weights"].sum()
    assert loader.sources == ["books/alpha", "books/beta", "long/reports"]


def test_one_pass_is_one_epoch(root: Path) -> None:
    mixture = mixture_of(root, weights=(1, 0))
    loader = Loader(mixture, seed=0, global_batch=1)
    seen = sum(loader.batch(step).source_tokens for step in range(mixture.sets[0].rows))
    assert loader.epochs(seen) == {"books/alpha": 1.0, "books/beta": 1.0}
    assert loader.epochs(seen * 3)["books/beta"] == 3.0


def test_a_row_leads_back_to_its_records(root: Path) -> None:
    mixture = mixture_of(root, length=128)
    loader = Loader(mixture, seed=0, global_batch=BATCH)
    for row in range(BATCH):
        place = loader.where(9, row)
        records = PackedSet(place["set"]).split(place["split"]).read(place["records"])
        tokens = np.concatenate([record.tokens for record in records])
        np.testing.assert_array_equal(loader.batch(9).arrays["tokens"][row][:len(tokens)], tokens)


def test_hosts_must_divide_the_batch(root: Path) -> None:
    with pytest.raises(FieldError, match=r"8 rows cannot be dealt to host 0 of 3. Use a multiple of 3"):
        Loader(mixture_of(root), seed=0, global_batch=8, hosts=3)
    with pytest.raises(FieldError, match="host 2 of 2"):
        next(validation_batches(mixture_of(root), global_batch=8, host=2, hosts=2))


def test_a_row_with_nothing_to_learn_is_an_error(root: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    empty = [np.array([1])] * 4  # documents of one token have no label
    make_packed_set(tmp_path / "empty", tokenizer=tokenizer, documents=empty, record_length=2, validation=0)
    data = DataConfig((PackedSetConfig(str(tmp_path / "empty")),), str(tmp_path / "tokenizer"), 2)
    loader = Loader(open_mixture(data), seed=0, global_batch=2)
    for read in (lambda: loader.batch(0), lambda: next(loader.iterate(0))):
        with pytest.raises(DataError, match=r"empty, split train, records \[\d\]: no token to learn"):
            read()
