"""The texts that installed distributions carry about themselves: name, summary and README, as prose.

Real, licensed text that is on every machine with Python packages. Order: by canonical name.
"""

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator

from data_pipeline.documents import Bad, Document, Place, make_document, scalar_meta
from data_pipeline.sources.base import Input


class PackageSource:
    """One document per installed distribution; the first one on the path wins, as it does for imports."""

    def __init__(self) -> None:
        self._found: dict[str, importlib.metadata.Distribution] = {}
        for distribution in importlib.metadata.distributions():
            name = _field(distribution, "Name")
            if name:
                self._found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution)
        self.total_bytes = 0
        self.bytes_read = 0

    def inputs(self) -> list[Input]:
        """Name, version, size and hash of every text."""
        rows = []
        for name, distribution in sorted(self._found.items()):
            raw = _text(distribution).encode("utf-8", "surrogateescape")
            rows.append(Input(f"{name}=={distribution.version}", len(raw), hashlib.sha256(raw).hexdigest()))
        return rows

    def read(self) -> Iterator[Document | Bad]:
        """The documents. A distribution without a description is a bad row."""
        for name, distribution in sorted(self._found.items()):
            place = Place(name, f"=={distribution.version}")
            if not _description(distribution).strip():
                yield Bad(place, "no description")
                continue
            licence = _field(distribution, "License-Expression") or _field(distribution, "License")
            facts = {"version": distribution.version, "licence": licence.strip().split("\n")[0][:100]}
            meta = scalar_meta(facts, None, set())
            yield make_document(name, _text(distribution), meta, place)


def _text(distribution: importlib.metadata.Distribution) -> str:
    parts = [_field(distribution, "Name"), _field(distribution, "Summary"), _description(distribution)]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _description(distribution: importlib.metadata.Distribution) -> str:
    payload = distribution.metadata.get_payload()  # type: ignore[attr-defined]
    return payload if isinstance(payload, str) and payload.strip() else _field(distribution, "Description")


def _field(distribution: importlib.metadata.Distribution, name: str) -> str:
    values = distribution.metadata.get_all(name)
    return str(values[0]) if values else ""
