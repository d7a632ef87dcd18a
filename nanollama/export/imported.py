"""A run folder made of published weights: a checkpoint at step 0, the model's config, its tokenizer, where it is from.

Owns what the import commands have in common, so that an imported model is evaluated, talked to and trained on like
one that was trained here. Nothing is written before everything that can be checked is.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from nanollama.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    PackedSetConfig,
    as_dict,
)
from nanollama.data.files import DataError, Lock, write_json
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import copy_tokenizer
from nanollama.export.weights import Parts, Source, Tensor, adopt, check_tensors, parameter_shapes
from nanollama.models.accounting import count_parameters
from nanollama.training.checkpoint import LazyArray, LazyCheckpoints
from nanollama.training.stored_parameters import Read


def write_run(
    output: str | Path,
    model: ModelConfig,
    source: Source,
    tensors: list[Tensor],
    *,
    lineage: Mapping[str, Any],
    make_tokenizer: Callable[[Path], Tokenizer] | None,
    left_out: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Check, convert and save; returns the run folder. One published tensor at a time is in memory.

    make_tokenizer: freezes the published tokenizer in the folder it is given; None: there is none to import.
    left_out: pattern of the published tensors that are not read.
    Errors: DataError and ConfigError, before anything is written to `output`.
    """
    output = Path(output)
    check_free(output)
    check_tensors(source, tensors, model.tie_embeddings, left_out)
    staged = output.with_name(f".{output.name}.tokenizer")
    try:
        tokenizer = None if make_tokenizer is None else make_tokenizer(staged)
        if tokenizer is not None:
            _check_vocabulary(model, tokenizer, source.where)
        return save_run(output, model, adopt(source, tensors, model), lineage=lineage, tokenizer=tokenizer, say=say)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_free(output: Path) -> None:
    """Errors: DataError when `output` holds a run."""
    if (output / "checkpoints").is_dir() and any((output / "checkpoints").iterdir()):
        raise DataError(f"{output}: holds a run already. Choose another --output, or delete it.")


def save_run(
    output: Path,
    model: ModelConfig,
    readers: Mapping[str, Parts | Callable[[], np.ndarray]],
    *,
    lineage: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write a run folder at step 0; `readers` gives each parameter whole, or in parts; one at a time is in memory.

    Errors: DataError; a folder that was not there before is not there after.
    """
    check_free(output)
    fresh = not output.exists()
    try:
        with Lock(output):
            if tokenizer is not None:
                copy_tokenizer(tokenizer.directory, output / "tokenizer")
            config = as_dict(_config(output.name, model))
            _save(output, model, readers, {
                "config": config,
                "lineage": dict(lineage),
                "tokenizer": tokenizer.sha256 if tokenizer is not None else "",
            }, say)  # fmt: skip
            write_json(output / "config.json", config)
            write_json(output / "lineage.json", {"imported": dict(lineage)})
    except BaseException:
        if fresh:
            shutil.rmtree(output, ignore_errors=True)
        raise
    return output


def _config(name: str, model: ModelConfig) -> Config:
    """A whole Config, as every run has one; of these fields only the model says something."""
    data = DataConfig(
        sets=(PackedSetConfig(path="(imported)"),),
        tokenizer="tokenizer",
        sequence_length=model.max_position_embeddings,
    )
    return Config(name=name, steps=1, model=model, data=data, batch=BatchConfig(global_rows=1))


def _save(
    output: Path,
    model: ModelConfig,
    readers: Mapping[str, Parts | Callable[[], np.ndarray]],
    metadata: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    shapes, begin = parameter_shapes(model), time.perf_counter()
    parts = {path: read if isinstance(read, Parts) else Parts.of(read) for path, read in readers.items()}
    params = {
        path: LazyArray(_checked(path, parts[path].read), shapes[path], stacked=parts[path].stacked)
        for path in sorted(shapes)
    }
    step = LazyArray(lambda index: np.zeros((), np.int32), (), np.int32)
    checkpoints = LazyCheckpoints(output / "checkpoints", CheckpointConfig())
    try:
        checkpoints.save(0, {"params": unflatten_dict(params, sep="/"), "step": step}, metadata)
    finally:
        checkpoints.close()
    say(
        f"{output}: {count_parameters(model).total:,} parameters of a {model.family} model in "
        f"{time.perf_counter() - begin:.1f} s"
    )


def _checked(path: str, read: Read) -> Read:
    def checked(index: tuple[int, ...]) -> np.ndarray:
        array = read(index)
        if not np.isfinite(array.min()) or not np.isfinite(array.max()):  # no copy, unlike isfinite(array)
            raise DataError(f"{path}: holds NaN or infinite values. The weights are damaged: download them again.")
        return array

    return checked


def _check_vocabulary(model: ModelConfig, tokenizer: Tokenizer, where: str) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {model.vocab_size}: "
            "ids above that have no embedding. Use the tokenizer that the model was published with."
        )
