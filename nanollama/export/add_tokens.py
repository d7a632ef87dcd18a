"""`python -m nanollama.export.add_tokens --checkpoint=RUN --output=RUN2`: a model with room for special tokens.

Owns the resizing: the new rows of embedding and head start at the mean of the old ones, tied ones are resized once,
and rows that only pad the vocabulary to a multiple of 128 are zero and never predicted. The output is a run folder
at step 0, to train on from (`config.initial_checkpoint`), with a tokenizer that names its parent.
"""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nanollama.config import ConfigError, ModelConfig
from nanollama.data.added_tokens import CHAT_TOKENS, add_tokens
from nanollama.data.files import DataError
from nanollama.data.strict import from_mapping
from nanollama.data.tokenizer_folder import load_tokenizer
from nanollama.export.imported import save_run
from nanollama.export.weights import Parts, parameter_shapes, stacked_axes
from nanollama.training.checkpoint import find_step_folder, read_metadata
from nanollama.training.initial import merged_reader
from nanollama.training.integrity import checkpoint_hash

ALIGN = 128  # rows of embedding and head: what matrix units and meshes divide
_VOCABULARY_AXIS = {"embedding": 0, "head": 1}


def extend(
    checkpoint: str | Path,
    output: str | Path,
    tokens: Sequence[str] = CHAT_TOKENS,
    chat_template: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the newest good checkpoint of `checkpoint` with `tokens` added to the run folder `output`.

    One part of a parameter at a time is in memory. Errors: DataError and ConfigError, before anything is written.
    """
    folder = find_step_folder(checkpoint)
    metadata = read_metadata(folder)
    old = from_mapping(ModelConfig, metadata["config"]["model"], "config.model")
    tokenizer = load_tokenizer(folder.parent.parent / "tokenizer")
    tokenizer.require(metadata["tokenizer"], f"Checkpoint {folder}", "Put the run's own tokenizer back.")
    if tokenizer.vocab_size > old.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {old.vocab_size}: "
            "damaged. Import or train it again."
        )
    output = Path(output)
    staged = output.with_name(f".{output.name}.added")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        added = add_tokens(tokenizer, staged, tokens, chat_template)
        size = max(old.vocab_size, added.vocab_size)
        model = dataclasses.replace(old, vocab_size=size, vocab_padding=-size % ALIGN)
        parent = {"path": str(checkpoint), "step": int(folder.name), "hash": checkpoint_hash(folder)}
        before = metadata.get("lineage", {})
        lineage = {
            "format": "nanollama",
            "source": folder.parent.parent.name,
            "parent": parent,
            "added_tokens": {**before.get("added_tokens", {}), **added.manifest["added_tokens"]},  # none is trained yet
            "dtype": before.get("dtype", "float32"),
        }
        reader, shapes = merged_reader(folder), parameter_shapes(model)

        def parts(path: str, stacked: int) -> Parts:
            read, axis = reader(path, stacked), _VOCABULARY_AXIS.get(path)
            if axis is None:
                return Parts(read, stacked)
            return Parts.of(lambda: _resized(read(()), shapes[path], axis, tokenizer.vocab_size, size))

        readers = {path: parts(path, stacked) for path, stacked in stacked_axes(model).items()}
        return save_run(output, model, readers, lineage=lineage, tokenizer=added, say=say)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _resized(old: np.ndarray, shape: tuple[int, ...], axis: int, known: int, size: int) -> np.ndarray:
    """A table in its new shape; `known` ids have been trained, ids from there to `size` get their mean."""
    new = np.zeros(shape, old.dtype)
    rows, old = np.moveaxis(new, axis, 0), np.moveaxis(old, axis, 0)
    rows[:known] = old[:known]
    rows[known:size] = old[:known].mean(axis=0, dtype=np.float64)
    return new


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 and a message on what the user can mend."""
    parser = argparse.ArgumentParser(prog="nanollama.export.add_tokens", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoints folder or one step's folder")
    parser.add_argument("--output", required=True, help="run folder to make")
    parser.add_argument("--tokens", nargs="+", default=list(CHAT_TOKENS), metavar="TOKEN",
                        help=f"default: {' '.join(CHAT_TOKENS)}")  # fmt: skip
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja; default: the tokenizer's own")
    options = parser.parse_args(arguments)
    try:
        template = options.chat_template.read_text(encoding="utf-8") if options.chat_template else None
        output = extend(options.checkpoint, options.output, options.tokens, template)
    except (DataError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    added = load_tokenizer(output / "tokenizer").manifest["added_tokens"]
    print("\n".join(f"{number:>8}  {token}" for token, number in added.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
