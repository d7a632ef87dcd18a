"""The packed record: bytes round trip, the derived row equals a slow twin, the label is shifted once."""

import dataclasses
from collections.abc import Callable, Sequence

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from nanollama.data import format
from nanollama.data.files import DataError
from nanollama.data.format import Record, decode_record, derive_row, derive_rows, encode_record

PAD = 3


def reference_row(records: Sequence[Record], *, sequence_length: int, pad_id: int,
                  mask_documents: bool) -> dict[str, np.ndarray]:
    """derive_row, one token at a time, from the contract."""
    tokens: list[tuple[int, int, int, bool]] = []  # token, document, source, to be learned
    for record in records:
        for index, token in enumerate(record.tokens):
            segment = max(s for s, start in enumerate(record.starts) if start <= index)
            learned = True if record.loss is None else bool(record.loss[index])
            tokens.append((int(token), int(record.documents[segment]), int(record.sources[segment]), learned))
    rows = []
    begin, segment = 0, 0
    for t in range(sequence_length):
        if t >= len(tokens):
            rows.append((pad_id, 0, 0.0, 0, t, 0, 0))
            continue
        token, document, source, _ = tokens[t]
        if t == 0 or tokens[t - 1][1] != document:
            begin, segment = t, segment + 1
        label, weight = 0, 0.0
        if t + 1 < len(tokens):
            following, its_document, _, learned = tokens[t + 1]
            if learned and (its_document == document or not mask_documents):
                label, weight = following, 1.0
        first = begin if mask_documents else 0
        rows.append((token, label, weight, t - first, first, segment, source))
    names = ("tokens", "targets", "weights", "positions", "first_key", "segment_ids", "source_ids")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@st.composite
def rows_of_records(draw: st.DrawFn) -> tuple[list[Record], int]:
    """Up to four consecutive records and their record length; documents may go on in the next record."""
    record_length = draw(st.integers(1, 24))
    wide, with_loss = draw(st.booleans()), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    records: list[Record] = []
    document = 0
    for _ in range(draw(st.integers(1, 4))):
        length = record_length if rng.random() < 0.5 else int(rng.integers(1, record_length + 1))
        count = int(rng.integers(1, length + 1))
        starts = np.concatenate([[0], np.sort(rng.choice(np.arange(1, length), count - 1, replace=False))])
        goes_on = bool(records) and rng.random() < 0.5
        documents = document + np.arange(count) - (1 if goes_on else 0)
        document = int(documents[-1]) + 1
        sources = np.array([d % 3 for d in documents])
        tokens = rng.integers(0, 2**32 if wide else 2**16, length)
        loss = rng.random(length) < 0.7 if with_loss else None
        records.append(Record(tokens, starts, documents, sources, loss))
    return records, record_length


