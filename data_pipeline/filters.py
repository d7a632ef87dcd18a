"""Filters: small pure judgements on one document's text, found by `type` in the mixture file.

Owns what each filter keeps and the reason it gives for a drop. A filter knows one text at a time; what needs
the whole corpus (exact duplicates) is a marker here and done in `selection`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from nanollama.data.strict import FieldError, from_mapping, nearest


@dataclasses.dataclass(frozen=True)
class LengthFilter:
    """Keeps texts of min_characters to max_characters, both included."""

    type: Literal["length"] = "length"
    min_characters: int = 0
    max_characters: int | None = None

    def reason(self, text: str) -> str | None:
        """Why `text` is dropped, or None to keep it."""
        if len(text) < self.min_characters:
            return f"shorter than {self.min_characters} characters"
        if self.max_characters is not None and len(text) > self.max_characters:
            return f"longer than {self.max_characters} characters"
        return None


@dataclasses.dataclass(frozen=True)
class ExactDuplicateFilter:
    """Drops a text that this dataset or an earlier one of the mixture has already given, byte for byte."""

    type: Literal["exact_duplicate"] = "exact_duplicate"

    def reason(self, text: str) -> str | None:
        """Always None: a text alone is no duplicate (see `selection.Selection`)."""
        return None


Filter = LengthFilter | ExactDuplicateFilter
FILTERS: dict[str, type[Filter]] = {"length": LengthFilter, "exact_duplicate": ExactDuplicateFilter}


def make_filter(mapping: Any, where: str) -> Filter:
    """The filter that `mapping` describes. Raises FieldError on an unknown type or a wrong parameter."""
    if not isinstance(mapping, Mapping) or "type" not in mapping:
        raise FieldError(
            where, f"{mapping!r} has no `type`", f"Write for example {{type: length, min_characters: 50}}; "
            f"types: {', '.join(FILTERS)}.")
    name = mapping["type"]
    if name not in FILTERS:
        raise FieldError(f"{where}.type", f"no filter is called {name!r}", nearest(str(name), list(FILTERS)))
    made = from_mapping(FILTERS[name], mapping, where)
    if isinstance(made, LengthFilter):
        if made.min_characters < 0:
            raise FieldError(f"{where}.min_characters", f"{made.min_characters} is negative",
                             "Give 0 or more.")
        if made.max_characters is not None and made.max_characters < made.min_characters:
            raise FieldError(f"{where}.max_characters", f"{made.max_characters} is below min_characters "
                             f"{made.min_characters}, so nothing would be kept", "Raise it, or leave it out.")
    return made
