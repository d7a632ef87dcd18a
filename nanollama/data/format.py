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
from typing import NamedTuple

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
    wide = bool(length) and record.tokens.dtype != np.uint16 and int(np.max(record.tokens)) >= 1 << 16
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
        raise DataError(f"packed record: truncated, {len(data)} bytes are no header. {_MEND}")
    magic, version, flags, count, length = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DataError(f"packed record: magic {magic!r} is not {MAGIC!r}: damaged, or no record. {_MEND}")
    if version != VERSION:
        raise DataError(f"packed record: version {version}, this code reads version {VERSION}. {_MEND}")
    if flags & ~(FLAG_LOSS | FLAG_WIDE):
        raise DataError(f"packed record: unknown flags {flags:#04x}: damaged or of newer code. {_MEND}")
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
    """One row [T] of up to T / `record_length` consecutive records; see `derive_rows`.

    Errors: DataError when the records do not make a row of `sequence_length`.
    """
    longest = max((len(record.tokens) for record in records), default=0)
    fits = len(records) * record_length <= sequence_length and longest <= record_length
    if sequence_length % record_length or not fits:
        raise DataError(f"packed records: {len(records)} of {record_length} tokens (longest: {longest}) make "
                        f"no row of {sequence_length}. {_MEND}")
    arrays = derive_rows([records], sequence_length=sequence_length, pad_id=pad_id,
                         mask_documents=mask_documents)
    return {name: array_BT[0] for name, array_BT in arrays.items()}


