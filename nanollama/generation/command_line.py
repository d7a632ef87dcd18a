"""What the programs that write text share: their arguments, and from these an engine.

Knows nothing of what is done with the text.
"""

import argparse
import io
from collections.abc import Callable
from typing import TextIO

from nanollama.config import ConfigError
from nanollama.data.files import DataError
from nanollama.data.tokenizer import Tokenizer
from nanollama.generation.engine import Engine, GenerationError
from nanollama.generation.loading import LoadedModel
from nanollama.generation.sampling import SamplingConfig
from nanollama.parallel.backend import BackendError

# Usual for base models: lively, and no nonsense from the distribution's tail.
DEFAULT = SamplingConfig(temperature=0.8, top_p=0.95)
MAX_NEW_TOKENS = 128
USER_ERRORS = (ConfigError, DataError, GenerationError, BackendError)  # printed as one line, exit status 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --tokenizer and the sampling parameters."""
    add: Callable[..., object] = parser.add_argument
    add("--checkpoint", required=True, help="run folder, checkpoints folder or one step's folder")
    add("--tokenizer", help="its folder; default: the one in the run folder")
    add(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="most tokens to write; default %(default)s",
    )
    add(
        "--temperature",
        type=float,
        default=DEFAULT.temperature,
        metavar="X",
        help="0 = always the most likely token; default %(default)s",
    )
    add(
        "--top-k",
        type=int,
        default=DEFAULT.top_k,
        metavar="N",
        help="only the N most likely tokens; 0 = all; default %(default)s",
    )
    add(
        "--top-p",
        type=float,
        default=DEFAULT.top_p,
        metavar="X",
        help="only the most likely tokens that together reach this probability; default %(default)s",
    )
    add("--seed", type=int, default=DEFAULT.seed, metavar="N", help="default %(default)s")


def sampling(options: argparse.Namespace) -> SamplingConfig:
    """The checked sampling parameters. Errors: FieldError."""
    config = SamplingConfig(options.temperature, options.top_k, options.top_p, options.seed)
    config.check()
    return config


def engine(model: LoadedModel) -> Engine:
    """An engine of a loaded model: its own context length, ended by its tokenizer's eos."""
    return Engine(
        model.params,
        model.config.model,
        model.config.compute,
        context_length=model.config.data.sequence_length,
        stop_ids=model.tokenizer.stop_ids,
        vocabulary=model.tokenizer.vocab_size,
    )


def begin(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a document that begins with `text`. Errors: GenerationError when it is no valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that were not UTF-8
        raise GenerationError(f"prompt {text[:40]!r}: character {error.start} is not Unicode. Give UTF-8.") from error
    return [*tokenizer.begin, *tokenizer.encode(text)]


def forgive_encoding(*streams: TextIO) -> None:
    """Read and write UTF-8 whatever the locale says; what is not UTF-8 becomes U+FFFD instead of an error."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
