"""`pii`: personal data found, and masked, or the document dropped."""

import dataclasses
from typing import Literal

import numpy as np
import polars as pl

from data_pipeline.filters.base import Batch, Judgement, Parameters, keep_all
from data_pipeline.filters.pii_patterns import KINDS, SCREENS, Found, Kind, find
from nanollama.data.strict import FieldError


@dataclasses.dataclass(frozen=True)
class PiiFilter(Parameters):
    """Finds e-mail addresses, phone numbers, IP addresses, card numbers (Luhn), IBANs (mod 97) and US social security
    numbers. `mask` replaces each by its mask, `drop` drops the document, `detect` only counts.
    """

    type: Literal["pii"] = "pii"
    action: Literal["mask", "drop", "detect"] = "mask"
    kinds: tuple[Kind, ...] = KINDS
    masks: dict[str, str] = dataclasses.field(default_factory=lambda: {kind: f"[{kind.upper()}]" for kind in KINDS})
    public_ips_only: bool = True  # 192.168.0.1 and the like name nobody

    def check(self, where: str) -> None:
        """Raises FieldError where nothing would be looked for, or a mask is missing."""
        if not self.kinds:
            raise FieldError(f"{where}.kinds", "is empty", f"Name some of {', '.join(KINDS)}, or leave it out.")
        for kind in self.kinds:
            if kind not in self.masks:
                raise FieldError(f"{where}.masks", f"has none for {kind}", f"Add {kind}: '[{kind.upper()}]'.")

    def judge(self, batch: Batch) -> Judgement:
        """Counts per kind; new texts for `mask`, reasons for `drop`."""
        text = pl.col("text").str
        screened = batch.text.alias("text").to_frame().select(
            **{kind: text.contains(SCREENS[kind]) for kind in self.kinds})
        hits = {kind: screened[kind].to_numpy() for kind in self.kinds}
        counts = {kind: np.zeros(len(batch), np.int64) for kind in self.kinds}
        masked: dict[int, str] = {}
        for row in np.flatnonzero(np.any(list(hits.values()), axis=0)).tolist():
            found = find(batch.text[row], [kind for kind in self.kinds if hits[kind][row]], self.public_ips_only)
            for item in found:
                counts[item.kind][row] += 1
            if found and self.action == "mask":
                masked[row] = self.mask(batch.text[row], found)
        scores = {f"pii.{kind}": pl.Series(count) for kind, count in counts.items()}
        reasons, new = keep_all(batch), None
        if self.action == "drop":
            some = np.any(list(counts.values()), axis=0).tolist()
            reasons = pl.Series("reason", ["pii: personal data" if any_ else None for any_ in some], dtype=pl.String)
        if self.action == "mask":
            new = batch.text.clone().scatter(list(masked), list(masked.values())) if masked else batch.text
        return Judgement(reasons, scores, new)

    def mask(self, text: str, found: list[Found]) -> str:
        """`text` with each of `found` replaced by the mask of its kind."""
        pieces, last = [], 0
        for item in found:
            pieces += [text[last:item.start], self.masks[item.kind]]
            last = item.end
        return "".join([*pieces, text[last:]])
