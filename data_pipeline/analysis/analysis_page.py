"""The analysis of a corpus as one HTML page that needs nothing else: no script, nothing fetched.

Owns the drawings and the wording. Numbers come from `facts` and are never changed here; every text from a
corpus is escaped.
"""

import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

import nanollama
from data_pipeline.analysis.estimate import ACCELERATORS
from data_pipeline.analysis.facts import Analysis, Lengths
from data_pipeline.curation.cards import size
from nanollama.charts import NARROW, WIDE, Frame, Scale, number, ticks
from nanollama.quantities import amount, duration, percent, si

LISTED = 12  # languages, and reasons of a dataset, shown one by one
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(facts: dict[str, Any], analysis: Analysis, formulas: Sequence[tuple[str, str]]) -> str:
    """The page. `facts` is what analysis.json holds."""
    templates = resources.files("data_pipeline.analysis.templates")
    page, style = ((templates / f"analysis.{end}").read_text("utf-8") for end in ("html", "css"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(size=size, count=lambda value: "?" if value is None else f"{value:,.0f}",
                               tokens=lambda value: "?" if value is None else si(value),
                               percent=percent, breakable=_breakable, passes=_passes,
                               length=lambda value: f"{value:,.0f}",
                               amount=lambda value: "?" if value is None else amount(value))
    lengths = _all_lengths(analysis)
    return environment.from_string(page).render(
        facts=facts, rows=facts["datasets"], metadata=facts["metadata"], policy=POLICY, style=Markup(style),
        totals={name: analysis.total(name) for name in ("rows_in", "wanted", "kept", "bytes", "tokens")},
        measured=all(row["tokens_measured"] for row in facts["datasets"]),
        widest=max([max(row["weight"], row["share_of_tokens"]) for row in facts["datasets"]] or [1]),
        histogram=histogram(lengths), lengths=lengths, languages=_languages(facts), yields=_yields(facts),
        result=facts["estimate"]["result"], inputs=facts["estimate"]["inputs"], formulas=formulas,
        accelerator=ACCELERATORS[facts["estimate"]["inputs"]["accelerator"]], version=nanollama.__version__,
        duration=duration(facts["estimate"]["result"]["seconds"]))


def histogram(lengths: Lengths, frames: Sequence[Frame] = (WIDE, NARROW)) -> Markup | None:
    """Share of documents (bars) and of text (line) by length, lengths on a logarithmic axis. None without documents."""
    rows = lengths.octaves()
    if not rows:
        return None
    documents = [row[2] / lengths.documents for row in rows]
    text = [row[3] / math.fsum(row[3] for row in rows) for row in rows]
    return Markup("").join(_draw(frame, rows, documents, text, lengths.unit) for frame in frames)


def _draw(frame: Frame, rows: Sequence[tuple[float, float, int, float]], documents: Sequence[float],
          text: Sequence[float], unit: str) -> Markup:
    bottom = frame.height - BOTTOM
    x = Scale(math.log2(rows[0][0]), math.log2(rows[-1][1]), LEFT, frame.width - RIGHT)
    y = Scale(0.0, 1.05 * max(*documents, *text), bottom, TOP)
    label = f"Lengths of documents in {unit}: " + "; ".join(
        f"{low:,.0f} to {high:,.0f}: {share:.1%} of documents" for (low, high, _, _), share in
        zip(rows, documents, strict=True) if share >= 0.01)
    parts = [Markup('<svg class="chart {}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        frame.name, frame.width, frame.height, label)]
    for value in ticks(0.0, y.high, frame.ticks_y):
        parts.append(Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
                            '<text class="tick" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>').format(
                                LEFT, frame.width - RIGHT, y(value), LEFT - 8, y(value) + 4, f"{value:.0%}"))
    for (low, high, count, _), share in zip(rows, documents, strict=True):
        left, right = x(math.log2(low)), x(math.log2(high))
        parts.append(Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title>'
                            '</rect>').format(
                                left + 1, y(share), max(right - left - 2, 1), bottom - y(share),
                                f"{low:,.0f} to {high:,.0f} {unit}: {count:,} documents, {share:.1%}"))
    middle = [(x((math.log2(low) + math.log2(high)) / 2), y(share)) for (low, high, _, _), share in
              zip(rows, text, strict=True)]
    parts.append(Markup('<path class="line" d="M{}"/>').format("L".join(f"{a:.1f} {b:.1f}" for a, b in middle)))
    parts += [Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(a, b) for a, b in middle]
    every = max(1, math.ceil((x.high - x.low) / frame.ticks_x))
    for power in range(math.ceil(x.low - 1e-9), math.floor(x.high + 1e-9) + 1):
        if power % every == 0:
            parts.append(Markup('<line class="tickmark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                                '<text class="tick" x="{0:.1f}" y="{3}" text-anchor="middle">{4}</text>').format(
                                    x(power), bottom, bottom + 4, bottom + 19, _axis(2**power)))
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick" x="{}" y="{}" '
                        'text-anchor="middle">{} in a document</text></svg>').format(
                            LEFT, frame.width - RIGHT, bottom, bottom, (LEFT + frame.width - RIGHT) / 2,
                            frame.height - 6, unit))
    return Markup("").join(parts)


def _axis(value: int) -> str:
    """A power of two, as short as its name: 512, 16k, 2M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit:
            return f"{value // unit}{name}"
    return number(value)


def _all_lengths(analysis: Analysis) -> Lengths:
    """Lengths of all datasets together: tokens where all are counted, else characters."""
    counted = all(one.token_lengths.documents for one in analysis.datasets if one.kept)
    total = Lengths("tokens" if counted else "characters")
    for one in analysis.datasets:
        part = one.token_lengths if counted else one.lengths
        total.counts += part.counts
        total.sums += part.sums
        total.longest = max(total.longest, part.longest)
    return total


def _languages(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Languages by documents, the rare ones together."""
    counts: dict[str, int] = {}
    for row in facts["datasets"]:
        for language, count in row["languages"].items():
            counts[language] = counts.get(language, 0) + count
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = sum(counts.values()) or 1
    rows = [{"name": name, "documents": count, "share": count / total} for name, count in ordered[:LISTED]]
    if len(ordered) > LISTED:
        rest = sum(count for _, count in ordered[LISTED:])
        rows.append({"name": f"{len(ordered) - LISTED} others", "documents": rest, "share": rest / total})
    return rows


def _yields(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Per dataset: what was kept and what was not, the rare reasons together, choices last."""
    rows = []
    for row in facts["datasets"]:
        total = max(row["rows_in"], 1)
        lost = [item for item in row["dropped"] if not item["wished"]]
        often = set(sorted(range(len(lost)), key=lambda number: -lost[number]["rows"])[:LISTED])
        reasons = [item for number, item in enumerate(lost) if number in often]  # in the order of the stages
        if len(lost) > LISTED:
            reasons.append({"stage": "", "reason": f"{len(lost) - LISTED} rarer reasons", "wished": False,
                            "rows": sum(item["rows"] for number, item in enumerate(lost) if number not in often)})
        reasons += [item for item in row["dropped"] if item["wished"]]
        rows.append({"name": row["name"], "kept": row["documents"], "share": row["documents"] / total,
                     "reasons": [{**item, "share": item["rows"] / total} for item in reasons]})
    return rows


def _breakable(name: str) -> Markup:
    """A name that breaks after _ and - and not anywhere, where it is too long for its column."""
    return Markup("<wbr>").join(part for part in re.split(r"(?<=[_-])", name) if part)


def _passes(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"
