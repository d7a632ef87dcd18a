"""A small tokenizer.json, and it frozen: shared by the tests of what reads, extends and exports one."""

from pathlib import Path
from typing import Any

from nanollama.data.hub_tokenizer import freeze_tokenizer_json
from nanollama.data.tokenizer import Tokenizer


def byte_level(tokens: list[str]) -> bytes:
    """A byte-level BPE without merges, with special tokens after the bytes."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens)
    return tokenizer.to_str().encode()


def freeze(folder: Path, **changes: Any) -> Tokenizer:
    values: dict[str, Any] = dict(bos=None, eos="<|end|>", pad=None, chat_template=None, corpus={})
    return freeze_tokenizer_json(folder, byte_level(["<|end|>", "<|begin|>"]), **{**values, **changes})
