"""`quality`, `toxicity`, `domain`: attributes that trained classifiers give a text, stored, and filtered by.

No model, no attribute: each needs a `model` directory made by `python -m data_pipeline.classify train`.
"""

import dataclasses
from typing import Literal

import numpy as np
import polars as pl

from data_pipeline.filters import classifier
from data_pipeline.filters.base import Batch, Judgement, Parameters, keep_all
from data_pipeline.filters.classifier import LABELS, Classifier, Domain, Kind, Quality
from data_pipeline.filters.resources import file_hash
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

UNKNOWN = "unknown"


class ClassifierFilter(Parameters):
    """What the three have in common: the model, loaded and checked to be of the right kind."""

    model: str

    @property
    def type(self) -> Kind:
        """The name of the filter is the kind of its model."""
        raise NotImplementedError

    def resources(self) -> dict[str, str]:
        """The model's description, which holds the hash of its weights."""
        directory = classifier.directory_of(self.model, self.type)
        return {f"{self.type} classifier": file_hash(directory / classifier.DESCRIPTION)}

    def classifier(self) -> Classifier:
        """The model. Errors: DataError when it is of another kind."""
        directory = classifier.directory_of(self.model, self.type)
        found = classifier.load(directory)
        if found.kind != self.type:
            raise DataError(f"filter {self.type}: {directory} is a classifier of {found.kind}. Give one that was "
                            f"trained with --kind={self.type}.")
        return found


@dataclasses.dataclass(frozen=True)
class QualityFilter(ClassifierFilter):
    """Keeps texts of the qualities `keep`. Stores `quality` (low, medium, high) and `quality_score` (0 to 1: the
    expected quality, medium counted as a half)."""

    model: str
    type: Literal["quality"] = "quality"
    keep: tuple[Quality, ...] = ("medium", "high")
    min_score: float | None = None

    def check(self, where: str) -> None:
        """Raises FieldError where nothing would be kept."""
        if not self.keep:
            raise FieldError(f"{where}.keep", "is empty, so nothing would be kept", "Name low, medium or high.")
        _check_share(where, "min_score", self.min_score)

    def judge(self, batch: Batch) -> Judgement:
        """Label and score of each text."""
        model = self.classifier()
        chance = model.probabilities(batch.text)
        worth = np.array([LABELS["quality"].index(label) / 2 for label in model.labels])
        measured = pl.DataFrame({"label": _best(model, chance), "score": np.round(chance @ worth, 6)})
        bad = ~pl.col("label").is_in(list(self.keep))
        low = pl.col("score") < (self.min_score if self.min_score is not None else -1)
        reasons = measured.select(reason=pl.when(bad).then("quality: " + pl.col("label")).when(low).then(
            pl.lit("quality: score too low")).otherwise(None))["reason"]
        return Judgement(reasons, {"quality": measured["label"], "quality_score": measured["score"]})


@dataclasses.dataclass(frozen=True)
class ToxicityFilter(ClassifierFilter):
    """Drops texts that are toxic with a probability of at least `threshold`; with `inverse` keeps only these (text to
    learn refusals from, or to look at). Stores `toxicity`, the probability."""

    model: str
    type: Literal["toxicity"] = "toxicity"
    threshold: float = 0.975
    inverse: bool = False

    def check(self, where: str) -> None:
        """Raises FieldError on what is no probability."""
        _check_share(where, "threshold", self.threshold)

    def judge(self, batch: Batch) -> Judgement:
        """Probability of each text."""
        model = self.classifier()
        toxic = pl.Series("toxicity", np.round(model.probabilities(batch.text)[:, model.labels.index("toxic")], 6))
        over, what = (toxic < self.threshold, "not toxic") if self.inverse else (toxic >= self.threshold, "toxic")
        reasons = pl.DataFrame({"over": over}).select(
            reason=pl.when("over").then(pl.lit(f"toxicity: {what}")).otherwise(None))["reason"]
        return Judgement(reasons, {"toxicity": toxic})


@dataclasses.dataclass(frozen=True)
class DomainFilter(ClassifierFilter):
    """Stores `domain` (one of the model's, at most 27) and `domain_score`; below `min_score` it is "unknown".
    Keeps all, or only the domains `keep`, or all but `drop`."""

    model: str
    type: Literal["domain"] = "domain"
    keep: tuple[Domain | Literal["unknown"], ...] = ()
    drop: tuple[Domain | Literal["unknown"], ...] = ()
    min_score: float = 0.3

    def check(self, where: str) -> None:
        """Raises FieldError where keep and drop contradict each other."""
        if self.keep and self.drop:
            raise FieldError(f"{where}.drop", "cannot stand beside keep", "What is not in keep is dropped already.")
        _check_share(where, "min_score", self.min_score)

    def judge(self, batch: Batch) -> Judgement:
        """Domain of each text, or "unknown"."""
        model = self.classifier()
        strangers = sorted({*self.keep, *self.drop} - {UNKNOWN, *model.labels})
        if strangers:
            raise DataError(f"filter domain: {self.model} knows no {', '.join(strangers)}; it was trained for "
                            f"{', '.join(model.labels)}. Name some of these, or train it with texts of the others.")
        chance = model.probabilities(batch.text)
        score = pl.Series("score", np.round(chance.max(axis=1, initial=0), 6))
        measured = pl.DataFrame({"label": _best(model, chance), "score": score}).with_columns(
            pl.when(pl.col("score") < self.min_score).then(pl.lit(UNKNOWN)).otherwise("label").alias("label"))
        reasons = keep_all(batch)
        if self.keep or self.drop:
            listed = pl.col("label").is_in(list(self.keep or self.drop))
            reasons = measured.select(reason=pl.when(~listed if self.keep else listed).then(
                "domain: " + pl.col("label")).otherwise(None))["reason"]
        return Judgement(reasons, {"domain": measured["label"], "domain_score": score})


def _best(model: Classifier, chance: np.ndarray) -> pl.Series:
    """The likeliest label of each text."""
    return pl.Series("label", list(model.labels), dtype=pl.String).gather(
        chance.argmax(axis=1) if len(chance) else np.zeros(0, np.int64))


def _check_share(where: str, name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise FieldError(f"{where}.{name}", f"{value} is not in [0, 1]", "It is a probability.")
