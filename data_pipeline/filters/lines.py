"""Lines of texts: one kind of line end for all."""

import polars as pl

# what Python's str.splitlines takes for line ends, beside \n
OTHER_ENDS = r"\r\n|[\r\x0b\x0c\x1c-\x1e\x{85}\x{2028}\x{2029}]"


def one_line_end(text: pl.Series) -> pl.Series:
    """The texts with every kind of line end replaced by \\n."""
    return text.str.replace_all(OTHER_ENDS, "\n")