def assert_same_record(a: Record, b: Record) -> None:
    for field in ("tokens", "starts", "documents", "sources"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert (a.loss is None) == (b.loss is None)
    if a.loss is not None:
        np.testing.assert_array_equal(a.loss, b.loss)


@hypothesis.given(rows_of_records())
def test_decoding_gives_back_what_was_encoded(drawn: tuple[list[Record], int]) -> None:
    for record in drawn[0]:
        data = encode_record(record)
        assert_same_record(decode_record(data), record)
        assert encode_record(decode_record(data)) == data


@hypothesis.given(rows_of_records(), st.booleans(), st.integers(0, 2))
def test_derived_row_equals_the_slow_twin(drawn: tuple[list[Record], int], mask_documents: bool,
                                          spare: int) -> None:
    records, record_length = drawn
    records = [dataclasses.replace(r, tokens=r.tokens % 2**31) for r in records]  # int32 on the device
    length = (len(records) + spare) * record_length
    row = derive_row([decode_record(encode_record(r)) for r in records], sequence_length=length,
                     record_length=record_length, pad_id=PAD, mask_documents=mask_documents)
    twin = reference_row(records, sequence_length=length, pad_id=PAD, mask_documents=mask_documents)
    assert row.keys() == twin.keys()
    for name in twin:
        np.testing.assert_array_equal(row[name], twin[name], err_msg=name)
        assert row[name].dtype == (np.float32 if name == "weights" else np.int32)


@hypothesis.given(st.lists(rows_of_records(), max_size=5), st.booleans())
def test_rows_of_a_batch_do_not_touch_one_another(drawn: list[tuple[list[Record], int]],
                                                  mask_documents: bool) -> None:
    rows = [[dataclasses.replace(r, tokens=r.tokens % 2**31) for r in records] for records, _ in drawn]
    rows.append([])  # a row of padding
    together = derive_rows(rows, sequence_length=96, pad_id=PAD, mask_documents=mask_documents,
                           first_sources=[10 * index for index in range(len(rows))])
    for index, records in enumerate(rows):
        alone = reference_row(records, sequence_length=96, pad_id=PAD, mask_documents=mask_documents)
        alone["source_ids"] = alone["source_ids"] + 10 * index * (alone["segment_ids"] > 0)
        for name in alone:
            np.testing.assert_array_equal(together[name][index], alone[name], err_msg=name)


def counting_row() -> dict[str, np.ndarray]:
    """Three documents that count up from 100, 200 and 300."""
    parts = [np.arange(100, 105), np.arange(200, 203), np.arange(300, 306)]
    starts = np.cumsum([0, 5, 3])
    record = Record(np.concatenate(parts), starts, np.arange(3), np.zeros(3, int))
    return derive_row([record], sequence_length=16, record_length=16, pad_id=PAD, mask_documents=True)


def check_label_is_shifted_once(row: dict[str, np.ndarray]) -> None:
    """In text that counts, every label is its token plus one; each document's last token has none."""
    learned = row["weights"] > 0
    assert learned.sum() == (5 - 1) + (3 - 1) + (6 - 1)
    np.testing.assert_array_equal(row["targets"][learned], row["tokens"][learned] + 1)
    assert not row["targets"][~learned].any()


def test_label_is_shifted_exactly_once() -> None:
    check_label_is_shifted_once(counting_row())


def shifted(times: int) -> dict[str, np.ndarray]:
    row = counting_row()
    return {**row, "targets": np.roll(row["tokens"], -times) * (row["weights"] > 0).astype(np.int32)}


def unmasked_boundary() -> dict[str, np.ndarray]:
    row = counting_row()
    weights, targets = row["weights"].copy(), row["targets"].copy()
    weights[4], targets[4] = 1, row["tokens"][5]
    return {**row, "weights": weights, "targets": targets}


@pytest.mark.parametrize("mutant", [lambda: shifted(0), lambda: shifted(2), unmasked_boundary],
                         ids=["not shifted", "shifted twice", "label across a boundary"])
def test_label_check_catches(mutant: Callable[[], dict[str, np.ndarray]]) -> None:
    check_label_is_shifted_once(shifted(1))
    with pytest.raises(AssertionError):
        check_label_is_shifted_once(mutant())


def test_bytes_of_a_record_never_change() -> None:
    """A set packed today must be read by the code of next year."""
    record = Record(np.array([1, 500, 2]), np.array([0, 2]), np.array([7, 70000]), np.array([0, 1]),
                    np.array([True, False, True]))
    assert encode_record(record).hex() == (
        "4e4c504b" "01" "01" "0200" "03000000" "0000000002000000" "0700000070110100" "00000100"
        "0100f4010200" "05")
    wide = dataclasses.replace(record, tokens=np.array([1, 70000, 2]), loss=None)
    assert encode_record(wide).hex() == (
        "4e4c504b" "01" "02" "0200" "03000000" "0000000002000000" "0700000070110100" "00000100"
        "010000007011010002000000")


GOOD = encode_record(Record(np.arange(10), np.array([0, 4]), np.array([0, 1]), np.array([0, 0])))


@pytest.mark.parametrize(("data", "problem"), [
    (b"", "truncated"), (GOOD[:8], "truncated"), (GOOD[:-1], "truncated"), (GOOD + b"\0", "too long"),
    (b"NLPX" + GOOD[4:], "magic"), (GOOD[:4] + b"\x02" + GOOD[5:], "version 2"),
    (GOOD[:5] + b"\x80" + GOOD[6:], "flags 0x80"),
    (GOOD[:12] + b"\x01" + GOOD[13:], "segments start at"),  # the first segment does not start at 0
    (GOOD[:16] + b"\x0a" + GOOD[17:], "segments start at"),  # a segment starts behind the last token
    (GOOD[:16] + b"\x00" + GOOD[17:], "segments start at"),  # two segments start at one token
    (GOOD[:6] + bytes(2) + GOOD[8:12] + GOOD[-20:], "empty"),
])
def test_damaged_record_is_named(data: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        decode_record(data)


@hypothesis.given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_no_damage_ends_in_another_error(at: int, flip: int) -> None:
    data = GOOD[:at] + bytes([GOOD[at] ^ flip]) + GOOD[at + 1:]
    try:
        record = decode_record(data)
    except DataError:
        return
    assert record.starts[0] == 0
    assert len(record.tokens) == 10


@pytest.mark.parametrize(("change", "problem"), [
    ({"tokens": np.array([-1, 5])}, "token id -1"), ({"tokens": np.array([0, 2**32])}, "token id"),
    ({"sources": np.array([70000])}, "source 70000"), ({"documents": np.array([2**33])}, "document"),
    ({"documents": np.array([0, 1])}, "2 documents"), ({"starts": np.array([1])}, "segments start"),
    ({"loss": np.array([True])}, "1 loss bits"), ({"tokens": np.array([], int)}, "empty"),
])
def test_what_cannot_be_read_back_is_not_written(change: dict[str, np.ndarray], problem: str) -> None:
    record = Record(np.array([4, 5]), np.array([0]), np.array([0]), np.array([0]))
    encode_record(record)
    with pytest.raises(DataError, match=problem):
        encode_record(dataclasses.replace(record, **change))


def test_records_that_make_no_row_are_refused() -> None:
    record = decode_record(GOOD)
    for count, sequence_length, record_length in ((3, 32, 16), (1, 24, 16), (1, 8, 8)):
        with pytest.raises(DataError, match="make no row"):
            derive_row([record] * count, sequence_length=sequence_length, record_length=record_length,
                       pad_id=PAD, mask_documents=True)
    with pytest.raises(DataError, match="20 tokens in a row of 16"):
        derive_rows([[record, record]], sequence_length=16, pad_id=PAD, mask_documents=True)


def test_too_many_segments_are_refused() -> None:
    many = np.arange(1 << 16)
    with pytest.raises(DataError, match="65536 segments"):
        encode_record(Record(many, many, many, np.zeros_like(many)))
    assert format.VERSION == 1
