"""Which packed sets a run reads, in what proportion and at what row length; checked before the first row.

Owns every check that needs the data: sets and tokenizer present, made with one another, fitting the model and
the row length. Knows nothing of seeds, steps or hosts; those are the loader's.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanollama.config import DataConfig, PackedSetConfig
from nanollama.data.files import DataError, sha256_json
from nanollama.data.interleave import Interleave
from nanollama.data.packed import MANIFEST_FILE, PackedSet, PackedSplit
from nanollama.data.strict import FieldError
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureSet:
    """One packed set as the mixture uses it."""

    name: str
    packed: PackedSet
    records: PackedSplit
    records_per_row: int
    first_source: int  # index in Mixture.sources of the set's source 0

    @property
    def rows(self) -> int:
        """Rows of one epoch; the last may have fewer records than the others, and is padded."""
        return -(-len(self.records) // self.records_per_row)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Checked sets and their shares."""

    split: str
    sequence_length: int
    mask_documents: bool
    threads: int
    tokenizer: Tokenizer
    sets: tuple[MixtureSet, ...]
    interleave: Interleave

    @property
    def sources(self) -> list[str]:
        """Names "set/source" of every source of every set; a row's source ids are indices of it."""
        return [f"{member.name}/{source}" for member in self.sets for source in member.packed.sources]

    def source_counts(self, what: str) -> list[int]:
        """`what` ("documents", "tokens", "bytes", "characters") of one epoch of the split, per source."""
        return [member.packed.source_count(self.split, source, what)
                for member in self.sets for source in member.packed.sources]

    @property
    def source_labels(self) -> list[int]:
        """Labels of one epoch per source: all tokens but the first of each document."""
        tokens, documents = self.source_counts("tokens"), self.source_counts("documents")
        return [t - d if self.mask_documents else t for t, d in zip(tokens, documents, strict=True)]

    @property
    def sha256(self) -> str:
        """Equal for mixtures that give equal rows for equal seeds: no names, no paths."""
        return sha256_json({name: value for name, value in self.describe().items() if name != "names"})

    def describe(self) -> dict[str, Any]:
        """JSON-able form for lineage and checkpoints; `require_same` compares it."""
        return {"split": self.split, "sequence_length": self.sequence_length,
                "mask_documents": self.mask_documents, "tokenizer": self.tokenizer.sha256,
                "datasets": [member.packed.dataset_id for member in self.sets],
                "shares": list(self.interleave.shares), "names": [member.name for member in self.sets]}

    def require_same(self, described: Mapping[str, Any], what: str) -> None:
        """Stop unless `what` (a checkpoint) was fed by this mixture. Errors: DataError lists what differs."""
        mine = self.describe()
        changes = [f"{name}: {described.get(name)} there, {mine[name]} now" for name in mine
                   if name != "names" and mine[name] != described.get(name)]
        if changes:
            raise DataError(f"{what} was fed by another mixture, so going on would repeat and skip rows. "
                            f"{'; '.join(changes)}. Give it the data it was made with, or start a new run.")


