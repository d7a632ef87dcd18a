"""SentencePiece models behind the interface of `data.tokenizer`: exact round trips, and encoding by segments.

Owns the freezing of such a model and its identity. Knows nothing of how a tokenizer is trained.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from nanollama.data.files import DataError
from nanollama.data.protobuf import fields
from nanollama.data.segments import SegmentTable, segments_are_independent
from nanollama.data.tokenizer import MEND, MODEL_FILE, SPECIALS, Tokenizer, write_frozen

_TRAINER_SPEC = 2  # field of ModelProto
_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this; in a text itself it would come back as a space


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model whose file is the one its manifest names."""

    def __init__(self, directory: str | os.PathLike[str], model: bytes, manifest: dict[str, Any]):
        super().__init__(directory, manifest)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.unk_id = self._processor.unk_id()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.pad_id = self._processor.pad_id()
        space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._space_mark = [] if self.unk_id in space_mark else space_mark  # [] without byte pieces
        self._by_segments = manifest.get("algorithm") == "bpe" and segments_are_independent(self._processor, model)

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        numbers = [token for token in range(self.vocab_size) if self._processor.is_control(token)]
        return {self.piece(token): token for token in numbers}

    def token_id(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)
        return None if found == self.unk_id and self.piece(found) != piece else found

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens; `decode` gives the text back exactly."""
        if _SPACE_MARK not in text or not self._space_mark:
            return self._processor.encode(text, return_type=int)
        first, *rest = [self._processor.encode(part, return_type=int) for part in text.split(_SPACE_MARK)]
        for part in rest:
            first += self._space_mark + part
        return first

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        plain = [index for index, text in enumerate(texts) if _SPACE_MARK not in text]
        arrays = self._encode_plain([texts[index] for index in plain], threads) if plain else []
        documents = dict(zip(plain, arrays, strict=True))
        return [np.concatenate([[self.bos_id], documents[index] if index in documents else self.encode(text),
                                [self.eos_id]]).astype(np.uint32) for index, text in enumerate(texts)]

    def _encode_plain(self, texts: list[str], threads: int) -> list[np.ndarray]:
        if self._by_segments:
            return self._segments.encode(texts)
        arrays: list[np.ndarray] = self._processor.encode(texts, return_type="numpy", num_threads=threads)
        return arrays

    @functools.cached_property
    def _segments(self) -> SegmentTable:
        return SegmentTable(self._processor)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(int(token))


def freeze_sentencepiece(
    directory: str | os.PathLike[str],
    model: bytes,
    *,
    algorithm: str,
    corpus: Mapping[str, Any],
    chat_template: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> SentencePieceTokenizer:
    """Write a trained SentencePiece `model` as a frozen tokenizer directory.

    `algorithm` is "bpe" or "unigram", `corpus` says what it was trained on (manifest hash, sizes), `more` are
    further fields of the manifest.
    Errors: DataError when a special token is missing from the model.
    """
    directory = Path(directory)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    specials = {name: getattr(processor, name)() for name in SPECIALS}
    if min(specials.values()) < 0:
        raise DataError(f"tokenizer for {directory}: lacks special tokens: {specials}. Train it with unk, "
                        "bos, eos and pad ids of 0 or above.")
    manifest = {
        "kind": "sentencepiece", "algorithm": algorithm, "sha256": hashlib.sha256(model).hexdigest(),
        "normalized_sha256": normalized_sha256(model), "vocab_size": processor.vocab_size(), **specials,
        "corpus": dict(corpus), **(more or {})}
    return SentencePieceTokenizer(directory, model, write_frozen(directory, model, manifest, chat_template))


def normalized_sha256(model: bytes) -> str:
    """SHA-256 of a SentencePiece ModelProto without its trainer_spec (field 2).

    The file's own hash changes with the thread count and the output name, which trainer_spec records; this
    one is equal for equal vocabularies and normalizers.
    """
    try:
        kept = b"".join(field.encoded for field in fields(model) if field.number != _TRAINER_SPEC)
    except ValueError as error:
        raise DataError(f"{MODEL_FILE}: {error}. {MEND}") from error
    return hashlib.sha256(kept).hexdigest()
