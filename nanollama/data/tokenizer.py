"""What a frozen tokenizer is to all that use it: text to ids and back, and the identity of everything made with it.

Owns the interface, the files of a tokenizer directory, and the one error for artefacts made with another tokenizer.
Knows neither kind of model: see `data.sentencepiece_tokenizer`, `data.hub_tokenizer`; `data.tokenizer_folder` reads
either.
"""

import abc
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanollama.data.files import DataError, read_json, write_atomic, write_json

MODEL_FILE, MANIFEST_FILE, CARD_FILE = "tokenizer.model", "manifest.json", "TOKENIZER_CARD.md"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MODEL_FILES = {"sentencepiece": MODEL_FILE, "tokenizer.json": "tokenizer.json"}  # by the manifest's kind
SPECIALS = ("unk_id", "bos_id", "eos_id", "pad_id")
MEND = ("Restore the directory from where it was made, or make it again: "
        "python -m data_pipeline.tokenizer --help says how.")


class Tokenizer(abc.ABC):
    """Text to ids and back. Safe to use from several threads. An id of -1: there is no such token."""

    vocab_size: int  # highest id + 1
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int

    def __init__(self, directory: str | os.PathLike[str], manifest: dict[str, Any]):
        self.directory = Path(directory)
        self.manifest = manifest
        self.sha256: str = manifest["sha256"]
        self.normalized_sha256: str = manifest["normalized_sha256"]

    @property
    def begin(self) -> list[int]:
        """What every text begins with: the bos token, or nothing where the tokenizer has none (Qwen, SmolLM2)."""
        return [self.bos_id] if self.bos_id >= 0 else []

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: eos, and what else the model was published to stop at."""
        return [self.eos_id, *(token for token in self.manifest.get("stop_ids", []) if token != self.eos_id)]

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that the tokenizer was published with, if any (`data.chat_template`)."""
        path = self.directory / CHAT_TEMPLATE_FILE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def require(self, sha256: str, what: str, mend: str) -> None:
        """Stop unless `what` (a packed set, a checkpoint) was made with this tokenizer.

        `mend` is a sentence with the command that puts it right. Errors: DataError with both hashes.
        """
        if sha256 != self.sha256:
            raise DataError(f"{what} was made with tokenizer {sha256}, but the tokenizer in {self.directory} "
                            f"is {self.sha256}: the same ids mean other text. {mend}")

    @property
    @abc.abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that no text is encoded to: bos, eos, pad and added ones."""

    @abc.abstractmethod
    def token_id(self, piece: str) -> int | None:
        """Id of a piece or special token by its name; None where the vocabulary has none."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it are plain text."""

    @abc.abstractmethod
    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """(bos) + ids + eos of each text, as uint32 arrays: what a packed set stores of a document."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing, a torn UTF-8 sequence gives U+FFFD."""

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """The vocabulary's own name of one id, for reports."""

    def encode_markup(self, text: str) -> list[int]:
        """As `encode`, but special tokens written out in `text` are what they say: for filled chat templates."""
        ids: list[int] = []
        for part in self._markup.split(text):
            special = self.special_tokens.get(part)
            ids += self.encode(part) if special is None else [special]
        return ids

    def without_special(self, text: str) -> str:
        """`text` in which nothing reads as a special token to `encode_markup`: for what people say in a template."""
        while (fewer := self._markup.sub("", text)) != text:  # what is left may read as one again
            text = fewer
        return text

    @functools.cached_property
    def _markup(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def write_frozen(directory: Path, model: bytes, manifest: Mapping[str, Any],
                 chat_template: str | None) -> dict[str, Any]:
    """Write a tokenizer directory; returns the manifest as whoever loads it reads it."""
    write_atomic(directory / MODEL_FILES[manifest["kind"]], model)
    if chat_template:
        write_atomic(directory / CHAT_TEMPLATE_FILE, chat_template)
    write_json(directory / MANIFEST_FILE, manifest)
    found: dict[str, Any] = read_json(directory / MANIFEST_FILE)
    return found
