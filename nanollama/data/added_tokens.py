"""More special tokens for a frozen tokenizer: another frozen tokenizer, which names its parent by hash.

Owns which tokens a chat model needs, and how they get behind the ids that are there; old ids keep their meaning.
Knows nothing of models.
"""

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanollama.data.files import DataError
from nanollama.data.hub_tokenizer import freeze_tokenizer_json
from nanollama.data.sentencepiece_tokenizer import freeze_sentencepiece
from nanollama.data.tokenizer import MODEL_FILES, Tokenizer
from nanollama.data.tokenizer_json import added_token, dump

CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_thought|>",
    "<|end_thought|>",
    "<|tool_call|>",
    "<|tool_response|>",
    "<|pad|>",
    "<|reserved_0|>",
)
STOP = "<|im_end|>"  # ends an answer
MULTIPLE = 8  # of the new vocabulary; reserved tokens fill it up
_CONTROL = 3  # SentencePiece's type of a piece that no text is encoded to


def add_tokens(
    source: Tokenizer,
    directory: str | os.PathLike[str],
    tokens: Sequence[str] = CHAT_TOKENS,
    chat_template: str | None = None,
) -> Tokenizer:
    """Freeze `source` with `tokens` behind its last id in `directory`. Those it has as special tokens stay as they are.

    chat_template: default the source's. The manifest records {"parent", "added_tokens"}. Errors: DataError on a token
    that is empty, there twice, or an ordinary piece of the vocabulary.
    """
    new = _new_tokens(source, tokens)
    ids = {token: source.vocab_size + index for index, token in enumerate(new)}
    model = (source.directory / MODEL_FILES[source.manifest["kind"]]).read_bytes()
    stop = ids.get(STOP, source.special_tokens.get(STOP))
    more = {
        "parent": {"sha256": source.sha256, "vocab_size": source.vocab_size},
        "added_tokens": ids,
        "stop_ids": list(dict.fromkeys([*source.stop_ids, *([] if stop is None else [stop])])),
    }
    template = chat_template if chat_template is not None else source.chat_template
    if source.manifest["kind"] == "sentencepiece":
        model += b"".join(_piece(token) for token in new)
        algorithm, corpus = source.manifest["algorithm"], source.manifest["corpus"]
        return freeze_sentencepiece(
            directory, model, algorithm=algorithm, corpus=corpus, chat_template=template, more=more
        )
    return _freeze_json(source, Path(directory), model, ids, template, more)


def _new_tokens(source: Tokenizer, tokens: Sequence[str]) -> list[str]:
    twice = sorted({token for token in tokens if tokens.count(token) > 1 or not token.strip()})
    if twice:
        raise DataError(f"tokens {twice}: empty or there twice. Name each once.")
    new = []
    for token in tokens:
        if token in source.special_tokens:
            continue
        if source.token_id(token) is not None:
            raise DataError(
                f"{token!r} is an ordinary piece of the tokenizer in {source.directory}: texts have been encoded to "
                "it, so it cannot become a special token. Choose another name."
            )
        new.append(token)
    number = 0
    while new and (source.vocab_size + len(new)) % MULTIPLE:
        filler = f"<|reserved_{number}|>"
        if filler not in new and source.token_id(filler) is None:
            new.append(filler)
        number += 1
    if not new:
        raise DataError(f"{source.directory}: has all of {list(tokens)} already. Use it as it is.")
    return new


def _piece(token: str) -> bytes:
    """A SentencePiece piece as field 1 of the model's protobuf message: fields may be appended to one."""
    text = token.encode()
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + _varint(_CONTROL)
    return b"\x0a" + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _freeze_json(
    source: Tokenizer, directory: Path, model: bytes, ids: dict[str, int], template: str | None, more: dict[str, Any]
) -> Tokenizer:
    file = json.loads(model)
    file["added_tokens"] += [added_token(number, token) for token, number in ids.items()]
    manifest = source.manifest

    def named(name: str) -> str | None:
        return None if manifest[name] < 0 else source.piece(manifest[name])

    frozen = freeze_tokenizer_json(
        directory, dump(file), bos=named("bos_id"),
        eos=source.piece(source.eos_id), pad=named("pad_id"), stop_ids=more["stop_ids"], chat_template=template,
        corpus=manifest["corpus"], more=more,
    )  # fmt: skip
    wrong = {token: number for token, number in ids.items() if frozen.token_id(token) != number}
    if wrong:
        raise DataError(f"{source.directory}: the library gives {list(wrong)} other ids than those after the last one.")
    return frozen
