"""The frozen tokenizer: text to ids and back, and the identity that goes into everything made with it.

Owns the tokenizer directory (`tokenizer.model`, `manifest.json`), its check on load, and the one error for
artefacts made with another tokenizer. Knows nothing of how a tokenizer is trained, of records or of models.
"""

import functools
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from nanollama.data.files import DataError, read_json, sha256_file, write_atomic, write_json
from nanollama.data.protobuf import fields
from nanollama.data.segments import SegmentTable, segments_are_independent

MODEL_FILE, MANIFEST_FILE, CARD_FILE = "tokenizer.model", "manifest.json", "TOKENIZER_CARD.md"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MODEL_FILES = {"sentencepiece": MODEL_FILE, "tokenizer.json": "tokenizer.json"}  # by the manifest's kind
_SPECIALS = ("unk_id", "bos_id", "eos_id", "pad_id")
_TRAINER_SPEC = 2  # field of ModelProto
_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this; in a text itself it would come back as a space
_MEND = ("Restore the directory from where it was made, or make it again: "
         "python -m data_pipeline.tokenizer --help says how.")


class Tokenizer:
    """A SentencePiece model whose file is the one its manifest names. Safe to use from several threads."""

    def __init__(self, directory: str | os.PathLike[str], model: bytes, manifest: dict[str, Any]):
        self.directory = Path(directory)
        self.manifest = manifest
        self.sha256: str = manifest["sha256"]
        self.normalized_sha256: str = manifest["normalized_sha256"]
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._space_mark = [] if self.unk_id in space_mark else space_mark  # [] without byte pieces
        self._by_segments = manifest.get("algorithm") == "bpe" and segments_are_independent(self._processor, model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer in `directory`. Errors: DataError when it is absent, damaged or changed."""
        directory = Path(directory)
        if not (directory / MANIFEST_FILE).is_file():
            raise DataError(f"{directory / MANIFEST_FILE}: no such file, so no frozen tokenizer there. {_MEND}")
        manifest = read_json(directory / MANIFEST_FILE)
        missing = {"kind", "sha256", "normalized_sha256", "vocab_size", *_SPECIALS} - set(manifest)
        if missing:
            raise DataError(f"{directory / MANIFEST_FILE}: lacks {', '.join(sorted(missing))}. {_MEND}")
        if manifest["kind"] not in MODEL_FILES:
            raise DataError(f"{directory / MANIFEST_FILE}: kind {manifest['kind']!r}, known: "
                            f"{', '.join(MODEL_FILES)}. {_MEND}")
        path = directory / MODEL_FILES[manifest["kind"]]
        if not path.is_file():
            raise DataError(f"{path}: no such file, so no frozen tokenizer there. {_MEND}")
        found = sha256_file(path)
        if found != manifest["sha256"]:
            raise DataError(f"{path}: SHA-256 is {found}, but {MANIFEST_FILE} says "
                            f"{manifest['sha256']}: the tokenizer was changed after it was frozen. {_MEND}")
        if manifest["kind"] == "tokenizer.json":
            from nanollama.data.hub_tokenizer import HubTokenizer  # needs a package that the core does not

            cls = HubTokenizer
        tokenizer = cls(directory, path.read_bytes(), manifest)
        for name in ("vocab_size", *_SPECIALS):
            if getattr(tokenizer, name) != manifest[name]:
                raise DataError(f"{directory / MANIFEST_FILE}: {name} is {manifest[name]}, the model has "
                                f"{getattr(tokenizer, name)}. {_MEND}")
        return tokenizer

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

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that no text is encoded to: bos, eos, pad and added ones."""
        numbers = [token for token in range(self.vocab_size) if self._processor.is_control(token)]
        return {self.piece(token): token for token in numbers}

    def token_id(self, piece: str) -> int | None:
        """Id of a piece or special token by its name; None where the vocabulary has none."""
        found = self._processor.piece_to_id(piece)
        return None if found == self.unk_id and self.piece(found) != piece else found

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

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens; `decode` gives the text back exactly."""
        if _SPACE_MARK not in text or not self._space_mark:
            return self._processor.encode(text, return_type=int)
        first, *rest = [self._processor.encode(part, return_type=int) for part in text.split(_SPACE_MARK)]
        for part in rest:
            first += self._space_mark + part
        return first

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """bos + ids + eos of each text, as uint32 arrays: what a packed set stores of a document."""
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
        """Text of `ids`; special tokens give nothing, a torn UTF-8 sequence gives U+FFFD."""
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """The vocabulary's own name of one id, for reports."""
        return self._processor.id_to_piece(int(token))


def freeze(directory: str | os.PathLike[str], model: bytes, *, algorithm: str,
           corpus: Mapping[str, Any], chat_template: str | None = None,
           more: Mapping[str, Any] | None = None) -> Tokenizer:
    """Write a trained SentencePiece `model` as a frozen tokenizer directory and load it.

    `algorithm` is "bpe" or "unigram", `corpus` says what it was trained on (manifest hash, sizes), `more` are
    further fields of the manifest.
    Errors: DataError when a special token is missing from the model.
    """
    directory = Path(directory)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    specials = {name: getattr(processor, name)() for name in _SPECIALS}
    if min(specials.values()) < 0:
        raise DataError(f"tokenizer for {directory}: lacks special tokens: {specials}. Train it with unk, "
                        "bos, eos and pad ids of 0 or above.")
    write_atomic(directory / MODEL_FILE, model)
    if chat_template:
        write_atomic(directory / CHAT_TEMPLATE_FILE, chat_template)
    write_json(directory / MANIFEST_FILE, {
        "kind": "sentencepiece", "algorithm": algorithm, "sha256": hashlib.sha256(model).hexdigest(),
        "normalized_sha256": normalized_sha256(model), "vocab_size": processor.vocab_size(), **specials,
        "corpus": dict(corpus), **(more or {})})
    return Tokenizer.load(directory)


def copy_tokenizer(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Tokenizer:
    """Copy a frozen tokenizer (into a run folder); a no-op when it is there already. Returns the copy.

    Errors: DataError when `target` holds another tokenizer, or `source` is damaged.
    """
    original, target = Tokenizer.load(source), Path(target)
    if (target / MANIFEST_FILE).exists():
        copy = Tokenizer.load(target)
        original.require(copy.sha256, f"{target}", f"Use another run folder, or delete {target}.")
        return copy
    model = MODEL_FILES[original.manifest["kind"]]
    # the manifest last: without it there is no tokenizer
    for name in (model, CHAT_TEMPLATE_FILE, CARD_FILE, MANIFEST_FILE):
        if (original.directory / name).exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original.directory / name, target / f".{name}.tmp")
            os.replace(target / f".{name}.tmp", target / name)
    return Tokenizer.load(target)


def normalized_sha256(model: bytes) -> str:
    """SHA-256 of a SentencePiece ModelProto without its trainer_spec (field 2).

    The file's own hash changes with the thread count and the output name, which trainer_spec records; this
    one is equal for equal vocabularies and normalizers.
    """
    try:
        kept = b"".join(field.encoded for field in fields(model) if field.number != _TRAINER_SPEC)
    except ValueError as error:
        raise DataError(f"{MODEL_FILE}: {error}. {_MEND}") from error
    return hashlib.sha256(kept).hexdigest()