def open_mixture(data: DataConfig, *, split: str = "train", tokenizer_sha256: str | None = None,
                 vocab_size: int | None = None) -> Mixture:
    """Open and check the sets of `data`.

    `tokenizer_sha256`: the tokenizer of the checkpoint that is to be trained on, if any. `vocab_size`: the
    model's. In `split` "train" every set must have records; in others a set that has none is left out.
    Errors: DataError names the set or tokenizer and the commands that make it; FieldError a field to change.
    """
    tokenizer = _open_tokenizer(data, tokenizer_sha256, vocab_size)
    opened: list[tuple[PackedSet, float]] = []
    for number, entry in enumerate(data.sets):
        packed = _open_set(entry, data, tokenizer)
        _check_row_length(packed, data.sequence_length)
        if packed.dataset_id in [other.dataset_id for other, _ in opened]:
            raise FieldError(f"config.data.sets[{number}].path", f"{entry.path!r} is there twice",
                             "Name it once, with the sum of the weights.")
        opened.append((packed, entry.weight))
    used = [(packed, weight) for packed, weight in opened
            if split == "train" or packed.manifest["splits"].get(split, {}).get("records")] or opened[:1]
    try:
        interleave = Interleave([weight for _, weight in used])
    except ValueError as error:
        raise FieldError("config.data.sets", str(error), "Use positive weights, none that small.") from error
    sets: list[MixtureSet] = []
    for packed, _ in used:
        name = _unique_name(packed, [other for other, _ in used])
        first_source = sum(len(member.packed.sources) for member in sets)
        sets.append(MixtureSet(name, packed, packed.split(split),
                               data.sequence_length // packed.record_length, first_source))
    return Mixture(split, data.sequence_length, data.mask_documents, data.threads, tokenizer, tuple(sets),
                   interleave)


def commands(entry: PackedSetConfig, data: DataConfig, vocab_size: int | None) -> list[str]:
    """The commands that make a packed set, and the tokenizer first if it is not there."""
    packed = Path(entry.path)
    corpus = packed.with_name("corpus") if packed.name == "packed" else packed.with_name(f"{packed.name}-corpus")
    # one set serves all longer rows too, so records need not be longer than the shortest context trained on
    record_length = math.gcd(data.sequence_length, 4096) if data.sequence_length > 4096 else data.sequence_length
    size = f" --vocab-size={vocab_size}" if vocab_size else ""
    make = [f"python -m data_pipeline.corpus --config={entry.recipe or 'MIXTURE.yaml'} --output={corpus}"]
    if not (Path(data.tokenizer) / MANIFEST_FILE).is_file():
        make.append(f"python -m data_pipeline.tokenizer --corpus={corpus} --output={data.tokenizer}{size}")
    return [*make, f"python -m data_pipeline.pack --corpus={corpus} --tokenizer={data.tokenizer} "
            f"--output={packed} --record-length={record_length}"]


def _open_tokenizer(data: DataConfig, sha256: str | None, vocab_size: int | None) -> Tokenizer:
    if not (Path(data.tokenizer) / MANIFEST_FILE).is_file():
        make = "\n  ".join(["", *commands(data.sets[0], data, vocab_size)])
        raise DataError(f"config.data.tokenizer: no tokenizer in {data.tokenizer!r}. It and the first packed "
                        f"set are made by:{make}")
    tokenizer = load_tokenizer(data.tokenizer)
    if sha256 is not None:
        tokenizer.require(sha256, "The checkpoint", "Set config.data.tokenizer to the tokenizer/ folder of "
                          "the run that wrote the checkpoint, and config.data.sets to sets packed with it.")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise FieldError("config.model.vocab_size", f"{vocab_size} is less than the {tokenizer.vocab_size} "
                         f"ids of the tokenizer in {data.tokenizer}", f"Use {tokenizer.vocab_size} or more.")
    return tokenizer


def _open_set(entry: PackedSetConfig, data: DataConfig, tokenizer: Tokenizer) -> PackedSet:
    make = commands(entry, data, None)
    if not (Path(entry.path) / MANIFEST_FILE).is_file():
        raise DataError("\n  ".join([f"config.data.sets: no packed set in {entry.path!r}. It is made by:", *make]))
    packed = PackedSet(entry.path)
    tokenizer.require(packed.tokenizer["sha256"], f"The packed set {entry.path}", "Set config.data.tokenizer "
                      f"to the one it was packed with, or pack it again:\n  {make[-1]}")
    return packed


def _check_row_length(packed: PackedSet, sequence_length: int) -> None:
    length = packed.record_length
    if sequence_length % length:
        below = sequence_length // length * length
        valid = f"{below} or {below + length}" if below else str(length)
        raise FieldError("config.data.sequence_length", f"{sequence_length} is not a multiple of {length}, "
                         f"the tokens of a record of {packed.directory}",
                         f"Use {valid}, or pack with a record length that divides {sequence_length}.")


def _unique_name(packed: PackedSet, all_sets: list[PackedSet]) -> str:
    if sum(other.name == packed.name for other in all_sets) == 1:
        return packed.name
    return f"{packed.name}-{packed.dataset_id[:8]}"
