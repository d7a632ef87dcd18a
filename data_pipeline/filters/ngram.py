"""An n-gram model's directory (ARPA file and description): read, made to face noise, and asked for perplexities.

Owns how texts become the model's words, and the noise that it must find unlikely. Making one is
`data_pipeline.language_model`.

Words, not pieces of words: with a tokenizer's pieces even random letters are likely enough to pass a threshold of
5,000. A document is one sentence of the model, in training and in scoring.
"""

import functools
import math
import random
import string
from pathlib import Path
from typing import Any

import polars as pl

from data_pipeline.filters.resources import missing
from data_pipeline.filters.words import PATTERNS
from nanollama.data.files import DataError, read_json

DESCRIPTION, ARPA = "language_model.json", "model.arpa"
NOISE_WORDS = 200


def spelled(text: pl.Series) -> pl.Series:
    """Each text as KenLM reads it: lower case, words and signs between single spaces."""
    # separators of control characters are white space for Python, which splits the words again, but not for Unicode
    clean = text.str.to_lowercase().str.replace_all(r"[\x00-\x1f]", " ")
    return clean.str.extract_all(PATTERNS["pieces"]).list.join(" ")


def noise_lines(words: list[str]) -> dict[str, str]:
    """Texts that no language model may find likely: words of random letters, and words of its own in random order."""
    pick = random.Random(0)
    letters = ["".join(pick.choices(string.ascii_lowercase, k=pick.randint(3, 9))) for _ in range(NOISE_WORDS)]
    return {"random_letters": " ".join(letters), "random_words": " ".join(words)}


def load_arpa(path: Path) -> Any:
    """KenLM's model of an ARPA file."""
    try:
        import kenlm
    except ImportError as error:
        raise missing("ufal.kenlm", "scoring with a language model") from error
    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    return kenlm.Model(str(path), config)


class LanguageModel:
    """A trained model, loaded, that has shown what it finds unlikely."""

    def __init__(self, directory: Path):
        description = read_description(directory)
        self._model = load_arpa(directory / ARPA)
        self.noise = {name: self._model.perplexity(line)
                      for name, line in noise_lines(description["noise_words"]).items()}

    def perplexities(self, text: pl.Series) -> list[float | None]:
        """Perplexity per word (signs are words, the end of the text is one more); None where there is no word."""
        return [self._model.perplexity(line) if line else None for line in spelled(text).to_list()]

    def require_noise_above(self, threshold: float, where: str) -> None:
        """Raises DataError when noise has no higher perplexity than `threshold`."""
        for name, perplexity in self.noise.items():
            if not perplexity > threshold:
                raise DataError(
                    f"{where}: {name.replace('_', ' ')} have perplexity {perplexity:,.0f}, which max_perplexity "
                    f"{threshold:,.0f} lets pass: with this model the filter would keep noise. Train it on more text, "
                    f"or set max_perplexity below {math.floor(min(self.noise.values())):,}.")


@functools.lru_cache(maxsize=2)
def load(directory: Path, sha256: str) -> LanguageModel:
    """The model of `directory`, whose file has the hash `sha256`, once per process."""
    return LanguageModel(directory)


def read_description(directory: Path) -> dict[str, Any]:
    """What is written about the model in `directory`. Errors: DataError says how to make one."""
    path = directory / DESCRIPTION
    if not path.is_file():
        raise DataError(f"{directory}: no language model there ({DESCRIPTION} is missing). Make one with: "
                        f"python -m data_pipeline.language_model train --corpus=CORPUS --output={directory}")
    made: dict[str, Any] = read_json(path)
    return made
