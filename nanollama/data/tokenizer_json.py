"""The parts of a tokenizer.json that every file written here shares, in the words of the `tokenizers` library.

Owns byte-level BPE files, tokens added to a file, and the bos token before a text. Knows no source they are made from.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

Piece = TypeVar("Piece", str, bytes)

# How published tokenizers cut text before merging.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    added: Sequence[Mapping[str, Any]],
    normalizer: str,
    cut: Sequence[Mapping[str, Any]],
    bos: tuple[str, int] | None,
    ignore_merges: bool,
) -> bytes:
    """The bytes of the file of a byte-level BPE.

    vocab: id by piece. merges: pairs, best first. added: `added_token`s. normalizer: the library's name of one, "" for
    none. cut: pre-tokenizers. bos: the token that begins every text and its id. ignore_merges: a text that is a piece
    is that piece, whatever its merges.
    """
    return dump({
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(cut)},
        "post_processor": begin_with(*bos) if bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                      end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=ignore_merges,
                      vocab=vocab, merges=merges),
    })  # fmt: skip


def merges_of(pieces: Sequence[Piece], ids: Mapping[Piece, int]) -> Iterator[tuple[Piece, Piece]]:
    """All pairs of `pieces` that make another, as a greedy encoder ranks them: in the order of what they make (best
    first), those of one piece by the ids of their parts."""
    known = set(pieces)
    for piece in pieces:
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in splits if left in known and right in known]
        yield from sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def dump(file: Mapping[str, Any]) -> bytes:
    """A file's content as its bytes."""
    return (json.dumps(file, ensure_ascii=False) + "\n").encode()


def added_token(number: int, content: str, *, special: bool = True) -> dict[str, Any]:
    """A token found in a text before anything else; `special`: only in markup, and decoded to nothing."""
    return dict(id=number, content=content, single_word=False, lstrip=False, rstrip=False, normalized=False,
                special=special)  # fmt: skip


def begin_with(bos: str, number: int) -> dict[str, Any]:
    """The post-processor that puts `bos`, of id `number`, before each text when special tokens are asked for."""
    first, second = ([{"SpecialToken": {"id": bos, "type_id": which}}, {"Sequence": {"id": name, "type_id": which}}]
                     for which, name in enumerate("AB"))  # fmt: skip
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """The pre-tokenizer that writes bytes as letters; `use_regex`: and cuts as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_steps(expression: str) -> list[dict[str, Any]]:
    """Pre-tokenizers that cut a text into the matches of `expression`, as bytes."""
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return [split, byte_level(use_regex=False)]
