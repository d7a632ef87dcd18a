"""`perplexity`: how likely an n-gram model, trained on text one wants, finds a text (CCNet, Wenzek et al. 2019)."""

import dataclasses
from pathlib import Path
from typing import Literal

import polars as pl

from data_pipeline.engine.variables import expand_variables
from data_pipeline.filters import ngram
from data_pipeline.filters.base import Batch, Judgement, Parameters
from data_pipeline.filters.resources import file_hash
from data_pipeline.filters.rules import first_broken, outside
from nanollama.data.strict import FieldError


@dataclasses.dataclass(frozen=True)
class PerplexityFilter(Parameters):
    """Keeps texts whose perplexity per word is at most `max_perplexity`. `model` is a directory made by
    `python -m data_pipeline.language_model train`; one that finds noise no less likely is refused.
    """

    model: str
    type: Literal["perplexity"] = "perplexity"
    max_perplexity: float = 5000.0
    min_perplexity: float | None = None  # what is too predictable: lists, templates

    def check(self, where: str) -> None:
        """Raises FieldError on bounds that keep nothing."""
        if not self.max_perplexity > 1:
            raise FieldError(f"{where}.max_perplexity", f"{self.max_perplexity} is not above 1", "Try 5000.")
        if self.min_perplexity is not None and self.min_perplexity > self.max_perplexity:
            raise FieldError(f"{where}.min_perplexity", f"{self.min_perplexity} is above max_perplexity "
                             f"{self.max_perplexity}, so nothing would be kept", "Lower it, or leave it out.")

    def resources(self) -> dict[str, str]:
        """The model."""
        return {"language model": self._hash()}

    def judge(self, batch: Batch) -> Judgement:
        """The perplexity of each text. A text without words has none, and is dropped."""
        model = ngram.load(self._directory(), self._hash())
        model.require_noise_above(self.max_perplexity, f"filter perplexity, {self._directory()}")
        perplexity = pl.Series("perplexity", model.perplexities(batch.text), dtype=pl.Float64)
        rules = [(pl.col("perplexity").is_null(), "no words"),
                 *outside("perplexity", self.min_perplexity, self.max_perplexity, "too low", "too high")]
        return Judgement(first_broken(perplexity.to_frame(), rules, self.type), {"perplexity": perplexity})

    def _directory(self) -> Path:
        return Path(expand_variables(self.model, "filter perplexity.model"))

    def _hash(self) -> str:
        ngram.read_description(self._directory())
        return file_hash(self._directory() / ngram.ARPA)
