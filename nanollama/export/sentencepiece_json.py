"""A SentencePiece model as a tokenizer.json that the `tokenizers` library encodes alike.

transformers 5 turns a bare tokenizer.model into another tokenizer (246 to 302 of 304 lines differ), so exports
carry this file. Owns the conversion only; freezing is `data.hub_tokenizer`.
"""

import base64
from collections.abc import Iterator
from typing import Any

import sentencepiece

from nanollama.data.files import DataError
from nanollama.data.protobuf import fields
from nanollama.data.tokenizer_json import added_token, begin_with, dump, merges_of

_SPACE = "\u2581"


def tokenizer_json_of_sentencepiece(model: bytes, *, add_bos: bool) -> bytes:
    """The file's bytes. `add_bos`: texts begin with the bos token when special tokens are asked for.

    Differs from SentencePiece on one thing: U+2581 written in a text becomes a space. Errors: DataError on a model
    that is neither BPE nor unigram.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    kind, normalizer = _trainer_kind(model), _Normalizer(model)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
    unk, bos = processor.id_to_piece(processor.unk_id()), processor.id_to_piece(processor.bos_id())
    byte_fallback = processor.piece_to_id("<0x00>") != processor.unk_id()
    if kind == "bpe":
        vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
        scores = {
            piece: score
            for index, (piece, score) in enumerate(pieces)
            if not (processor.is_control(index) or processor.is_byte(index) or processor.is_unknown(index))
        }
        best_first = sorted(scores, key=lambda piece: -scores[piece])
        body: dict[str, Any] = dict(type="BPE", dropout=None, unk_token=unk, continuing_subword_prefix=None,
                                    end_of_word_suffix=None, fuse_unk=True, byte_fallback=byte_fallback,
                                    ignore_merges=False, vocab=vocabulary,
                                    merges=list(merges_of(best_first, vocabulary)))  # fmt: skip
    else:
        body = dict(type="Unigram", unk_id=processor.unk_id(), vocab=[list(piece) for piece in pieces],
                    byte_fallback=byte_fallback)  # fmt: skip
    special = [i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)]
    user_defined = _user_defined(model)
    written = [i for i in range(len(pieces)) if pieces[i][0] in user_defined]
    file: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, pieces[i][0], special=i in special) for i in sorted({*special, *written})],
        "normalizer": normalizer.steps(),
        "pre_tokenizer": None,
        "post_processor": begin_with(bos, processor.bos_id()) if add_bos else None,
        "decoder": _decoder(normalizer.dummy_prefix),
        "model": body,
    }
    return dump(file)


class _Normalizer:
    """SentencePiece's normalizer_spec (field 3), and its equivalent in the library's words."""

    def __init__(self, model: bytes):
        self.charsmap, self.dummy_prefix, self.squeeze = b"", True, True  # SentencePiece's own defaults
        for spec in (value for field, value in _values(model) if field == 3):
            for field, value in _values(spec):
                if field == 2:
                    self.charsmap = value
                elif field == 3:
                    self.dummy_prefix = bool(value)
                elif field == 4:
                    self.squeeze = bool(value)

    def steps(self) -> dict[str, Any] | None:
        steps: list[dict[str, Any]] = []
        if self.charsmap:
            steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(self.charsmap).decode()})
        if self.squeeze:
            steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
            steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        if self.dummy_prefix:
            steps.append({"type": "Prepend", "prepend": _SPACE})
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
        return {"type": "Sequence", "normalizers": steps}


def _decoder(dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _trainer_kind(model: bytes) -> str:
    """"bpe" or "unigram": trainer_spec (field 2) model_type (field 3)."""
    kind = 1
    for spec in (value for field, value in _values(model) if field == 2):
        kind = next((value for field, value in _values(spec) if field == 3), 1)
    if kind not in (1, 2):
        raise DataError("tokenizer.model: neither BPE nor unigram: no tokenizer.json can say what it does.")
    return "bpe" if kind == 2 else "unigram"


def _user_defined(model: bytes) -> set[str]:
    """Pieces of type USER_DEFINED (4), which are matched before anything else."""
    found = set()
    for piece in (dict(_values(value)) for field, value in _values(model) if field == 1):
        if piece.get(3) == 4:
            found.add(piece[1].decode())
    return found


def _values(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields: int for varints, bytes for the others."""
    return ((field.number, field.value) for field in fields(message))
