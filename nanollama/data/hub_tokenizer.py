"""Tokenizers published as a tokenizer.json (Llama 3, Qwen, SmolLM2), behind the interface of `data.tokenizer`.

Owns the freezing of such a file and how its special tokens are found. The package `tokenizers` is asked for when one is
opened, not before.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanollama.data.files import DataError
from nanollama.data.tokenizer import Tokenizer, write_frozen

NO_TOKEN = -1  # the tokenizer has no such token: nothing is put in its place


class HubTokenizer(Tokenizer):
    """A frozen tokenizer.json. `bos_id` is -1 where texts are not begun with a token (Qwen, SmolLM2)."""

    def __init__(self, directory: str | os.PathLike[str], model: bytes, manifest: dict[str, Any]):
        super().__init__(directory, manifest)
        self._reader, self._plain = (open_json(model, str(self.directory)) for _ in range(2))
        self._plain.encode_special_tokens = True  # "<|im_end|>" in a text is text, not the end of a turn
        added = self._reader.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        self.vocab_size = _vocab_size(self._reader)
        self.unk_id, self.bos_id = manifest["unk_id"], manifest["bos_id"]
        self.eos_id, self.pad_id = manifest["eos_id"], manifest["pad_id"]

    @property
    def special_tokens(self) -> dict[str, int]:
        return self._special

    def token_id(self, piece: str) -> int | None:
        found: int | None = self._reader.token_to_id(piece)
        return found

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        return self._reader.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """As `Tokenizer.encode_documents`; `threads` is the library's own business."""
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [np.array([*self.begin, *encoding.ids, self.eos_id], np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._reader.decode([int(token) for token in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str:
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
) -> HubTokenizer:
    """Write a tokenizer.json as a frozen tokenizer directory.

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
    return HubTokenizer(directory, model, write_frozen(directory, model, manifest, chat_template))


def open_json(model: bytes, where: str) -> Any:
    """A tokenizer.json in the library's hands. Errors: DataError when it cannot be read, or the library is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(f"{where}: this tokenizer is a tokenizer.json, which needs one more package: "
                        "pip install 'nanollama[hub-tokenizers]'") from error
    try:
        return tokenizers.Tokenizer.from_buffer(model)
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"{where}: {error}. Download it again.") from error


def begins_with(model: bytes) -> str | None:
    """The special token that a tokenizer.json puts before every text, if it does. Errors: as `open_json`."""
    tokenizer = open_json(model, "tokenizer.json")
    encoding = tokenizer.encode("a", add_special_tokens=True)
    return encoding.tokens[0] if encoding.special_tokens_mask[:1] == [1] else None


def _vocab_size(tokenizer: Any) -> int:
    """Highest id + 1: added tokens may leave gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
