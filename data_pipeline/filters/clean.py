"""`clean`: text repaired. Control characters, wrongly decoded text, Unicode form, line ends, boilerplate lines."""

import dataclasses
import re
from typing import Literal

import numpy as np
import polars as pl

from data_pipeline.filters.base import Batch, Judgement, Parameters, keep_all
from data_pipeline.filters.lines import OTHER_ENDS
from data_pipeline.filters.resources import missing
from nanollama.data.strict import FieldError

# Control characters but for tab and line end, the byte order mark, zero width space, soft hyphen, word joiner, marks
# of direction, noncharacters. Joiners of letters and emoji (U+200C, U+200D) stay.
INVISIBLE = (r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x{84}\x{86}-\x{9f}\x{ad}\x{200b}\x{200e}\x{200f}\x{202a}-\x{202e}\x{2060}"
             r"\x{2066}-\x{2069}\x{feff}\x{fff9}-\x{fffb}\x{fdd0}-\x{fdef}\x{fffe}\x{ffff}]")
# What text decoded by the wrong table is made of: letters and signs above U+0080 beside each
# other, or one whose second byte has become a space;
# or characters of Windows-1252 left as control characters.
_PAIR = r"[\x{80}-\x{24f}\x{2c6}\x{2dc}\x{2013}-\x{2122}\x{fffd}][\x{80}-\x{2122}]|[\x{80}-\x{9f}]|[\x{c2}\x{c3}] "
_PYTHON_PAIR = re.compile("[\x80-\u024f\u02c6\u02dc\u2013-\u2122\ufffd][\x80-\u2122]|[\x80-\x9f]|[\xc2\xc3] ")
LONGEST_LINE = 300  # bytes of a line that may be boilerplate
# Whole lines, in any case, that a page shows around its text.
BOILERPLATE = (
    r"(?:we|this (?:web)?site|our (?:web)?site) uses? cookies\b.{0,200}",
    r"(?:accept|reject|manage|allow)(?: all)? cookies",
    r"(?:by (?:using|continuing|browsing)\b.{0,60})?you (?:agree|consent) to (?:our|the) "
    r"(?:use of cookies|terms|privacy)\b.{0,100}",
    r"(?:copyright )?(?:©|\(c\)|&copy;) ?(?:19|20)[0-9]{2}\b.{0,80}",
    r".{0,80}\ball rights reserved\.?",
    r"(?:terms (?:of (?:use|service)|and conditions)|privacy policy|cookie policy|sitemap|site map|contact us|about us)"
    r"(?: ?[|·•/\-] ?(?:[a-z &]{3,25}))*",
    r"(?:share|tweet|like|pin|email|print)(?: this)?(?: (?:on|via|to) [a-z]{2,12})?(?: ?[|·•/\-,] ?[a-z]{2,12}){0,6}",
    r"(?:skip to (?:main )?content|back to top|read more|click here|load more|show more|see more)(?: ?[.»›>…]+)?",
    r"(?:sign|log) (?:in|up|out)(?: (?:now|here|to .{1,40}))?|subscribe(?: (?:now|to .{1,60}))?|register(?: now)?",
    r"please enable javascript\b.{0,120}|javascript (?:is|must be) (?:required|disabled|enabled)\b.{0,120}",
)