def derive_rows(rows: Sequence[Sequence[Record]], *, sequence_length: int, pad_id: int, mask_documents: bool,
                first_sources: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """Training rows [B, T], T = `sequence_length`, each from the consecutive records `rows` lists for it.

    Tokens of a row's records follow one another without a gap, padding is at the end. A document that goes on
    in the next record goes on in the row: its pieces are one segment. No record gives a row of padding.

    Returns arrays [B, T]: tokens, targets, positions, first_key (int32), weights (float32), segment_ids (1..
    per document of the row, 0 in padding) and source_ids (the record's plus `first_sources` of the row, 0 in
    padding), both int32. targets[t] is tokens[t + 1]: the one place where labels are shifted. weights[t] is 1
    where that label is a real token of the same document (of any document if not `mask_documents`) that is to
    be learned, else 0, and targets is 0 there. first_key[t] is the first key of the row that query t may see,
    in padding t itself. positions count from first_key.
    Errors: DataError when a row's records have more than T tokens.

    All rows at once: 20 numpy calls a batch in place of 20 a row, which with several threads spend most of
    their time handing the interpreter lock around (measured: 4 threads took 2.3x the CPU time of 1).
    """
    tokens_BT = np.full((len(rows), sequence_length), pad_id, np.int32)
    loss_BT = None
    lengths = np.zeros(len(rows), np.int64)
    starts, documents, sources, counts = [], [], [], np.zeros(len(rows), np.int64)
    for row, records in enumerate(rows):
        end = 0
        for record in records:
            begin, end = end, end + len(record.tokens)
            if end > sequence_length:
                raise DataError(f"packed records: {end} tokens in a row of {sequence_length}. {_MEND}")
            tokens_BT[row, begin:end] = record.tokens
            if record.loss is not None:
                loss_BT = np.ones(tokens_BT.shape, bool) if loss_BT is None else loss_BT
                loss_BT[row, begin:end] = record.loss
            starts.append(np.add(record.starts, row * sequence_length + begin, dtype=np.int64))
            documents.append(record.documents)
            sources.append(record.sources)
            counts[row] += len(record.starts)
        lengths[row] = end
    row_of = np.repeat(np.arange(len(rows)), counts)
    segments = _merge(row_of, *(np.concatenate(parts) if parts else np.zeros(0, np.int64)
                                for parts in (starts, documents, sources)))
    if first_sources is not None:
        segments = segments._replace(sources=segments.sources + np.asarray(first_sources)[segments.row_of])
    return _fill(tokens_BT, loss_BT, segments, lengths, mask_documents)


class _Segments(NamedTuple):
    """Documents of all rows, in order; `starts` counts from the first token of the first row."""

    row_of: np.ndarray
    starts: np.ndarray
    sources: np.ndarray


def _merge(row_of: np.ndarray, starts: np.ndarray, documents: np.ndarray, sources: np.ndarray) -> _Segments:
    """Pieces as whole documents: neighbours in a row with the same document are one segment."""
    new = np.ones(len(starts), bool)
    new[1:] = (documents[1:] != documents[:-1]) | (row_of[1:] != row_of[:-1])
    return _Segments(row_of[new], starts[new], sources[new].astype(np.int64))


def _fill(tokens_BT: np.ndarray, loss_BT: np.ndarray | None, segments: _Segments, lengths: np.ndarray,
          mask_documents: bool) -> dict[str, np.ndarray]:
    """Spread what is known per segment over the positions, each row's padding being a segment numbered 0."""
    shape_BT, (rows, length_T) = tokens_BT.shape, tokens_BT.shape
    row_starts = np.arange(rows) * length_T
    padded = np.flatnonzero(lengths < length_T)
    starts = np.concatenate([segments.starts, row_starts[padded] + lengths[padded]])
    number = np.arange(len(segments.starts)) - np.searchsorted(segments.row_of, segments.row_of) + 1
    first_key = segments.starts - row_starts[segments.row_of]
    order = np.argsort(starts, kind="stable")
    sizes = np.diff(starts[order], append=rows * length_T)

    def spread(per_segment: np.ndarray) -> np.ndarray:
        with_padding = np.concatenate([per_segment, np.zeros(len(padded), np.int64)]).astype(np.int32)
        return np.repeat(with_padding[order], sizes).reshape(shape_BT)

    segment_ids_BT = spread(number)
    real_BT = segment_ids_BT > 0
    index_T = np.arange(length_T, dtype=np.int32)
    first_key_BT = np.where(real_BT, spread(first_key) if mask_documents else np.int32(0), index_T)
    weights_BT = real_BT.astype(np.float32)
    last = starts[order] + sizes - 1 if mask_documents else row_starts + lengths - 1
    weights_BT.reshape(-1)[last] = 0  # the next token is another document's or padding
    if loss_BT is not None:
        weights_BT[:, :-1] *= loss_BT[:, 1:]
    targets_BT = np.zeros(shape_BT, np.int32)
    np.copyto(targets_BT[:, :-1], tokens_BT[:, 1:], where=weights_BT[:, :-1] > 0)
    return {"tokens": tokens_BT, "targets": targets_BT, "weights": weights_BT,
            "positions": index_T - first_key_BT, "first_key": first_key_BT, "segment_ids": segment_ids_BT,
            "source_ids": spread(segments.sources)}


def _column(values: np.ndarray, dtype: str, what: str) -> bytes:
    array = np.asarray(values)
    if array.dtype == dtype:  # fits: looking for the largest value takes longer than all else of a record
        return array.tobytes()
    if array.size and (array.min() < 0 or array.max() > np.iinfo(dtype).max):
        raise DataError(f"packed record: {what} {array.min()}..{array.max()} does not fit in "
                        f"{np.dtype(dtype).name}.")
    return array.astype(dtype).tobytes()


def _check_segments(starts: np.ndarray, length: int, documents: int, sources: int) -> None:
    count = len(starts)
    if documents != count or sources != count:
        raise DataError(f"packed record: {count} segments, {documents} documents, {sources} sources. {_MEND}")
    if not length or not count:
        raise DataError(f"packed record: {length} tokens in {count} segments: empty. {_MEND}")
    if starts[0] != 0 or starts[-1] >= length or (starts[1:] <= starts[:-1]).any():
        raise DataError(f"packed record: segments start at {starts.tolist()[:20]}, which does not grow from "
                        f"0 to below {length}. {_MEND}")
