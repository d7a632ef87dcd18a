"""The texts that installed distributions carry about themselves: name, summary and README, as prose.

Real, licensed text that is on every machine with Python packages. Order: by canonical name.
"""

import dataclasses
import hashlib
import importlib.metadata
import re
from collections.abc import Iterator

from data_pipeline.sources.base import Input, State
from data_pipeline.text.documents import Bad, Document, Place, make_document, scalar_meta


class PackageSource:
    """One document per installed distribution."""

    def parts(self) -> list["PackagePart"]:
        """All of them together."""
        return [PackagePart()]


@dataclasses.dataclass(frozen=True)
class PackagePart:
    """Every installed distribution; the first one on the path wins, as it does for imports."""

    name: str = "installed packages"
    bytes: int = 0

    def inputs(self) -> list[Input]:
        """Name, version, size and hash of every text."""
        rows = []
        for name, distribution in _installed():
            raw = _text(distribution).encode("utf-8", "surrogateescape")
            rows.append(Input(f"{name}=={distribution.version}", len(raw), hashlib.sha256(raw).hexdigest()))
        return rows

    def open(self, state: State | None = None) -> "PackageReader":
        """See Part."""
        return PackageReader(state)


class PackageReader:
    """One pass through them."""

    def __init__(self, state: State | None):
        self.bytes_read = 0
        self._row = state["row"] if state else 0

    def state(self) -> State:
        """See Reader."""
        return {"row": self._row}

    def __iter__(self) -> Iterator[Document | Bad]:
        """The documents. A distribution without a description is a bad row."""
        for name, distribution in _installed()[self._row:]:
            self._row += 1
            place = Place(name, f"=={distribution.version}")
            if not _description(distribution).strip():
                yield Bad(place, "no description")
                continue
            licence = _field(distribution, "License-Expression") or _field(distribution, "License")
            facts = {"version": distribution.version, "licence": licence.strip().split("\n")[0][:100]}
            meta = scalar_meta(facts, None, set())
            yield make_document(name, _text(distribution), meta, place)


def _installed() -> list[tuple[str, importlib.metadata.Distribution]]:
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = _field(distribution, "Name")
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution)
    return sorted(found.items())


def _text(distribution: importlib.metadata.Distribution) -> str:
    parts = [_field(distribution, "Name"), _field(distribution, "Summary"), _description(distribution)]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _description(distribution: importlib.metadata.Distribution) -> str:
    payload = distribution.metadata.get_payload()  # type: ignore[attr-defined]
    return payload if isinstance(payload, str) and payload.strip() else _field(distribution, "Description")


def _field(distribution: importlib.metadata.Distribution, name: str) -> str:
    values = distribution.metadata.get_all(name)
    return str(values[0]) if values else ""
