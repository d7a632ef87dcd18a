"""`c4`: the rules of C4 (Raffel et al. 2020, section 2.2): bad lines are cut out, bad pages dropped."""

import dataclasses
import functools
import re
from typing import Literal

import numpy as np
import polars as pl

from data_pipeline.filters.base import Batch, Judgement, Parameters
from data_pipeline.filters.lines import one_line_end
from data_pipeline.filters.rules import check_bounds, first_broken
from data_pipeline.filters.words import offsets_of, sum_between

CITATION = r"\[\d*\]|\[edit\]|\[citation needed\]"
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SENTENCE_END = r"[.!?][\"'”’)\]]*\s"  # inside a line; its end is one more


@dataclasses.dataclass(frozen=True)
class C4Filter(Parameters):
    """Keeps the lines that end a sentence, have enough words and are no notice; drops a page with few sentences left,
    with "lorem ipsum" or with a curly bracket. A sentence ends in . ! or ? before white space or at the line's end.
    """

    type: Literal["c4"] = "c4"
    min_sentences: int = 5
    min_words_per_line: int = 3  # words here stand between white space
    max_word_length: int | None = 1000
    terminal_punctuation: bool = True  # lines must end in . ? ! " or '
    remove_citations: bool = True  # [1], [edit], [citation needed]
    drop_javascript: bool = True  # lines that speak of it
    drop_policy: bool = True  # lines on cookies and terms of use
    drop_lorem_ipsum: bool = True  # pages
    drop_curly_bracket: bool = True  # pages

    def check(self, where: str) -> None:
        """Raises FieldError on negative numbers."""
        least = {"sentences": self.min_sentences, "words_per_line": self.min_words_per_line}
        check_bounds(where, {name: (low, None) for name, low in least.items()}, {})

    def judge(self, batch: Batch) -> Judgement:
        """Reasons, and the texts without their bad lines."""
        lists = one_line_end(batch.text).str.split("\n")
        counts = lists.list.len().fill_null(0).to_numpy()
        documents = np.repeat(np.arange(len(batch), dtype=np.int32), counts)
        lines = pl.DataFrame({"document": documents, "line": lists.explode().str.strip_chars()})
        lines = self._good_lines(lines).filter("good")
        offsets = offsets_of(np.bincount(lines["document"].to_numpy(), minlength=len(batch)))
        # the first of these decides, as when one reads
        verdict = lines.filter(pl.col("page") > 0).unique("document", keep="first", maintain_order=True)
        page = np.zeros(len(batch), np.int8)
        page[verdict["document"].to_numpy()] = verdict["page"].to_numpy()
        sentences = sum_between(lines["sentences"].to_numpy(), offsets)
        measured = pl.DataFrame({"page": page, "sentences": sentences})
        reasons = first_broken(measured, [(pl.col("page") == 1, "lorem ipsum"), (pl.col("page") == 2, "curly bracket"),
                                          (pl.col("sentences") < self.min_sentences, "too few sentences")], self.type)
        joined = lines.group_by("document", maintain_order=True).agg(pl.col("line").str.join("\n"))
        cleaned = pl.DataFrame({"document": np.arange(len(batch), dtype=np.int32), "text": batch.text}).join(
            joined, on="document", how="left", maintain_order="left")
        text = cleaned.select(pl.when(reasons.is_null()).then(pl.col("line").fill_null("").str.strip_chars())
                              .otherwise("text").alias("text"))["text"]
        return Judgement(reasons, {"c4.sentences": measured["sentences"]}, text)

    def _good_lines(self, lines: pl.DataFrame) -> pl.DataFrame:
        words = lines["line"].str.count_matches(r"\S+")
        good = words >= self.min_words_per_line
        if self.max_word_length is not None:
            good &= ~_has_longer_word(lines["line"], self.max_word_length)
        line = pl.col("line").str
        if self.remove_citations:
            lines = lines.with_columns(line.replace_all(CITATION, ""))
        lines = lines.with_columns(lower=line.to_lowercase(), good=good)
        lower = pl.col("lower").str
        if self.terminal_punctuation:
            lines = lines.with_columns(pl.col("good") & line.contains(r"""[.?!"']$""") & ~line.ends_with("..."))
        lorem = lower.contains("lorem ipsum", literal=True) & self.drop_lorem_ipsum
        script = lower.contains("javascript", literal=True) & self.drop_javascript
        curly = line.contains("{", literal=True) & self.drop_curly_bracket
        policy = lower.contains_any(list(POLICY)) & self.drop_policy
        lines = lines.with_columns(page=pl.when(lorem).then(1).when(curly & ~script).then(2).otherwise(0).cast(pl.Int8))
        lines = lines.with_columns(good=pl.col("good") & ((pl.col("page") > 0) | ~(script | policy)))
        return lines.with_columns(sentences=line.count_matches(SENTENCE_END) + 1).drop("lower")


def _has_longer_word(lines: pl.Series, most: int) -> pl.Series:
    """Whether a line has a word of more than `most` characters. Few lines are that long, and only these are split."""
    answer = np.zeros(len(lines), bool)
    long = np.flatnonzero((lines.str.len_chars() > most).to_numpy())
    for index in long.tolist():
        answer[index] = any(len(word) > most for word in _white_space().split(lines[index]))
    return pl.Series("long", answer)


@functools.cache
def _white_space() -> re.Pattern[str]:
    return re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
