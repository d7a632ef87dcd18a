"""The byte-level BPE tokenizer in a GGUF header as a tokenizer.json. Knows the header's keys and the JSON, no files."""

from collections.abc import Mapping
from typing import Any

from nanollama.data.files import DataError
from nanollama.data.strict import nearest
from nanollama.data.tokenizer_json import LLAMA3, QWEN2, added_token, byte_level, byte_level_bpe, split_steps

_CONTROL, _USER_DEFINED = 3, 4  # token_type
_DIGITS = {"type": "Digits", "individual_digits": True}
# How text is cut before merging, by tokenizer.ggml.pre.
_STEPS = {
    "smollm": [_DIGITS, byte_level(use_regex=True)],
    "gpt-2": [byte_level(use_regex=True)],
    "llama-bpe": split_steps(LLAMA3),
    "qwen2": split_steps(QWEN2),
}


def tokenizer_json_of_gguf(metadata: Mapping[str, Any], where: str) -> bytes:
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
    bos = None
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        number = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[number], number
    return byte_level_bpe(
        {token: index for index, token in enumerate(tokens)},
        [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        added=[added_token(index, token, special=types[index] == _CONTROL) for index, token in enumerate(tokens)
               if types[index] in (_CONTROL, _USER_DEFINED)],
        normalizer="NFC" if cut == "qwen2" else "",
        cut=_STEPS[cut],
        bos=bos,
        ignore_merges=cut == "llama-bpe",
    )  # fmt: skip
