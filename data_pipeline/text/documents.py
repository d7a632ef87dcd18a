"""What flows through the corpus command: documents, and rows that could not become one.

Owns the rule of what a usable text is, and the identity of a text (`text_digest`). Knows nothing of files.
"""

import calendar
import dataclasses
import datetime
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

UNKNOWN_LANGUAGE = "not known"
MAX_META_CHARACTERS = 512  # longer strings are content, not facts about the document
_ISO_DATE = re.compile(r"\s*([12]\d{3})(?:-(0[1-9]|1[0-2])(?:-(0[1-9]|[12]\d|3[01]))?)?(?![\d/])")
_WORD_DATE = re.compile(r"\b(\d{1,2})[ -]([A-Za-z]{3})[a-z]*[ -]([12]\d{3})\b")  # 26-FEB-1987, 3 Jan 2020
_MONTHS = {name: number for number, name in enumerate(
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"], start=1)}


class BadText(ValueError):
    """A value that is no usable text; the message is the reason that is counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: `name` and `spot` are recorded, the same on any machine; `path` is for messages."""

    name: str
    spot: str = ""
    path: str = ""

    def __str__(self) -> str:
        return f"{self.path or self.name}{self.spot}"

    @property
    def recorded(self) -> str:
        """Name and spot, without a machine's own directories."""
        return f"{self.name}{self.spot}"


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document as a source gives it."""

    id: str  # unique within its dataset
    text: str
    encoded: bytes  # the text in UTF-8
    meta: dict[str, Any]
    place: Place
    date: str | None = None  # YYYY, YYYY-MM or YYYY-MM-DD, where known


@dataclasses.dataclass(frozen=True, slots=True)
class Bad:
    """One row that is no document: where it stands, the reason it is counted under, and what was seen."""

    place: Place
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


def make_document(id: str, value: Any, meta: Mapping[str, Any], place: Place,
                  date: str | None = None) -> "Document | Bad":
    """A Document of `value`, or a Bad row that says why it is none."""
    try:
        encoded = encode_text(value)
    except BadText as error:
        return Bad(place, str(error), "" if value is None or isinstance(value, str) else type(value).__name__)
    return Document(id, value, encoded, dict(meta), place, date)


def encode_text(value: Any) -> bytes:
    """UTF-8 of a text. Raises BadText on what is not a string, is empty, or cannot be stored exactly."""
    if value is None:
        raise BadText("missing text")
    if not isinstance(value, str):
        raise BadText("text is not a string")
    if not value or value.isspace():
        raise BadText("empty text")
    if "\0" in value:
        raise BadText("NUL character in the text")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadText("lone surrogate in the text") from error


def scalar_meta(row: Mapping[str, Any], wanted: tuple[str, ...] | None,
                leave_out: set[str]) -> dict[str, Any]:
    """The fields of `row` to keep beside the text: `wanted`, or every short scalar field."""
    names = wanted if wanted is not None else [name for name in row if name not in leave_out]
    return {str(name): row[name] for name in names
            if name in row and _is_short_scalar(name) and _is_short_scalar(row[name])}


def _is_short_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= MAX_META_CHARACTERS and not any("\ud800" <= letter <= "\udfff"
                                                             for letter in value)
    return isinstance(value, (bool, int)) and abs(value) < 1 << 63


def iso_date(value: Any) -> str | None:
    """`value` (a year, an ISO date or time, an e-mail's or a newswire's date, a datetime) as YYYY[-MM[-DD]]; None when
    it says no date. Such texts sort by time."""
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.strftime("%Y-%m-%d")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if 1000 <= value <= 2999 else None
    if not isinstance(value, str):
        return None
    if (found := _ISO_DATE.match(value)) is not None:
        return _existing(*found.groups())
    if (found := _WORD_DATE.search(value)) is not None and found[2].lower() in _MONTHS:
        return _existing(found[3], f"{_MONTHS[found[2].lower()]:02d}", f"{int(found[1]):02d}")
    return None


def _existing(year: str, month: str | None, day: str | None) -> str:
    """YYYY[-MM[-DD]], without a day that the month does not have."""
    if month is None or day is None:
        return year if month is None else f"{year}-{month}"
    in_month = calendar.monthrange(int(year), int(month))[1]
    return f"{year}-{month}-{day}" if 1 <= int(day) <= in_month else f"{year}-{month}"


def language_of(meta: Mapping[str, Any]) -> str:
    """The language that the language filter, or else the source, names."""
    attributes = meta.get("attributes")
    for value in ((attributes if isinstance(attributes, dict) else {}).get("language"), meta.get("lang"),
                  meta.get("language")):
        if isinstance(value, str) and value:
            return value[:40]
    return UNKNOWN_LANGUAGE


def text_digest(encoded: bytes) -> bytes:
    """The identity of a text: the first 128 bits of the SHA-256 of its UTF-8 bytes."""
    return hashlib.sha256(encoded).digest()[:16]


def hash_fraction(digest: bytes, seed: int, purpose: str) -> float:
    """A number in [0, 1) that is fixed by text, seed and purpose, and even over texts."""
    mixed = hashlib.sha256(f"{purpose}:{seed}:".encode() + digest).digest()
    return (int.from_bytes(mixed[:8], "big") >> 11) / (1 << 53)
