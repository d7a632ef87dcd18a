"""`python -m data_pipeline.analyze --corpus=DIR --output=DIR`: what a corpus is made of, as CSV, JSON and a page.

Owns the command and the files it writes. What is measured is in `analysis.facts`, the estimate of time, money and
carbon in `estimate`, the page in `analysis_page`.
"""

import argparse
import csv
import dataclasses
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.analysis import analysis_page
from data_pipeline.analysis.estimate import ACCELERATORS, Estimate, Inputs, estimate, formulas
from data_pipeline.analysis.facts import Analysis, analyze
from data_pipeline.curation.cards import size, table
from data_pipeline.engine.progress import Progress
from data_pipeline.engine.stage import Help, command
from nanollama.accelerators import WORLD_CARBON
from nanollama.data.files import DataError, write_atomic, write_json

PAGE, FACTS = "analysis.html", "analysis.json"
PERCENTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def write_analysis(analysis: Analysis, inputs: Inputs, output: str | os.PathLike[str]) -> dict[str, Any]:
    """Write all files to `output`; returns what is in the JSON."""
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    result = estimate(inputs)
    facts = as_json(analysis, inputs, result)
    columns = ["name", "weight", "share_of_bytes", "share_of_tokens", "documents", "rows_in", "bytes", "characters",
               "tokens", "tokens_measured", "expected_tokens", "epochs"]
    write_atomic(directory / "mixture.csv", as_csv(
        columns, ([row[column] for column in columns] for row in facts["datasets"])))
    write_atomic(directory / "yield.csv", as_csv(
        ["dataset", "stage", "reason", "rows", "share_of_rows_in", "by_choice"],
        ([row["name"], item["stage"], item["reason"], item["rows"], item["rows"] / max(row["rows_in"], 1),
          item["wished"]]
         for row in facts["datasets"] for item in row["dropped"])))
    write_atomic(directory / "lengths.csv", as_csv(
        ["dataset", "unit", "from", "to", "documents", "length"],
        ([one.name, lengths.unit, *row] for one in analysis.datasets for lengths in (one.lengths, one.token_lengths)
         for row in lengths.octaves())))
    write_atomic(directory / "languages.csv", as_csv(
        ["dataset", "language", "documents"],
        ([row["name"], language, count] for row in facts["datasets"] for language, count in row["languages"].items())))
    write_json(directory / FACTS, facts)
    write_atomic(directory / PAGE, analysis_page.render(facts, analysis, formulas(inputs)))
    return facts


def as_json(analysis: Analysis, inputs: Inputs, result: Estimate) -> dict[str, Any]:
    """Everything on the page, as plain JSON."""
    datasets = []
    for one in analysis.datasets:
        lengths = one.token_lengths if one.token_lengths.documents else one.lengths
        datasets.append({
            "name": one.name, "weight": one.weight, "share_of_bytes": analysis.share(one, "bytes"),
            "share_of_tokens": analysis.share(one, "tokens"), "documents": one.kept, "rows_in": one.rows_in,
            "rows_wanted": one.wanted, "bytes": one.bytes, "characters": one.characters, "tokens": round(one.tokens),
            "tokens_measured": one.measured, "expected_tokens": one.expected_tokens,
            "estimated_tokens": one.estimated_tokens, "epochs": one.epochs, "dropped": one.yields,
            "lengths": {"unit": lengths.unit, "mean": lengths.mean, "longest": lengths.longest,
                        **{f"p{share * 100:.0f}": lengths.percentile(share) for share in PERCENTILES}},
            "languages": dict(sorted(one.languages.items(), key=lambda item: (-item[1], item[0]))),
        })
    return {
        "kind": "analysis", "mixture": {"file": analysis.mixture["file"], "sha256": analysis.mixture["sha256"]},
        "metadata": analysis.metadata, "sampling": analysis.mixture["config"].get("sampling"),
        "corpus_manifest_sha256": analysis.manifest_sha256, "datasets": datasets,
        "estimate": {"accelerator": ACCELERATORS[inputs.accelerator].name, "inputs": dataclasses.asdict(inputs),
                     "result": dataclasses.asdict(result)},
    }


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def summary(facts: dict[str, Any]) -> str:
    """What the command prints."""
    rows = [[row["name"], f"{row['weight']:.2%}", f"{row['share_of_tokens']:.2%}", f"{row['documents']:,}",
             size(row["bytes"]), f"{row['tokens']:,}",
             "?" if row["expected_tokens"] is None else f"{row['expected_tokens']:,.0f}",
             "?" if row["epochs"] is None else f"{row['epochs']:.2f}"] for row in facts["datasets"]]
    return table(["dataset", "weight", "share here", "documents", "text", "tokens", "expected", "epochs"], rows)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.analyze", formatter_class=Help,
                                     description=__doc__.split("\n")[0].partition(": ")[2].capitalize())
    parser.add_argument("--corpus", required=True, help="directory made by data_pipeline.corpus")
    parser.add_argument("--packed", help="packed set of it, or the folder of its sets: counts the tokens")
    parser.add_argument("--output", required=True, help="directory for the page, CSV and JSON")
    parser.add_argument("--tokens", type=float, help="of training; default: the mixture's total_tokens, or those here")
    parser.add_argument("--parameters", type=float, default=1.1e9, help="of the model, without embeddings")
    parser.add_argument("--layers", type=int, default=0, help="with --width and --sequence-length: count attention too")
    parser.add_argument("--width", type=int, default=0, help="of the model: the hidden size")
    parser.add_argument("--sequence-length", type=int, default=0, help="tokens of a row in training")
    parser.add_argument("--accelerator", default="h100", help=f"one of {', '.join(ACCELERATORS)}")
    parser.add_argument("--count", type=int, default=8, help="devices")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--price", type=float, help="of one device for an hour, in any currency")
    parser.add_argument("--watts", type=float, help="of one device; default: its data sheet's")
    parser.add_argument("--pue", type=float, default=1.2, help="power of the building over power of the devices")
    parser.add_argument("--carbon-intensity", type=float, default=WORLD_CARBON,
                        help="kg CO2 a kWh; default: the world's average")
    arguments = parser.parse_args()
    with Progress("analyze") as progress:
        analysis = analyze(arguments.corpus, arguments.packed, arguments.tokens, progress)
    tokens = arguments.tokens or analysis.metadata["total_tokens"] or analysis.total("tokens")
    if not tokens:
        raise DataError(f"{arguments.corpus}: has no tokens. Give --tokens.")
    inputs = Inputs(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Inputs)
                       if field.name != "tokens"}, tokens=tokens)
    facts = write_analysis(analysis, inputs, arguments.output)
    print(summary(facts))
    print("\n" + "\n".join(f"{name}: {text}" for name, text in formulas(inputs)))
    print(f"\nanalyze: {Path(arguments.output) / PAGE}")


if __name__ == "__main__":
    command(_main)
