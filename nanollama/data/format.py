"""The packed record: the one codec that the writer (`data_pipeline.pack`) and the loader share.

Owns the bytes of a record, and what a row of consecutive records means: targets, loss weights, positions and
document boundaries are derived here, on load, and nowhere else. Knows nothing of files, splits or mixtures.

Bytes, little-endian: magic "NLPK", u8 version, u8 flags, u16 n_segments, u32 length | u32 seg_start[n] |
u32 seg_doc[n] | u16 seg_source[n] | tokens[length], u16 or u32 | [loss bits, ceil(length / 8), first token in
the lowest bit]. Padding is not stored.
"""

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np

from nanollama.data.files import DataError

MAGIC = b"NLPK"
VERSION = 1
FLAG_LOSS = 1  # loss bits follow the tokens
FLAG_WIDE = 2  # tokens are u32 (an id does not fit in u16)
_HEADER = struct.Struct("<4sBBHI")
_MEND = "Make the packed set again with data_pipeline.pack."


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Record:
    """Segments laid end to end. A segment is a document, or one piece of a document longer than a record."""

    tokens: np.ndarray  # [length] uint16 or uint32
    starts: np.ndarray  # [n] uint32, index of each segment's first token; starts[0] == 0, increasing
    documents: np.ndarray  # [n] uint32, row in docs.parquet
    sources: np.ndarray  # [n] uint16, index in the manifest's sources
    loss: np.ndarray | None = None  # [length] bool, True: learn this token as a label; None: all


def encode_record(record: Record) -> bytes:
    """Bytes of `record`. Errors: DataError when its parts disagree: nothing undecodable is written."""
    length, count = len(record.tokens), len(record.starts)
    wide = bool(length) and int(np.max(record.tokens)) >= 1 << 16
    starts = _column(record.starts, "<u4", "segment start")
    _check_segments(np.frombuffer(starts, "<u4"), length, len(record.documents), len(record.sources))
    if count >= 1 << 16:
        raise DataError(f"packed record: {count} segments, at most 65535 fit.")
    flags = (FLAG_WIDE if wide else 0) | (FLAG_LOSS if record.loss is not None else 0)
    parts = [_HEADER.pack(MAGIC, VERSION, flags, count, length), starts,
             _column(record.documents, "<u4", "document"), _column(record.sources, "<u2", "source"),
             _column(record.tokens, "<u4" if wide else "<u2", "token id")]
    if record.loss is not None:
        if len(record.loss) != length:
            raise DataError(f"packed record: {len(record.loss)} loss bits for {length} tokens.")
        parts.append(np.packbits(np.asarray(record.loss, bool), bitorder="little").tobytes())
    return b"".join(parts)


def decode_record(data: bytes) -> Record:
    """The Record in `data`, as read-only views of it. Errors: DataError names what is wrong."""
    if len(data) < _HEADER.size:
        raise DataError(f"packed record: truncated, {len(data)} bytes where the header has {_HEADER.size}. {_MEND}")
    magic, version, flags, count, length = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DataError(f"packed record: magic {magic!r} is not {MAGIC!r}: damaged, or no packed record. {_MEND}")
    if version != VERSION:
        raise DataError(f"packed record: version {version}, this code reads version {VERSION}. {_MEND}")
    if flags & ~(FLAG_LOSS | FLAG_WIDE):
        raise DataError(f"packed record: unknown flags {flags:#04x}: damaged, or written by newer code. {_MEND}")
    token_bytes = 4 if flags & FLAG_WIDE else 2
    loss_bytes = (length + 7) // 8 if flags & FLAG_LOSS else 0
    expected = _HEADER.size + 10 * count + token_bytes * length + loss_bytes
    if len(data) != expected:
        problem = "truncated" if len(data) < expected else "too long"
        raise DataError(f"packed record: {problem}, {len(data)} bytes where {count} segments and {length} "
                        f"tokens need {expected}. {_MEND}")
    starts = np.frombuffer(data, "<u4", count, _HEADER.size)
    _check_segments(starts, length, count, count)
    at = _HEADER.size + 10 * count
    bits = np.frombuffer(data, np.uint8, loss_bytes, at + token_bytes * length)
    return Record(
        tokens=np.frombuffer(data, f"<u{token_bytes}", length, at), starts=starts,
        documents=np.frombuffer(data, "<u4", count, _HEADER.size + 4 * count),
        sources=np.frombuffer(data, "<u2", count, _HEADER.size + 8 * count),
        loss=np.unpackbits(bits, count=length, bitorder="little").view(bool) if loss_bytes else None)