@dataclasses.dataclass(frozen=True)
class CleanFilter(Parameters):
    """Rewrites texts, drops none. In this order: `mojibake` repairs text decoded by the wrong table (ftfy, where its
    quick test finds signs of it), `line_ends` makes every line end \\n, `invisible` removes control and invisible
    characters, `unicode` composes characters, `boilerplate` removes whole lines of up to 300 bytes that match a
    pattern (regular expressions of Rust's `regex`, any case, white space around the line left aside), `spaces` removes
    white space at line ends and more than two line ends in a row.
    """

    type: Literal["clean"] = "clean"
    mojibake: bool = True
    line_ends: bool = True
    invisible: bool = True
    unicode: Literal["NFC", "NFKC"] | None = "NFC"
    boilerplate: tuple[str, ...] = BOILERPLATE
    spaces: bool = True

    def check(self, where: str) -> None:
        """Raises FieldError on a pattern that cannot be used."""
        for index, pattern in enumerate(self.boilerplate):
            try:
                pl.Series([""]).str.contains(_line_pattern((pattern,)))
            except pl.exceptions.ComputeError as error:
                raise FieldError(f"{where}.boilerplate[{index}]", f"{pattern!r} is no regular expression "
                                 f"({' '.join(str(error).split())[:200]})", "Mend it, or leave it out.") from error

    def judge(self, batch: Batch) -> Judgement:
        """The new texts, and how many characters each lost."""
        text = batch.text.alias("text")
        if self.mojibake:
            text = repaired(text)
        if self.line_ends:
            text = text.str.replace_all(OTHER_ENDS, "\n")
        if self.invisible:
            text = text.str.replace_all(INVISIBLE, "")
        if self.unicode is not None:
            text = text.str.normalize(self.unicode)
        if self.boilerplate:
            text = without_lines(text, self.boilerplate)
        if self.spaces:
            text = text.str.replace_all(r"[^\S\n]+\n", "\n").str.replace_all(r"\n{3,}", "\n\n").str.strip_chars_end()
            text = text.str.strip_chars_start("\n")
        lost = batch.text.str.len_chars().cast(pl.Int64) - text.str.len_chars().cast(pl.Int64)
        return Judgement(keep_all(batch), {"clean.characters_removed": lost}, text)


def _line_pattern(patterns: tuple[str, ...]) -> str:
    return rf"(?i)^[^\S\n]*(?:{'|'.join(f'(?:{pattern})' for pattern in patterns)})[^\S\n]*$"


def without_lines(text: pl.Series, patterns: tuple[str, ...]) -> pl.Series:
    """The texts without the lines that are wholly matched by one of `patterns`. Long lines are never boilerplate."""
    lists = text.str.split("\n")
    documents = np.repeat(np.arange(len(text)), lists.list.len().to_numpy())
    flat = pl.DataFrame({"document": documents, "line": lists.explode()})
    short = flat.filter((pl.col("line").str.len_bytes() <= LONGEST_LINE) & (pl.col("line") != ""))
    rows = short.filter(pl.col("line").str.contains(_line_pattern(patterns)))["document"].unique().to_list()
    if not rows:
        return text
    drop = (pl.col("line").str.len_bytes() <= LONGEST_LINE) & (pl.col("line") != "") & pl.col("line").str.contains(
        _line_pattern(patterns))
    left = flat.filter(pl.col("document").is_in(rows) & ~drop).group_by("document", maintain_order=True).agg(
        pl.col("line").str.join("\n"))
    new = dict.fromkeys(rows, "") | dict(left.rows())
    return text.clone().scatter(list(new), list(new.values()))


def repaired(text: pl.Series) -> pl.Series:
    """The texts; lines of them that look decoded by the wrong table are repaired. ftfy changes nothing else."""
    rows = text.str.contains(_PAIR).arg_true().to_list()
    if not rows:
        return text
    try:
        import ftfy
        import ftfy.badness
    except ImportError as error:
        raise missing("ftfy", "filter clean (mojibake: true)") from error
    config = ftfy.TextFixerConfig(unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False,
                                  fix_character_width=False, uncurl_quotes=False, fix_line_breaks=False,
                                  fix_surrogates=False, remove_control_chars=False, normalization=None, explain=False)
    new = {}
    for row in rows:
        lines = text[row].split("\n")
        for index, line in enumerate(lines):
            if _PYTHON_PAIR.search(line) and ftfy.badness.is_bad(line):
                lines[index] = ftfy.fix_text(line, config)
        new[row] = "\n".join(lines)
    return text.clone().scatter(list(new), list(new.values()))
