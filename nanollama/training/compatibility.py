"""Whether a checkpoint is of the model and of the arrays that are asked for: names every difference.

Knows shapes, types and configs; reads no files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanollama.config import ModelConfig
from nanollama.data.strict import FieldError, from_mapping, to_mapping
from nanollama.training.integrity import CheckpointError


def check_model(folder: Path, metadata: Mapping[str, Any], model: ModelConfig, besides: Sequence[str] = ()) -> None:
    """Compare architectures, but for `besides` and `init_std`. Errors: CheckpointError names fields and both values."""
    try:
        saved = to_mapping(from_mapping(ModelConfig, metadata["config"]["model"], "config.model"))
    except (KeyError, TypeError, FieldError) as error:
        raise CheckpointError(
            f"{folder}: its metadata names no architecture this version knows ({error}). Use the version that wrote it."
        ) from error
    asked = to_mapping(model)
    different = [
        f"config.model.{name}: checkpoint {saved[name]!r}, asked {asked[name]!r}"
        for name in asked
        if name not in ("init_std", *besides) and saved[name] != asked[name]
    ]
    if different:
        raise CheckpointError(
            f"{folder} is of another model: {'; '.join(different)}. Use the checkpoint's values, or "
            "train this model from the start in another run folder."
        )


def check_arrays(folder: Path, saved_state: Any, abstract_state: Any) -> None:
    """Compare two trees' shapes and types. Errors: CheckpointError names each array that differs, up to eight."""
    saved, asked = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (saved_state, abstract_state)
    )
    different = [
        f"{name}: checkpoint {saved.get(name, 'has none')}, asked {asked.get(name, 'for none')}"
        for name in sorted(saved.keys() | asked.keys())
        if saved.get(name) != asked.get(name)
    ]
    if different:
        more = f"; and {len(different) - 8} more" if len(different) > 8 else ""
        raise CheckpointError(
            f"{folder} holds other arrays than asked for: {'; '.join(different[:8])}{more}. The model "
            "and config.optimizer.name must be those of the checkpoint."
        )
