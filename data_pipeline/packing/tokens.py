"""Packing, first half: one corpus shard to a file of tokens and a table of its documents.

A pure function of (shard, tokenizer, split rule), run in as many processes as one likes; its result gets its
name only when it is whole, so that a killed run goes on with the shards that are missing. Knows nothing of
records.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from data_pipeline.curation.corpus_format import read_shard
from data_pipeline.packing.phases import phase_of
from data_pipeline.text.documents import hash_fraction, text_digest
from nanollama.data.files import DataError, into_place
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer

BATCH_CHARACTERS = 4_000_000  # encoded together; bounds memory
_DIGEST = re.compile(r"[0-9a-f]{32}")
TABLE = pyarrow.schema([
    ("doc_id", pyarrow.string()), ("source", pyarrow.uint16()),
    ("place", pyarrow.float64()), ("derived", pyarrow.bool_()),
    ("tokens", pyarrow.uint32()), ("bytes", pyarrow.uint64()), ("characters", pyarrow.uint64()),
    ("sha256", pyarrow.string()), ("date", pyarrow.string()), ("meta", pyarrow.string())])


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to tokenize."""

    corpus: str
    shard: dict[str, Any]  # its row in the corpus manifest
    sources: tuple[str, ...]
    tokenizer: str
    tokenizer_sha256: str
    seed: int
    output: str  # path of the result without suffix
    phase: int | None = None  # of a curriculum: only the documents of this one

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return int(self.shard["bytes"])

    @property
    def tokens_path(self) -> Path:
        """u16 or u32 tokens of all documents, end to end."""
        return Path(self.output + ".tokens")

    @property
    def table_path(self) -> Path:
        """The documents' table; there only when the shard is done."""
        return Path(self.output + ".parquet")


_tokenizers: dict[str, Tokenizer] = {}  # one per process


def tokenize_shard(task: ShardTask) -> tuple[int, int]:
    """Make the two files of `task` unless they are there; returns (documents, tokens). Errors: DataError."""
    if task.table_path.exists() and task.tokens_path.exists():
        numbers = pyarrow.parquet.read_table(task.table_path, columns=["tokens"]).column("tokens").to_numpy()
        return len(numbers), int(numbers.sum())
    tokenizer = _load(task)
    dtype = token_dtype(tokenizer.vocab_size)
    temporary = task.tokens_path.with_suffix(
        f".{os.getpid()}.tmp")  # an orphan of a killed run may still write its own
    rows: list[dict[str, Any]] = []
    with open(temporary, "wb") as file:
        batch: list[dict[str, Any]] = []
        characters = seen = 0
        for row in read_shard(task.corpus, task.shard):
            seen += 1
            if task.phase is not None and phase_of(row) != task.phase:
                continue
            batch.append(row)
            characters += len(row["text"])
            if characters >= BATCH_CHARACTERS:
                rows += _encode(batch, tokenizer, dtype, task, file)
                batch, characters = [], 0
        rows += _encode(batch, tokenizer, dtype, task, file)
    if seen != task.shard["documents"]:
        raise DataError(
            f"{task.shard['path']}: {seen} documents, the corpus manifest says "
            f"{task.shard['documents']}. Delete the corpus manifest and run data_pipeline.corpus again.")
    into_place(temporary, task.tokens_path)
    table = pyarrow.Table.from_pylist(rows, TABLE)
    pyarrow.parquet.write_table(table, temporary, compression="zstd")
    os.replace(temporary, task.table_path)
    return len(rows), int(sum(row["tokens"] for row in rows))


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def place(digest: bytes, meta: dict[str, Any], seed: int) -> float:
    """A document's place in [0, 1); the lowest are held out. A hash of its text, so that equal texts go together.

    A text made from another document (docstrings from their source file) goes where that document goes, or it
    would be read in training.
    """
    key = bytes.fromhex(meta["derived_from"]) if is_derived(meta) else digest
    return hash_fraction(key, seed, "validation")


def is_derived(meta: dict[str, Any]) -> bool:
    """Whether a document names the text it was made from."""
    origin = meta.get("derived_from")
    return isinstance(origin, str) and _DIGEST.fullmatch(origin) is not None


def _load(task: ShardTask) -> Tokenizer:
    if task.tokenizer not in _tokenizers:
        _tokenizers[task.tokenizer] = load_tokenizer(task.tokenizer)
    tokenizer = _tokenizers[task.tokenizer]
    tokenizer.require(task.tokenizer_sha256, "this packing run",
                      "It changed while packing; run the command again.")
    return tokenizer


def _encode(batch: list[dict[str, Any]], tokenizer: Tokenizer, dtype: np.dtype, task: ShardTask,
            file: Any) -> list[dict[str, Any]]:
    rows = []
    for row, ids in zip(batch, tokenizer.encode_documents([row["text"] for row in batch]), strict=True):
        encoded = row["text"].encode()
        digest = text_digest(encoded)
        file.write(ids.astype(dtype).tobytes())
        rows.append({
            "doc_id": row["id"], "source": task.sources.index(row["source"]),
            "place": place(digest, row["meta"], task.seed),
            "derived": is_derived(row["meta"]),
            "tokens": len(ids), "bytes": len(encoded), "characters": len(row["text"]), "sha256": digest.hex(),
            "date": row.get("date"), "meta": json.dumps(row["meta"], ensure_ascii=False, sort_keys=True)})
    return rows
