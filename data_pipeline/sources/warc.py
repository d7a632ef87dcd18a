"""WARC files (ISO 28500), as crawlers and Common Crawl write them: records, and the text of their pages.

Owns reading records in bounded memory and undoing HTTP's encodings. HTML becomes text through resiliparse (extra
`warc`), which leaves menus and footers out; records of extracted text (WET) need nothing.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from data_pipeline.sources.streams import BrokenStream, TooLong
from nanollama.data.files import DataError

MAX_HEADER = 1 << 16
_PAGES = ("text/html", "application/xhtml+xml")


@dataclasses.dataclass(frozen=True)
class WarcRecord:
    """One record: lower-case header fields and its block."""

    fields: dict[str, str]
    block: bytes

    @property
    def url(self) -> str:
        """The page's address."""
        return self.fields.get("warc-target-uri", "").strip("<>")

    @property
    def identity(self) -> str | None:
        """The record's own id, which is unique everywhere."""
        return self.fields.get("warc-record-id", "").strip("<>").removeprefix("urn:uuid:") or None

    @property
    def meta(self) -> dict[str, Any]:
        """What is kept beside the text."""
        return {key: value for key, value in (("url", self.url), ("date", self.fields.get("warc-date"))) if value}


def read_records(blocks: Iterator[bytes], limit: int) -> Iterator[WarcRecord | TooLong | BrokenStream]:
    """The records of a stream of decompressed bytes. One over `limit` comes as TooLong and is never held; a stream
    that ends early or is no WARC ends with a BrokenStream."""
    stream = _Stream(blocks)
    try:
        while (head := stream.header()) is not None:
            lines = head.decode("utf-8", "replace").split("\r\n")
            if not lines[0].startswith("WARC/"):
                raise BrokenStream(f"no WARC record where one should start ({lines[0][:40]!r})")
            fields = _fields(lines[1:])
            try:
                length = int(fields["content-length"])
            except (KeyError, ValueError) as error:
                raise BrokenStream("a WARC record without a Content-Length") from error
            if length > limit:
                stream.take(length, keep=False)
                yield TooLong()
            else:
                yield WarcRecord(fields, stream.take(length))
    except BrokenStream as error:
        yield error


def extractor(dataset: str) -> Callable[[WarcRecord], str | None]:
    """The function from a record to its text: None when it is no page, ValueError when the page cannot be read."""
    def extract(record: WarcRecord) -> str | None:
        kind, content = record.fields.get("warc-type"), record.fields.get("content-type", "")
        if kind == "conversion" and content.startswith("text/plain"):
            return record.block.decode("utf-8", "replace")
        if kind != "response" or not content.startswith("application/http"):
            return None
        status, headers, body = _http(record.block)
        page = headers.get("content-type", "").partition(";")[0].strip().lower()
        if status != 200 or page not in (*_PAGES, "text/plain"):
            return None
        return _page_text(body, headers, plain=page == "text/plain", dataset=dataset)

    return extract


def _page_text(body: bytes, headers: dict[str, str], plain: bool, dataset: str) -> str:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding
        from resiliparse.parse.html import HTMLTree
    except ImportError as error:
        raise DataError(f"dataset {dataset}: the text of web pages needs resiliparse, which is not installed. "
                        "Install it with: pip install 'nanollama[warc]'") from error
    _, _, charset = headers.get("content-type", "").lower().partition("charset=")
    named = charset.partition(";")[0].strip("\"' ") or detect_encoding(body, from_html_meta=True)
    try:
        text = body.decode(named or "utf-8", "replace")
    except LookupError:
        text = body.decode(detect_encoding(body) or "utf-8", "replace")
    text = text.replace("\0", "\ufffd")  # as HTML says of NUL
    return text if plain else extract_plain_text(HTMLTree.parse(text), main_content=True, alt_texts=False)


def _http(block: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, lower-case headers, body without transfer and content encoding) of a response."""
    head, found, body = block.partition(b"\r\n\r\n")
    if not found:
        raise ValueError("HTTP response without a body")
    lines = head.decode("latin-1").split("\r\n")
    try:
        status = int(lines[0].split()[1])
    except (IndexError, ValueError) as error:
        raise ValueError("HTTP response without a status") from error
    headers = _fields(lines[1:])
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _unchunked(body)
    encoding = headers.get("content-encoding", "").lower().strip()
    if encoding in ("gzip", "x-gzip", "deflate") and body:
        try:
            body = zlib.decompressobj(wbits=47 if body[:1] in (b"\x1f", b"\x78") else -15).decompress(body)
        except zlib.error as error:
            raise ValueError("HTTP body does not decompress") from error
    elif encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise ValueError(f"HTTP body in {encoding[:20]} encoding")
    return status, headers, body


def _unchunked(body: bytes) -> bytes:
    """The body of a chunked transfer; as it is when it was stored already joined, as some crawlers do."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        try:
            size = int(body[at:end].partition(b";")[0], 16) if end >= 0 else -1
        except ValueError:
            size = -1
        if size < 0 or size > len(body) - end:
            return body if not parts else b"".join([*parts, body[at:]])
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2:end + 2 + size])
        at = end + 4 + size


def _fields(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            fields[name.strip().lower()] = value.strip()
    return fields


class _Stream:
    """Bytes from blocks, by header or by count."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._held = blocks, bytearray()

    def header(self) -> bytes | None:
        """Up to the empty line; None at the end of the stream. Empty lines before it are skipped."""
        while True:
            while self._held[:2] == b"\r\n":
                del self._held[:2]
            end = self._held.find(b"\r\n\r\n")
            if end >= 0 and len(self._held) > 2:
                head = bytes(self._held[:end])
                del self._held[:end + 4]
                return head
            if len(self._held) > MAX_HEADER:
                raise BrokenStream("no end of a record's header, so this is no WARC file")
            block = next(self._blocks, None)
            if block is None:
                if self._held.strip():
                    raise BrokenStream("the file ends in a record's header")
                return None
            self._held += block

    def take(self, count: int, keep: bool = True) -> bytes:
        """The next `count` bytes."""
        taken = bytearray()
        while count > 0:
            if not self._held:
                block = next(self._blocks, None)
                if block is None:
                    raise BrokenStream("the file ends in a record")
                self._held += block
            piece = self._held[:count]
            del self._held[:count]
            count -= len(piece)
            if keep:
                taken += piece
        return bytes(taken)
