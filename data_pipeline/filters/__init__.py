"""Filters: judgements on one document each, found by `type` in the mixture file.

Owns the table of types and the way from a mapping of the file to a filter. What needs the whole corpus (exact
duplicates) is a marker here and done elsewhere.
"""

from collections.abc import Mapping
from typing import Any

from data_pipeline.filters.attributes import DomainFilter, QualityFilter, ToxicityFilter
from data_pipeline.filters.base import Batch, Filter, Judgement, filter_key, make_batch
from data_pipeline.filters.c4 import C4Filter
from data_pipeline.filters.clean import CleanFilter
from data_pipeline.filters.exact_duplicate import ExactDuplicateFilter
from data_pipeline.filters.fineweb import FineWebFilter
from data_pipeline.filters.gopher_quality import GopherQualityFilter
from data_pipeline.filters.gopher_repetition import GopherRepetitionFilter
from data_pipeline.filters.heuristics import HeuristicsFilter
from data_pipeline.filters.language import LanguageFilter
from data_pipeline.filters.length import LengthFilter
from data_pipeline.filters.perplexity import PerplexityFilter
from data_pipeline.filters.pii import PiiFilter
from data_pipeline.filters.url_blocklist import UrlBlocklistFilter
from nanollama.data.strict import FieldError, from_mapping, nearest

__all__ = ["FILTERS", "Batch", "ExactDuplicateFilter", "Filter", "Judgement", "LengthFilter", "filter_key",
           "make_batch", "make_filter"]

FILTERS: dict[str, type[Filter]] = {
    "length": LengthFilter,
    "exact_duplicate": ExactDuplicateFilter,
    "heuristics": HeuristicsFilter,
    "gopher_quality": GopherQualityFilter,
    "gopher_repetition": GopherRepetitionFilter,
    "c4": C4Filter,
    "fineweb": FineWebFilter,
    "language": LanguageFilter,
    "perplexity": PerplexityFilter,
    "pii": PiiFilter,
    "url_blocklist": UrlBlocklistFilter,
    "clean": CleanFilter,
    "quality": QualityFilter,
    "toxicity": ToxicityFilter,
    "domain": DomainFilter,
}


def make_filter(mapping: Any, where: str) -> Filter:
    """The filter that `mapping` describes. Raises FieldError on an unknown type or a wrong parameter."""
    if not isinstance(mapping, Mapping) or "type" not in mapping:
        raise FieldError(
            where, f"{mapping!r} has no `type`", f"Write for example {{type: length, min_characters: 50}}; "
            f"types: {', '.join(FILTERS)}.")
    name = mapping["type"]
    if not isinstance(name, str) or name not in FILTERS:
        raise FieldError(f"{where}.type", f"no filter is called {name!r}", nearest(str(name), list(FILTERS)))
    made: Filter = from_mapping(FILTERS[name], mapping, where)
    made.check(where)
    return made
