"""Bytes from plain, .gz and .zst files or URLs in bounded memory, split on a separator.

Owns decompression and splitting: a broken end of a file never costs the rows before it, and a row longer than
the limit is never held whole. Knows nothing of JSON or text. Lines end at "\\n" only: `str.splitlines` would
break texts at U+2028, U+0085 and others.
"""

import os
import zlib
from collections.abc import Callable, Iterator

import pyarrow

from data_pipeline.sources.remote import open_binary

BLOCK = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Report = Callable[[int], None]  # called with the raw bytes read


class BrokenStream(Exception):
    """The file is damaged from here on. Everything before was delivered."""


class TooLong:
    """Stands for a row over the limit, whose bytes were not kept."""


def read_blocks(path: str | os.PathLike[str], report: Report = lambda count: None) -> Iterator[bytes]:
    """Decompressed bytes of `path` in blocks of about 1 MiB. Raises BrokenStream after the last good byte of a damaged
    file, DataError when it cannot be read: that may be otherwise the next time, and its rows are not lost."""
    name = os.fspath(path)
    if name.endswith(".gz"):
        yield from _gzip_blocks(name, report)
    elif name.endswith(".zst"):
        yield from _zstd_blocks(name, report)
    else:
        yield from _raw_blocks(name, report)


def split_rows(blocks: Iterator[bytes], separator: bytes,
               limit: int) -> Iterator[tuple[int, bytes | TooLong | BrokenStream]]:
    """(number from 1, row) for rows between separators, without them; the last row needs no separator.

    A row over `limit` bytes comes as TooLong; a broken stream ends with its BrokenStream in the place of the
    row it cut off.
    """
    pending, number, skipping = bytearray(), 1, False
    try:
        for block in blocks:
            searched = max(0, len(pending) - len(separator) + 1)
            pending += block
            start = 0
            while (end := pending.find(separator, max(start, searched))) >= 0:
                yield number, TooLong() if skipping or end - start > limit else _row(
                    pending, start, end, number)
                number, skipping, start = number + 1, False, end + len(separator)
            del pending[:start]
            if len(pending) > limit + len(separator) - 1:  # forget it, but keep what may start a separator
                skipping = True
                del pending[:len(pending) - (len(separator) - 1)]
    except BrokenStream as error:
        yield number, error
        return
    if skipping or len(pending) > limit:
        yield number, TooLong()
    elif pending:
        yield number, _row(pending, 0, len(pending), number)


def read_whole(path: str | os.PathLike[str],
               limit: int,
               report: Report = lambda count: None) -> bytes | TooLong | BrokenStream:
    """All bytes of a file, or what stands for them when it is over `limit` or broken."""
    content = bytearray()
    try:
        for block in read_blocks(path, report):
            content += block
            if len(content) > limit:
                return TooLong()
    except BrokenStream as error:
        return error
    return bytes(content).removeprefix(BYTE_ORDER_MARK)


def _row(pending: bytearray, start: int, end: int, number: int) -> bytes:
    with memoryview(pending) as view:
        row = bytes(view[start:end])
    return row.removeprefix(BYTE_ORDER_MARK) if number == 1 else row


def _raw_blocks(path: str, report: Report) -> Iterator[bytes]:
    with open_binary(path) as file:
        while block := file.read(BLOCK):
            report(len(block))
            yield block


def _gzip_blocks(path: str, report: Report) -> Iterator[bytes]:
    """zlib by hand: `gzip.open(...).read` drops up to a buffer of good bytes when the stream is cut off."""
    decoder, fresh = zlib.decompressobj(wbits=31), True
    for raw in _raw_blocks(path, report):
        more = True
        while more:
            if fresh and not raw.strip(b"\0"):  # zero padding after the last member is allowed
                break
            fresh = False
            try:
                block = decoder.decompress(raw, BLOCK)
            except zlib.error as error:
                raise BrokenStream(f"damaged gzip data ({error})") from error
            if block:
                yield block
            raw = decoder.unconsumed_tail
            if decoder.eof:
                raw, fresh = decoder.unused_data, True
                decoder = zlib.decompressobj(wbits=31)
            more = bool(raw) or len(block) == BLOCK  # a full block: zlib may hold more without more input
    if not fresh:
        raise BrokenStream("gzip data is cut off")


def _zstd_blocks(path: str, report: Report) -> Iterator[bytes]:
    good = 0
    try:
        with open_binary(path) as raw, pyarrow.CompressedInputStream(raw, "zstd") as stream:
            position = 0
            while block := stream.read(BLOCK):
                good += len(block)
                yield block
                report(raw.tell() - position)
                position = raw.tell()
    except OSError as error:
        if tail := _zstd_tail(path, good):
            yield tail
        raise BrokenStream(f"zstd data is cut off or damaged ({error})") from error


def _zstd_tail(path: str, good: int) -> bytes:
    """The bytes after `good` that still decompress: pyarrow drops them with the block that failed."""
    tail = bytearray()
    with open_binary(path) as raw, pyarrow.CompressedInputStream(raw, "zstd") as stream:
        while good > 0:
            good -= len(stream.read(min(BLOCK, good)))
        try:
            while byte := stream.read(1):
                tail += byte
        except OSError:
            pass
    return bytes(tail)
