"""What a mixture file can say beside its datasets: every field's name, type and default.

Owns the frozen dataclasses that a mixture becomes. Knows nothing of YAML, checks or how sources are read.
"""

import dataclasses
from typing import Any

from data_pipeline.mixtures.steps import make_sampling, make_step
from data_pipeline.sources.dataset import DatasetConfig, available_tokens


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the mixture is for. Recorded with everything made from it."""

    phase: str
    description: str
    total_tokens: int | None = None  # tokens the training phase is meant to see
    steps: int | None = None
    max_seq_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Validation:
    """Documents held out of training, chosen by a hash of their text."""

    ratio: float = 0.02
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """A whole mixture file."""

    metadata: Metadata
    datasets: tuple[DatasetConfig, ...]
    validation: Validation = Validation()
    filters: tuple[dict, ...] = ()  # of every dataset, before its own; a loaded mixture has them there
    deduplication: tuple[dict, ...] = ()  # steps over the whole corpus, in this order: see steps.SECTIONS
    decontamination: tuple[dict, ...] = ()
    selection: tuple[dict, ...] = ()
    sampling: dict = dataclasses.field(default_factory=lambda: {"method": "weighted"})  # see steps.METHODS

    def steps(self, section: str) -> tuple[Any, ...]:
        """The steps of deduplication, decontamination or selection as objects, in the order of the file."""
        return tuple(make_step(section, item, section) for item in getattr(self, section))

    @property
    def built_sampling(self) -> Any:
        """The sampling method as an object."""
        return make_sampling(self.sampling, "sampling")


def epochs_of(dataset: DatasetConfig, metadata: Metadata) -> float | None:
    """How often training on metadata.total_tokens goes over the dataset; None when the file does not say."""
    available = available_tokens(dataset)
    if available is None or metadata.total_tokens is None:
        return None
    return dataset.mix_ratio * metadata.total_tokens / available
