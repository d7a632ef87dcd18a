"""The byte-level BPE tokenizer in a GGUF header as a tokenizer.json. Knows the header's keys and the JSON, no files."""

import json
from collections.abc import Mapping
from typing import Any

from nanollama.data.files import DataError
from nanollama.data.strict import nearest

_CONTROL, _USER_DEFINED = 3, 4  # token_type
# How text is cut before merging, by tokenizer.ggml.pre: the expressions are part of the published tokenizers.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = {"type": "Digits", "individual_digits": True}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_steps(expression: str) -> list[dict[str, Any]]:
    """Pre-tokenizers that cut a text into the matches of `expression`, as bytes."""
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(False)]


_STEPS = {
    "smollm": [_DIGITS, _byte_level(True)],
    "gpt-2": [_byte_level(True)],
    "llama-bpe": split_steps(LLAMA3),
    "qwen2": split_steps(QWEN2),
}


def tokenizer_json_of(metadata: Mapping[str, Any], where: str) -> bytes:
    """The file's bytes. Errors: DataError on a kind of tokenizer that this does not know, by its key."""
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise DataError(
            f"{where}: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) is read from GGUF. Import the "
            "model's Hugging Face folder."
        )
    if cut not in _STEPS:
        raise DataError(f"{where}: tokenizer.ggml.pre is {cut!r}. {nearest(cut, list(_STEPS))}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    added = [
        dict(id=index, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
             special=types[index] == _CONTROL)
        for index, token in enumerate(tokens)
        if types[index] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _STEPS[cut]},
        "post_processor": _begin_with(metadata, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                      end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=cut == "llama-bpe",
                      vocab={token: index for index, token in enumerate(tokens)},
                      merges=[merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]),
    }  # fmt: skip
    return (json.dumps(file, ensure_ascii=False) + "\n").encode()


def _begin_with(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    if not metadata.get("tokenizer.ggml.add_bos_token", False):
        return None
    number = metadata["tokenizer.ggml.bos_token_id"]
    bos = tokens[number]
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
