"""Tokenizers published as a tokenizer.json (Llama 3, Qwen, SmolLM2), behind the interface of `data.tokenizer`.

Owns the freezing of such a file and how its special tokens are found. Needs the package `tokenizers`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanollama.data.files import DataError, write_atomic, write_json
from nanollama.data.tokenizer import CHAT_TEMPLATE_FILE, MANIFEST_FILE, MODEL_FILES, Tokenizer

try:
    import tokenizers
except ImportError as error:
    raise DataError(
        "this tokenizer is a tokenizer.json, which needs one more package: pip install 'nanollama[hub-tokenizers]'"
    ) from error

NO_TOKEN = -1  # the tokenizer has no such token: nothing is put in its place


class HubTokenizer(Tokenizer):
    """A frozen tokenizer.json. `bos_id` is -1 where texts are not begun with a token (Qwen, SmolLM2)."""

    def __init__(self, directory: str | os.PathLike[str], model: bytes, manifest: dict[str, Any]):
        self.directory = Path(directory)
        self.manifest = manifest
        self.sha256 = manifest["sha256"]
        self.normalized_sha256 = manifest["normalized_sha256"]
        self._reader = tokenizers.Tokenizer.from_buffer(model)
        self._plain = tokenizers.Tokenizer.from_buffer(model)
        self._plain.encode_special_tokens = True  # "<|im_end|>" in a text is text, not the end of a turn
        added = self._reader.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        self.vocab_size = _vocab_size(self._reader)
        self.unk_id, self.bos_id = manifest["unk_id"], manifest["bos_id"]
        self.eos_id, self.pad_id = manifest["eos_id"], manifest["pad_id"]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that no text is encoded to."""
        return self._special

    def token_id(self, piece: str) -> int | None:
        """Id of a piece or special token by its name; None where the vocabulary has none."""
        found: int | None = self._reader.token_to_id(piece)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it are plain text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        """Ids of `text`, in which special tokens are what they say."""
        return self._reader.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """(bos) + ids + eos of each text, as uint32 arrays. `threads` is the library's own business."""
        begin = [] if self.bos_id == NO_TOKEN else [self.bos_id]
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [np.array([*begin, *encoding.ids, self.eos_id], np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing, a torn UTF-8 sequence gives U+FFFD."""
        return self._reader.decode([int(token) for token in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """The vocabulary's own name of one id, for reports."""
        return self._reader.id_to_token(int(token)) or f"<id {int(token)}>"


def freeze_tokenizer_json(
    directory: str | os.PathLike[str],
    model: bytes,
    *,
    bos: str | None,
    eos: str,
    pad: str | None,
    stop_ids: Sequence[int] = (),
    chat_template: str | None,
    corpus: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Write a tokenizer.json as a frozen tokenizer directory and load it.

    bos: the token that begins every text, None where there is none. pad: None takes eos (masked by weight, never
    by id). more: further fields of the manifest. Errors: DataError when the file cannot be read or lacks a token.
    """
    directory = Path(directory)
    tokenizer = open_json(model, f"tokenizer.json for {directory}")

    def token_id(token: str | None, what: str) -> int:
        found = None if token is None else tokenizer.token_to_id(token)
        if token is not None and found is None:
            raise DataError(f"tokenizer.json for {directory}: lacks {token!r}, its {what} token. Download it again.")
        return NO_TOKEN if found is None else found

    unk = json.loads(model)["model"].get("unk_token")
    sha256 = hashlib.sha256(model).hexdigest()
    manifest = {
        "kind": "tokenizer.json",
        "algorithm": json.loads(model)["model"]["type"].lower(),
        "sha256": sha256,
        "normalized_sha256": sha256,
        "vocab_size": _vocab_size(tokenizer),
        "unk_id": token_id(unk, "unk"),
        "bos_id": token_id(bos, "bos"),
        "eos_id": token_id(eos, "eos"),
        "pad_id": token_id(pad or eos, "pad"),
        "stop_ids": list(stop_ids),
        "corpus": dict(corpus),
        **(more or {}),
    }
    write_atomic(directory / MODEL_FILES["tokenizer.json"], model)
    if chat_template:
        write_atomic(directory / CHAT_TEMPLATE_FILE, chat_template)
    write_json(directory / MANIFEST_FILE, manifest)
    return Tokenizer.load(directory)


def open_json(model: bytes, where: str) -> "tokenizers.Tokenizer":
    """A tokenizer.json in the library's hands. Errors: DataError when it cannot be read."""
    try:
        return tokenizers.Tokenizer.from_buffer(model)
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"{where}: {error}. Download it again.") from error


def begins_with(model: bytes) -> str | None:
    """The special token that a tokenizer.json puts before every text, if it does. Errors: as `open_json`."""
    tokenizer = open_json(model, "tokenizer.json")
    encoding = tokenizer.encode("a", add_special_tokens=True)
    return encoding.tokens[0] if encoding.special_tokens_mask[:1] == [1] else None


def _vocab_size(tokenizer: "tokenizers.Tokenizer") -> int:
    """Highest id + 1: added tokens may leave gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
