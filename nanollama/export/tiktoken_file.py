"""A tiktoken file (one base64 token and its rank a line) as a tokenizer.json that encodes alike.

Owns the published kinds (Llama 3, Qwen, GPT-4, GPT-2): how each cuts texts before merging, and its special tokens,
which the file itself does not hold. Knows no files; freezing is `data.hub_tokenizer`.
"""

import base64
import binascii
import dataclasses
from collections.abc import Sequence

from nanollama.data.files import DataError
from nanollama.data.strict import nearest
from nanollama.data.tokenizer_json import GPT2, LLAMA3, QWEN2, added_token, byte_level_bpe, merges_of, split_steps


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a published tokenizer is besides its ranks."""

    size: int  # ranks in a whole file
    cut: str  # expression whose matches are merged apart
    special: Sequence[str]  # behind the ranks, in order
    bos: str | None
    eos: str
    stops: Sequence[str] = ()
    normalizer: str = ""


_LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", *(f"<|reserved_special_token_{number}|>" for number in range(2, 247)),
)  # fmt: skip
_QWEN2_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
KINDS = {
    "llama3": Kind(
        128_000, LLAMA3, _LLAMA3_SPECIAL, "<|begin_of_text|>", "<|end_of_text|>", ("<|eot_id|>", "<|eom_id|>")
    ),
    "qwen": Kind(151_643, QWEN2, _QWEN2_SPECIAL, None, "<|endoftext|>", ("<|im_end|>",), "NFC"),
    "cl100k": Kind(100_256, LLAMA3, ("<|endoftext|>",), None, "<|endoftext|>"),
    "gpt2": Kind(50_256, GPT2, ("<|endoftext|>",), None, "<|endoftext|>"),
}


def tokenizer_json_of_ranks(data: bytes, kind: str, where: str) -> bytes:
    """The tokenizer.json's bytes. Errors: DataError names the line that is no token, or the nearest kind."""
    if kind not in KINDS:
        raise DataError(f"--kind={kind}: {nearest(kind, list(KINDS))}")
    ranks, about = read_ranks(data, where), KINDS[kind]
    if len(ranks) != about.size:
        raise DataError(f"{where}: {len(ranks)} ranks; {kind} has {about.size}: truncated, or of another kind.")
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    # tiktoken joins whichever neighbours make the lowest token, so all pairs of a token are needed
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [["".join(letters[byte] for byte in part) for part in pair] for pair in merges_of(by_rank, ranks)]
    first = max(ranks.values()) + 1
    return byte_level_bpe(
        vocab,
        merges,
        added=[added_token(first + index, token) for index, token in enumerate(about.special)],
        normalizer=about.normalizer,
        cut=split_steps(about.cut),
        bos=(about.bos, first + about.special.index(about.bos)) if about.bos else None,
        ignore_merges=True,
    )


def read_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Rank of each token. Errors: DataError names the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{where}:{number}: not a base64 token and its rank: damaged or no tiktoken file. Download it again."
            ) from error
        if token in ranks:
            raise DataError(f"{where}:{number}: a token that line {ranks[token] + 1} has too: damaged.")
        ranks[token] = value
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{where}: ranks are not 0 to {len(ranks) - 1}: truncated or damaged. Download it again.")
    return ranks


def byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte: itself, or one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, extra = [], 0x100
    for byte in range(256):
        letters.append(chr(byte if byte in shown else extra))
        extra += byte not in shown
    return letters