def derive_row(records: Sequence[Record], *, sequence_length: int, record_length: int, pad_id: int,
               mask_documents: bool) -> dict[str, np.ndarray]:
    """One training row of T = `sequence_length` positions from up to T / `record_length` consecutive records.

    Tokens of the records follow one another without a gap, padding is at the end. A document that goes on in
    the next record goes on in the row: its pieces are one segment. No record gives a row of padding.

    Returns arrays [T]: tokens, targets, positions, first_key (int32), weights (float32), segment_ids (1.. per
    document, 0 in padding) and source_ids (index in the set's sources, 0 in padding), both int32.
    targets[t] is tokens[t + 1]: the one place where labels are shifted. weights[t] is 1 where that label is a
    real token of the same document (any document if not `mask_documents`) that is to be learned, else 0, and
    targets is 0 there. first_key[t] is the first key that query t may see; in padding t itself.
    Errors: DataError when the records do not fit.
    """
    if sequence_length % record_length or len(records) * record_length > sequence_length:
        raise DataError(f"{len(records)} records of {record_length} tokens make no row of {sequence_length}.")
    zeros = ("tokens", "targets", "positions", "segment_ids", "source_ids")
    row_T = {name: np.zeros(sequence_length, np.int32) for name in zeros}
    row_T["first_key"] = np.arange(sequence_length, dtype=np.int32)
    row_T["weights"] = np.zeros(sequence_length, np.float32)
    row = _join(records, record_length)
    length = len(row.tokens)
    row_T["tokens"][:length] = row.tokens
    row_T["tokens"][length:] = pad_id
    if not length:
        return row_T
    ends = np.append(row.starts[1:], length)
    sizes = ends - row.starts
    if mask_documents:
        index = row_T["first_key"][:length].copy()
        row_T["first_key"][:length] = np.repeat(row.starts, sizes)
        np.subtract(index, row_T["first_key"][:length], out=row_T["positions"][:length])
    else:
        row_T["positions"][:length] = row_T["first_key"][:length]
        row_T["first_key"][:length] = 0
    row_T["segment_ids"][:length] = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
    row_T["source_ids"][:length] = np.repeat(row.sources, sizes)
    weights = row_T["weights"]
    weights[: length - 1] = 1 if row.loss is None else row.loss[1:]
    if mask_documents:
        weights[ends - 1] = 0
    targets = row_T["targets"][: length - 1]
    np.multiply(row.tokens[1:], weights[: length - 1] != 0, out=targets, casting="unsafe")
    return row_T


def _join(records: Sequence[Record], record_length: int) -> Record:
    """The records as one, adjacent segments of the same document merged."""
    if not records:
        empty = np.zeros(0, np.uint32)
        return Record(empty, empty, empty, empty)
    for record in records:
        if len(record.tokens) > record_length:
            raise DataError(f"packed record: {len(record.tokens)} tokens, the set's record_length is "
                            f"{record_length}. {_MEND}")
    if len(records) == 1:
        joined = records[0]
    else:
        lengths = [len(record.tokens) for record in records]
        offsets = np.cumsum([0, *lengths[:-1]])
        loss = None
        if any(record.loss is not None for record in records):
            loss = np.concatenate([np.ones(size, bool) if record.loss is None else record.loss
                                   for record, size in zip(records, lengths, strict=True)])
        joined = Record(
            np.concatenate([record.tokens for record in records]),
            np.concatenate([record.starts + offset for record, offset in zip(records, offsets, strict=True)]),
            np.concatenate([record.documents for record in records]),
            np.concatenate([record.sources for record in records]), loss)
    new = np.ones(len(joined.starts), bool)
    np.not_equal(joined.documents[1:], joined.documents[:-1], out=new[1:])
    if new.all():
        return joined
    return dataclasses.replace(joined, starts=joined.starts[new], documents=joined.documents[new],
                               sources=joined.sources[new])


def _column(values: np.ndarray, dtype: str, what: str) -> bytes:
    array = np.asarray(values)
    if array.size and (array.min() < 0 or array.max() > np.iinfo(dtype).max):
        raise DataError(f"packed record: {what} {array.min()}..{array.max()} does not fit in {np.dtype(dtype).name}.")
    return array.astype(dtype).tobytes()


def _check_segments(starts: np.ndarray, length: int, documents: int, sources: int) -> None:
    count = len(starts)
    if documents != count or sources != count:
        raise DataError(f"packed record: {count} segments, {documents} documents, {sources} sources. {_MEND}")
    if not length or not count:
        raise DataError(f"packed record: {length} tokens in {count} segments: empty. {_MEND}")
    if starts[0] != 0 or starts[-1] >= length or (starts[1:] <= starts[:-1]).any():
        raise DataError(f"packed record: segments start at {starts.tolist()[:20]}, which does not grow from 0 to "
                        f"below {length}. {_MEND}")
