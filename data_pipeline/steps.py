"""The whole-corpus steps and the sampling methods that a mixture file may name, with their parameters.

Owns the lookup from `type` (or `method`) to the frozen dataclass whose fields are the parameters, the checks
of those, and the formulas from the datasets' sizes to their weights. Knows nothing of how a step is run.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from nanollama.data.strict import FieldError, from_mapping, nearest


@dataclasses.dataclass(frozen=True)
class ExactDuplicates:
    """Drops texts that are equal after `normalize`; the oldest is kept, without dates the first."""

    type: Literal["exact"] = "exact"
    normalize: Literal["none", "whitespace", "words"] = "none"


@dataclasses.dataclass(frozen=True)
class MinHashDuplicates:
    """Drops a text if a kept, older one has at least `threshold` of its word n-grams (exact Jaccard)."""

    type: Literal["minhash"] = "minhash"
    threshold: float = 0.8
    ngram: int = 5
    bands: int = 16
    rows: int = 8  # bands * rows is the number of permutations
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class SimHashDuplicates:
    """Drops a text if a kept, older one differs in at most `distance` of the fingerprint's 64 bits."""

    type: Literal["simhash"] = "simhash"
    ngram: int = 5
    distance: int = 3


@dataclasses.dataclass(frozen=True)
class Decontamination:
    """Drops texts that share an n-gram, exactly or in an anchored window, with an evaluation item."""

    type: Literal["decontaminate"] = "decontaminate"
    # names of evaluation sets, or files with ${VARIABLES}; one that is absent is recorded as missing
    sets: tuple[str, ...] = ()
    ngram: int = 13
    threshold: float = 0.8  # Jaccard of the window around a shared n-gram and the item
    missing: Literal["stop", "record"] = "stop"


@dataclasses.dataclass(frozen=True)
class ImportanceResampling:
    """DSIR: keeps `rate` of each source's documents, those most like the target text (Xie et al. 2023)."""

    type: Literal["dsir"] = "dsir"
    target: tuple[str, ...] = ()  # datasets of this mixture, or files
    rate: float = 0.95
    buckets: int = 10_000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class AttributeSelection:
    """Keeps or resamples documents by an attribute that a filter has stored with them."""

    type: Literal["attributes"] = "attributes"
    attribute: str = "quality"
    # share of documents kept for each value of the attribute; values not named keep `other`
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    other: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Weighted:
    """The mix_ratio of the file, as written."""

    formula: ClassVar[str] = "p_i = mix_ratio_i, as written"
    method: Literal["weighted"] = "weighted"


@dataclasses.dataclass(frozen=True)
class Proportional:
    """p_i = n_i / sum n: every dataset is seen equally often."""

    formula: ClassVar[str] = "p_i = n_i / sum_j n_j"
    method: Literal["proportional"] = "proportional"

    def weights(self, sizes: Sequence[float], budget: float | None) -> list[float]:
        """Weights of datasets of `sizes` tokens."""
        return _normalized(sizes)


@dataclasses.dataclass(frozen=True)
class Alpha:
    """p_i proportional to n_i ** alpha: above 1 favours large datasets, below 1 small ones."""

    formula: ClassVar[str] = "p_i = n_i ** alpha / sum_j n_j ** alpha"
    method: Literal["alpha"] = "alpha"
    alpha: float = 1.3

    def weights(self, sizes: Sequence[float], budget: float | None) -> list[float]:
        """Weights of datasets of `sizes` tokens."""
        return _normalized([(size / max(sizes)) ** self.alpha for size in sizes])


@dataclasses.dataclass(frozen=True)
class Temperature:
    """p_i proportional to n_i ** (1 / temperature): 1 is proportional, infinity uniform."""

    formula: ClassVar[str] = "p_i = n_i ** (1 / temperature) / sum_j n_j ** (1 / temperature)"
    method: Literal["temperature"] = "temperature"
    temperature: float = 3.3

    def weights(self, sizes: Sequence[float], budget: float | None) -> list[float]:
        """Weights of datasets of `sizes` tokens."""
        return _normalized([(size / max(sizes)) ** (1 / self.temperature) for size in sizes])


