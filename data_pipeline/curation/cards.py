"""Data cards: Markdown a person likes to read, made from a manifest and nothing else.

Owns wording and tables. Knows no files: a manifest comes in, text goes out.
"""

from collections.abc import Collection, Sequence
from typing import Any

_FORMATS = {"jsonl": "JSON lines", "parquet": "Parquet"}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], text: Collection[int] = (0,)) -> str:
    """A Markdown table, padded so that it also reads well as plain text; `text` columns are left-aligned."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = []
    for index, row in enumerate(cells):
        lines.append("| " + " | ".join(
            cell.ljust(width) if column in text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))) + " |")
        if index == 0:
            lines.append("|" + "|".join("-" * (width + 2) if column in text else "-" * (width + 1) + ":"
                                        for column, width in enumerate(widths)) + "|")
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in the unit that reads best: 12.3 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def corpus_table(manifest: dict[str, Any]) -> str:
    """One line per dataset: rows, documents, text, expected against actual share."""
    total = sum(row["bytes"] for row in manifest["datasets"]) or 1
    rows = [[
        row["name"], f"{row['rows_in']:,}", f"{row['kept']:,}", f"{row['rows_in'] - row['kept']:,}",
        size(row["bytes"]), f"{row['characters']:,}", f"{row['mix_ratio']:.1%}", f"{row['bytes'] / total:.1%}"
    ] for row in manifest["datasets"]]
    rows.append([
        "total", *(f"{sum(row[key] for row in manifest['datasets']):,}" for key in ("rows_in", "kept")),
        f"{sum(row['rows_in'] - row['kept'] for row in manifest['datasets']):,}",
        size(total), f"{sum(row['characters'] for row in manifest['datasets']):,}", "100.0%", "100.0%"
    ])
    return table(["dataset", "rows in", "documents", "dropped", "text", "characters", "weight", "share"],
                 rows)


def drops_table(manifest: dict[str, Any]) -> str:
    """Dropped rows by dataset and reason, or a sentence when there are none."""
    rows = [[row["name"], reason, f"{count:,}", f"{count / row['rows_in']:.2%}"]
            for row in manifest["datasets"]
            for reason, count in sorted(row["dropped"].items(), key=lambda item: (-item[1], item[0]))]
    return table(["dataset", "reason", "rows", "of rows in"], rows,
                 text=(0, 1)) if rows else "No row was dropped."


def corpus_card(manifest: dict[str, Any]) -> str:
    """DATA_CARD.md of a corpus."""
    config = manifest["mixture"]["config"]
    metadata = config["metadata"]
    sources = [[row["name"], _source(settings), f"{row['inputs']['count']:,}", size(row["inputs"]["bytes"]),
                settings["licence"] or "not stated", row["inputs"]["sha256"][:16]]
               for row, settings in zip(manifest["datasets"], config["datasets"], strict=True)]
    filters = [[settings["name"], _filters(settings)] for settings in config["datasets"]]
    unpinned = [settings["name"] for settings in config["datasets"]
                if settings["format"] == "huggingface" and not settings["revision"]]
    note = (f"\n**Not pinned:** {', '.join(unpinned)} come from a hub without a `revision`; a later run may "
            "get other text.\n") if unpinned else ""
    return f"""# Data card: {metadata['phase']}

{metadata['description']}

{corpus_table(manifest)}

*weight* is the `mix_ratio` of the mixture: the share of training that the dataset is meant to have. It is
handed on to packing and loading. *share* is what is in this corpus by bytes: datasets are taken whole, up to
their `max_bytes`.

## What was dropped, and why

{drops_table(manifest)}

Rows in = documents + dropped, checked for every dataset. Each dropped row but those over `max_bytes` is
listed in `{manifest['dropped']['path']}` with its place and reason.

## Where it comes from

{table(['dataset', 'source', 'inputs', 'raw', 'licence', 'hash of inputs'], sources, text=(0, 1, 4, 5))}
{note}
## How it was filtered

{table(['dataset', 'filters, in this order'], filters, text=(0, 1))}
{_steps(manifest.get('steps', []))}
Validation documents ({config['validation']['ratio']:.1%}, seed {config['validation']['seed']}) are split
off at packing, by a hash of the text.

## Files

{len(manifest['shards'])} shards of {_FORMATS[manifest['format']]} (`id`, `text`, `source`, `date` where it
is known, `meta`), each with its SHA-256 in `manifest.json`. Made by {manifest['code']} on Python
{manifest['python']}; mixture `{manifest['mixture']['file']}`, hash `{manifest['mixture']['sha256'][:16]}`.
"""


def _source(settings: dict[str, Any]) -> str:
    source = settings["source"]
    text = source if isinstance(source, str) else ", ".join(source)
    extra = [settings[key] for key in ("subset", "revision") if settings[key]]
    return f"{text} ({settings['format']}{', ' + ', '.join(extra) if extra else ''})"


def _steps(steps: Sequence[dict[str, Any]]) -> str:
    """The steps over the whole corpus, and which evaluation sets were not there to be compared with."""
    if not steps:
        return ""
    rows = []
    for step in steps:
        left_out = ("section", "type", "resources", "summary")
        asked = [f"{key} {value}" for key, value in step.items() if key not in left_out and value]
        rows.append([step["section"], step["type"], ", ".join(asked) or "-"])
    text = "\nThen, over the whole corpus:\n\n" + table(["section", "step", "parameters"], rows, text=(0, 1, 2)) + "\n"
    for step in steps:
        sets = step.get("summary", {}).get("sets", {})
        missing = [name for name, one in sets.items() if one["status"] == "missing"]
        if sets:
            text += f"\nCompared with {len(sets) - len(missing)} evaluation sets"
            text += (f"; **not compared**, because they are not on this machine: {', '.join(missing)}.\n" if missing
                     else ".\n")
            text += _looked_for(step["summary"])
    return text


def _looked_for(summary: dict[str, Any]) -> str:
    """Of every evaluation set what was looked for, and what was too short for it."""
    columns = {"texts": "texts looked for", "whole": "only as a whole", "too_short": "too short to look for",
               "unseen_items": "items never looked for"}
    used = {name: one for name, one in summary["sets"].items() if one["status"] == "used"}
    used["total"] = {key: sum(one[key] for one in used.values()) for key in columns}
    rows = [[name, *(f"{one[key]:,}" for key in columns)] for name, one in used.items()]
    header = ["evaluation set", *columns.values()]
    return f"""
{table(header, rows)}

A text of fewer than {summary['ngram']} words is a hit only where all of them stand in a row; one of fewer than
{summary['whole']}, numbers not counted, is too short to look for, unless all fields of its item together are long
enough.
"""


def _filters(settings: dict[str, Any]) -> str:
    steps = []
    for item in settings["filters"]:
        parameters = ", ".join(f"{key} {value}" for key, value in item.items() if key != "type")
        steps.append(f"{item['type']}{f' ({parameters})' if parameters else ''}")
    if settings["max_bytes"]:
        steps.append(f"max_bytes {size(settings['max_bytes'])} by {settings['cap_order']}")
    return "; ".join(steps) or "none"
