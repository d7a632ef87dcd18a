"""Text to score, as rows of tokens that know which document each token belongs to.

Owns reading text files and packed sets for evaluation, and the sliding window. Knows nothing of models.
A row is a dict of arrays [T]: tokens, targets, weights, positions, first_key as in training, and owners, the key
of the document whose token is predicted.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanollama.data.files import DataError
from nanollama.data.format import derive_row
from nanollama.data.packed import PackedSet
from nanollama.data.tokenizer import Tokenizer

Row = dict[str, np.ndarray]


class Document(NamedTuple):
    """What a document counts, beside its nll."""

    source: str
    words: int
    utf8_bytes: int


def read_documents(path: Path, documents: dict[int, Document]) -> Iterator[tuple[int, str]]:
    """(key, text) of a text file (one document) or of each line of a .jsonl file; fills `documents`.

    Errors: DataError with file and line for what is not UTF-8, not JSON or has no text.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file, and no packed set. Give a .txt or .jsonl file, or a packed set.")
    try:
        if path.suffix != ".jsonl":
            yield _note(documents, path.name, path.read_bytes().decode())
            return
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                yield _note(documents, path.name, _text_of(line, f"{path}:{number}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Convert it, for example with iconv.") from error


def windows(
    texts: Iterable[tuple[int, str]],
    tokenizer: Tokenizer,
    window: int,
    stride: int,
    max_tokens: int,
    documents: dict[int, Document],
) -> Iterator[Row]:
    """Rows of a sliding window over each text: every token but the first is predicted exactly once.

    A text cut off at `max_tokens` counts in `documents` only as far as it is read.

    The first window predicts all it can; each later one moves on by `stride` and predicts what is new.
    """
    total = 0
    for key, text in texts:
        ids = np.array([*tokenizer.begin, *tokenizer.encode(text)], np.int32)
        if not len(ids):  # an empty text, and a tokenizer without bos
            continue
        if max_tokens and len(ids) - 1 > max_tokens - total:
            ids = ids[: max_tokens - total + 1]
            documents[key] = count_text(documents[key].source, tokenizer.decode(ids.tolist()))
        scored = 0  # predictions made so far; the next is of ids[scored + 1]
        start = 0
        while scored < len(ids) - 1:
            inputs, targets = ids[start : start + window], ids[start + 1 : start + window + 1]
            row = _empty_row(window, tokenizer.pad_id)
            row["tokens"][: len(inputs)] = inputs
            row["targets"][: len(targets)] = targets
            row["weights"][scored - start : len(targets)] = 1
            row["positions"][: len(inputs)] = np.arange(len(inputs))
            row["first_key"][: len(inputs)] = 0
            row["owners"][:] = key
            yield row
            scored = start + len(targets)
            start += stride
        total += len(ids) - 1
        if max_tokens and total >= max_tokens:
            return


def packed_rows(
    directory: Path, split: str, tokenizer: Tokenizer, window: int, max_tokens: int, documents: dict[int, Document]
) -> Iterator[Row]:
    """Every row of a packed split as training sees it; fills `documents` by decoding them, after the last row.

    Errors: DataError when the set was packed with another tokenizer or `window` is no multiple of its records.
    """
    packed = PackedSet(directory)
    tokenizer.require(packed.tokenizer["sha256"], f"The packed set {directory}",
                      "Pack the corpus again with the checkpoint's tokenizer: python -m data_pipeline.pack")
    length = packed.record_length
    if window % length:
        raise DataError(f"{directory}: window {window} is not a multiple of its records of {length} tokens. "
                        f"Use --window={max(length, window // length * length)}.")
    records, count, total = packed.split(split), window // length, 0
    pieces: dict[int, list[np.ndarray]] = {}
    source_of: dict[int, int] = {}
    for first in range(0, len(records), count):
        row_records = records.read(range(first, min(first + count, len(records))))
        row = derive_row(row_records, sequence_length=window, record_length=length, pad_id=tokenizer.pad_id,
                         mask_documents=True)
        order: list[int] = []
        for record in row_records:
            ends = np.append(record.starts[1:], len(record.tokens))
            for document, source, start, end in zip(record.documents, record.sources, record.starts, ends, strict=True):
                pieces.setdefault(int(document), []).append(record.tokens[start:end])
                source_of[int(document)] = int(source)
                if not order or order[-1] != document:
                    order.append(int(document))
        owners = np.array([-1, *order], np.int64)[row.pop("segment_ids")]
        del row["source_ids"]
        yield {**row, "owners": owners}
        total += int(row["weights"].sum())
        if max_tokens and total >= max_tokens:
            break
    for key, parts in pieces.items():
        documents[key] = count_text(packed.sources[source_of[key]], tokenizer.decode(np.concatenate(parts).tolist()))


def count_text(source: str, text: str) -> Document:
    """Words (runs of non-space) and UTF-8 bytes of a text."""
    return Document(source, len(text.split()), len(text.encode()))


def _note(documents: dict[int, Document], source: str, text: str) -> tuple[int, str]:
    key = len(documents)
    documents[key] = count_text(source, text)
    return key, text


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}). Mend or remove the line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f"{where}: no field 'text' with a string. Mend or remove the line.")
    return row["text"]


def _empty_row(window: int, pad_id: int) -> Row:
    row = {name: np.zeros(window, np.int32) for name in ("targets", "positions")}
    return {**row, "tokens": np.full(window, pad_id, np.int32), "weights": np.zeros(window, np.float32),
            "first_key": np.arange(window, dtype=np.int32), "owners": np.zeros(window, np.int64)}