@dataclasses.dataclass(frozen=True)
class UniMax:
    """Uniform, but no dataset more than `max_epochs` times (Chung et al. 2023); needs metadata.total_tokens."""

    formula: ClassVar[str] = (
        "p_i = b_i / sum_j b_j; from the smallest n_i up, b_i = min(tokens left / datasets left, max_epochs * n_i)")
    method: Literal["unimax"] = "unimax"
    max_epochs: float = 4.0

    def weights(self, sizes: Sequence[float], budget: float | None) -> list[float]:
        """Weights of datasets of `sizes` tokens for `budget` tokens of training.

        From the smallest up, each gets an equal part of what is left, or `max_epochs` of itself if that is less.
        """
        left = budget if budget is not None else self.max_epochs * sum(sizes)
        given = [0.0] * len(sizes)
        order = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
        for place, index in enumerate(order):
            given[index] = min(left / (len(order) - place), self.max_epochs * sizes[index])
            left -= given[index]
        return _normalized(given)


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """mix_ratio between datasets; inside them documents from easy to hard by an attribute."""

    formula: ClassVar[str] = "p_i = mix_ratio_i; inside a dataset `stages` equal parts, ordered by the attribute"
    method: Literal["curriculum"] = "curriculum"
    by: str = "perplexity"
    order: Literal["ascending", "descending"] = "ascending"
    stages: int = 4


@dataclasses.dataclass(frozen=True)
class Temporal:
    """mix_ratio between datasets; inside them a document's weight halves with its age."""

    formula: ClassVar[str] = (
        "p_i = mix_ratio_i; inside a dataset w_d = 2 ** (-years before reference / half_life_years)")
    method: Literal["temporal"] = "temporal"
    reference: str = ""  # YYYY-MM-DD; empty: the newest document
    half_life_years: float = 2.0
    undated: float = 0.5  # weight of documents without a date


SECTIONS: dict[str, dict[str, type]] = {
    "deduplication": {"exact": ExactDuplicates, "minhash": MinHashDuplicates, "simhash": SimHashDuplicates},
    "decontamination": {"decontaminate": Decontamination},
    "selection": {"dsir": ImportanceResampling, "attributes": AttributeSelection},
}
METHODS: dict[str, type] = {
    "weighted": Weighted, "proportional": Proportional, "alpha": Alpha, "temperature": Temperature,
    "unimax": UniMax, "curriculum": Curriculum, "temporal": Temporal,
}
BY_SIZE = ("proportional", "alpha", "temperature", "unimax")  # weights computed from the datasets' tokens


def make_step(section: str, mapping: Any, where: str) -> Any:
    """The step of a section that `mapping` describes. Raises FieldError."""
    return _make(SECTIONS[section], "type", mapping, where, f"{section} step")


def make_sampling(mapping: Any, where: str) -> Any:
    """The sampling method that `mapping` describes. Raises FieldError."""
    return _make(METHODS, "method", mapping, where, "sampling method")


def _make(classes: Mapping[str, type], key: str, mapping: Any, where: str, what: str) -> Any:
    if not isinstance(mapping, Mapping) or key not in mapping:
        raise FieldError(where, f"{mapping!r} has no `{key}`",
                         f"Write for example {{{key}: {next(iter(classes))}}}; known: {', '.join(classes)}.")
    name = mapping[key]
    if name not in classes:
        raise FieldError(f"{where}.{key}", f"no {what} is called {name!r}", nearest(str(name), list(classes)))
    made: Any = from_mapping(classes[name], mapping, where)
    for field, (test, wanted) in _RANGES.items():
        value = getattr(made, field, None)
        if value is not None and not test(value):
            raise FieldError(f"{where}.{field}", f"{value!r} is not {wanted}", f"Give {wanted}.")
    return made


def _normalized(values: Sequence[float]) -> list[float]:
    total = math.fsum(values)
    return [value / total for value in values]


def _positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _share(value: float) -> bool:
    return 0 < value <= 1


# what a parameter of this name must be, in every step that has it
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "threshold": (_share, "a number in (0, 1]"),
    "rate": (_share, "a number in (0, 1]"),
    "other": (lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    "undated": (lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    "rates": (lambda value: all(0 <= rate <= 1 for rate in value.values()), "a mapping of values to shares in [0, 1]"),
    "ngram": (_positive, "a number above 0"),
    "bands": (_positive, "a number above 0"),
    "rows": (_positive, "a number above 0"),
    "buckets": (_positive, "a number above 0"),
    "stages": (_positive, "a number above 0"),
    "distance": (lambda value: 0 <= value <= 16, "0 to 16 bits"),
    "alpha": (_positive, "a number above 0"),
    "temperature": (_positive, "a number above 0"),
    "max_epochs": (_positive, "a number above 0"),
    "half_life_years": (_positive, "a number above 0"),
    "reference": (lambda value: re.fullmatch(r"(\d{4}-\d{2}-\d{2})?", value) is not None,
                  "a date in quotes, '2024-12-31'"),
}
