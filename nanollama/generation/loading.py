"""A checkpoint ready for use: its parameters, what they are, and the tokenizer they were trained with.

Owns finding the tokenizer beside a checkpoint and refusing another one. Knows nothing of sampling or scoring.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from nanollama.config import Config, resolve
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer
from nanollama.models.decoder import Params
from nanollama.ops.rounding import widened
from nanollama.training.checkpoint import find_step_folder, read_metadata
from nanollama.training.initial import restore_whole


class LoadedModel(NamedTuple):
    """A trained model."""

    params: Params
    config: Config
    tokenizer: Tokenizer
    folder: Path  # of the checkpoint, named by its step

    @property
    def step(self) -> int:
        return int(self.folder.name)

    def describe(self) -> dict[str, Any]:
        """Which checkpoint a result is of; no path of this machine."""
        return {"name": self.config.name, "step": self.step, "run": self.folder.parent.parent.name,
                "tokenizer": self.tokenizer.sha256}


def load_model(checkpoint: str | Path, tokenizer: str | Path | None = None) -> LoadedModel:
    """Load a run folder's, checkpoints folder's or step folder's newest good checkpoint, float32, on one device.

    A run of adapters is loaded with its base, merged into it.

    tokenizer: its directory; default: the one in the run folder. Errors: CheckpointError where there is no good
    checkpoint; DataError with both hashes when the tokenizer is not the checkpoint's own.
    """
    folder = find_step_folder(checkpoint)
    beside = folder.parent.parent / "tokenizer"
    frozen = load_tokenizer(tokenizer or beside)
    metadata = read_metadata(folder)
    frozen.require(metadata["tokenizer"], f"Checkpoint {folder}",
                   f"Give the run's own tokenizer: --tokenizer={beside}")
    config = dataclasses.replace(resolve(metadata["config"]), lora=None)
    return LoadedModel(widened(restore_whole(folder)), config, frozen, folder)
