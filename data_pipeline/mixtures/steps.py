"""The whole-corpus steps and the sampling methods that a mixture file may name, with their parameters.

Owns the lookup from `type` (or `method`) to the frozen dataclass whose fields are the parameters, and the
formulas from the datasets' sizes to their weights. Knows nothing of how a step is run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from data_pipeline.decontaminate.step import Decontamination
from data_pipeline.dedup.exact import ExactDeduplication
from data_pipeline.dedup.minhash import MinHashDeduplication
from data_pipeline.dedup.simhash import SimHashDeduplication
from data_pipeline.select import weights
from data_pipeline.select.attributes import AttributeSelection, CurriculumPhases, QualitySelection, TemporalSelection
from data_pipeline.select.dsir import ImportanceResampling
from nanollama.data.strict import FieldError, from_mapping, nearest


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
        return weights.proportional(sizes)


@dataclasses.dataclass(frozen=True)
class Alpha:
    """p_i proportional to n_i ** alpha: above 1 favours large datasets, below 1 small ones."""

    formula: ClassVar[str] = "p_i = n_i ** alpha / sum_j n_j ** alpha"
    method: Literal["alpha"] = "alpha"
    alpha: float = 1.3

    def weights(self, sizes: Sequence[float], budget: float | None) -> list[float]:
        """Weights of datasets of `sizes` tokens."""
        return weights.alpha(sizes, self.alpha)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """p_i proportional to n_i ** (1 / temperature): 1 is proportional, infinity uniform."""

    formula: ClassVar[str] = "p_i = n_i ** (1 / temperature) / sum_j n_j ** (1 / temperature)"
    method: Literal["temperature"] = "temperature"
    temperature: float = 3.3

    def weights(self, sizes: Sequence[float], budget: float | None) -> list[float]:
        """Weights of datasets of `sizes` tokens."""
        return weights.temperature(sizes, self.temperature)


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
        return weights.unimax(sizes, self.max_epochs * sum(sizes) if budget is None else budget, self.max_epochs)


SECTIONS: dict[str, dict[str, type]] = {
    "deduplication": {"exact": ExactDeduplication, "minhash": MinHashDeduplication, "simhash": SimHashDeduplication},
    "decontamination": {"decontaminate": Decontamination},
    "selection": {"dsir": ImportanceResampling, "attributes": AttributeSelection, "quality": QualitySelection,
                  "temporal": TemporalSelection, "curriculum": CurriculumPhases},
}
METHODS: dict[str, type] = {
    "weighted": Weighted, "proportional": Proportional, "alpha": Alpha, "temperature": Temperature,
    "unimax": UniMax,
}
BY_SIZE = ("proportional", "alpha", "temperature", "unimax")  # weights computed from the datasets' tokens


def make_step(section: str, mapping: Any, where: str) -> Any:
    """The step of a section that `mapping` describes. Raises FieldError."""
    return _make(SECTIONS[section], "type", mapping, where, f"{section} step")


def make_sampling(mapping: Any, where: str) -> Any:
    """The sampling method that `mapping` describes. Raises FieldError."""
    if isinstance(mapping, Mapping) and mapping.get("method") in SECTIONS["selection"]:
        name = mapping["method"]
        raise FieldError(f"{where}.method", f"{name!r} decides between documents, not between datasets",
                         f"Write it as a step: selection: [{{type: {name}}}].")
    return _make(METHODS, "method", mapping, where, "sampling method")


def _make(classes: Mapping[str, type], key: str, mapping: Any, where: str, what: str) -> Any:
    if not isinstance(mapping, Mapping) or key not in mapping:
        raise FieldError(where, f"{mapping!r} has no `{key}`",
                         f"Write for example {{{key}: {next(iter(classes))}}}; known: {', '.join(classes)}.")
    name = mapping[key]
    if not isinstance(name, str) or name not in classes:
        raise FieldError(f"{where}.{key}", f"no {what} is called {name!r}", nearest(str(name), list(classes)))
    made: Any = from_mapping(classes[name], mapping, where)
    if hasattr(made, "check"):
        made.check(where)
    for field, (test, wanted) in _RANGES.items():
        value = getattr(made, field, None)
        if value is not None and not test(value):
            raise FieldError(f"{where}.{field}", f"{value!r} is not {wanted}", f"Give {wanted}.")
    return made


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
    "alpha": (_positive, "a number above 0"),
    "temperature": (_positive, "a number above 0"),
    "max_epochs": (_positive, "a number above 0"),
    "half_life_years": (_positive, "a number above 0"),
}
