"""Tokens to text: as they come (only characters that later tokens cannot change are given out), and as a sample.

Knows tokenizers' `decode` and nothing of models.
"""

from collections.abc import Sequence
from typing import Any

from nanollama.data.tokenizer import Tokenizer
from nanollama.generation.engine import Completion
from nanollama.generation.sampling import SamplingConfig

_TORN = "\ufffd"  # what decoding gives for a byte that is no whole character
_MOST_HELD = 3  # bytes of a UTF-8 character that may still be waiting for its last one
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


class TextStream:
    """Text of a growing list of tokens. A character cut into byte pieces appears when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last settled token: some tokenizers decode a first token otherwise
        self._tokens: list[int] = []  # after it
        self._given = 0  # characters of theirs that are out

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete; may be empty."""
        self._tokens += tokens
        text = self._text()
        held = min(len(text) - len(text.rstrip(_TORN)), _MOST_HELD)
        new, self._given = text[self._given : len(text) - held], max(self._given, len(text) - held)
        if self._tokens and not held:
            self._context, self._tokens, self._given = self._tokens[-1:], [], 0
        return new

    def finish(self) -> str:
        """What is still held back: bytes that never became a character, each as U+FFFD."""
        text = self._text()
        new, self._given = text[self._given :], len(text)
        return new

    def _text(self) -> str:
        settled = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._tokens)[len(settled) :]


def sample(prompt: str, done: Completion, sampling: SamplingConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What samples.json holds of one prompt: enough to make `text`, which follows it, again."""
    return {
        "prompt": prompt,
        "text": tokenizer.decode(done.tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
        "tokens": len(done.tokens),
        "finish_reason": done.finish_reason,
    }


def printable(text: str) -> str:
    """Text for a terminal: control characters as their pictures, so that no text can command the terminal."""
    return text.translate(_PICTURES)
