"""`python -m data_pipeline.tokenizer_compare --corpus=DIR --output=DIR`: which vocabulary suits a corpus.

Owns the comparison: one tokenizer for each algorithm and size, trained on the same sample, and tokenizers that exist,
all measured on the same documents that none of the new ones was trained on. The best is copied by hand, or trained
again on everything; nothing here is packed with.
"""

import argparse
import csv
import dataclasses
import io
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.curation import cards
from data_pipeline.curation.corpus_format import read_manifest
from data_pipeline.engine.progress import Progress
from data_pipeline.engine.stage import Help, command
from data_pipeline.tokenization import tokenizer_report
from data_pipeline.tokenization.tokenizer_report import Measures, Report
from data_pipeline.tokenizer import TokenizerConfig, build_tokenizer
from nanollama.data.files import DataError, write_atomic, write_json
from nanollama.data.tokenizer_folder import load_tokenizer

HOLDOUT = 0.1  # of the documents
CARD, TABLE, FACTS = "COMPARISON.md", "comparison.csv", "comparison.json"


@dataclasses.dataclass
class Compared:
    """One tokenizer and what was measured of it."""

    name: str
    vocab_size: int
    sha256: str
    report: Report

    @property
    def whole(self) -> Measures:
        """All sources together."""
        total = Measures()
        for one in self.report.sources.values():
            total.add(one)
        return total


def compare(corpus: str | os.PathLike[str], output: str | os.PathLike[str], configs: Sequence[TokenizerConfig],
            existing: Sequence[str | os.PathLike[str]] = ()) -> list[Compared]:
    """Train a tokenizer of each config in `output`, measure them and the `existing` ones. Errors: DataError.

    All configs must have the same seed and holdout: they are measured on the same documents.
    """
    if not configs and not existing:
        raise DataError("nothing to compare: give --vocab-sizes or --tokenizer.")
    if len({(config.seed, config.holdout) for config in configs}) > 1:
        raise DataError("tokenizers to compare need the same seed and holdout.")
    seed, holdout = (configs[0].seed, configs[0].holdout) if configs else (0, HOLDOUT)
    manifest, _ = read_manifest(corpus)
    loaded = [(Path(directory).resolve().name, load_tokenizer(directory), False) for directory in existing]
    results = []
    for config in configs:
        name = f"{config.algorithm}-{config.vocab_size}"
        results.append((name, build_tokenizer(corpus, Path(output) / name, config, replace=True), True))
    results += loaded
    with Progress("compare") as progress:
        # published tokenizers may normalize: what does not come back exactly is counted, not refused
        return [Compared(name, tokenizer.vocab_size, tokenizer.sha256, tokenizer_report.measure(
            tokenizer, corpus, manifest, progress, seed=seed, holdout=holdout, exact=ours))
            for name, tokenizer, ours in results]


def card(compared: Sequence[Compared], holdout: float) -> str:
    """COMPARISON.md."""
    overall = cards.table(
        ["tokenizer", "pieces", *tokenizer_report.HEADER],
        [[one.name, f"{one.vocab_size:,}", *tokenizer_report.cells(one.whole)] for one in compared])
    parts = [_grouped("source", [one.report.sources for one in compared], compared),
             _grouped("language", [one.report.languages for one in compared], compared)]
    return f"""# Tokenizers compared

All measured on the same documents, which none of those trained here has seen ({holdout:.0%} of the corpus, by hash; at
most about {tokenizer_report.MEASURED_BYTES / 1e6:.0f} MB a source).

{overall}

More characters a token are less to compute for the same text; a larger vocabulary costs parameters (width x pieces,
twice if the head is not tied) and a larger softmax. *Byte pieces* are single bytes of characters without a piece.

{parts[0]}
{parts[1]}"""


def _grouped(title: str, groups: Sequence[dict[str, Measures]], compared: Sequence[Compared]) -> str:
    """Characters and bytes a token of each group, one column a tokenizer, the largest group first."""
    names = sorted(groups[0], key=lambda name: (-groups[0][name].bytes, name))
    rows = [[name, f"{groups[0][name].documents:,}", cards.size(groups[0][name].bytes),
             *(_both(own[name]) for own in groups)] for name in names if groups[0][name].documents]
    return (f"## Characters / bytes a token, by {title}\n\n"
            + cards.table([title, "documents", "text", *(one.name for one in compared)], rows) + "\n")


def _both(one: Measures) -> str:
    tokens = max(one.tokens, 1)
    return f"{one.characters / tokens:.2f} / {one.bytes / tokens:.2f}"


def write(compared: Sequence[Compared], output: str | os.PathLike[str], holdout: float) -> None:
    """The card, the CSV and the JSON."""
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for one, (kind, groups) in itertools.product(compared, (("source", "sources"), ("language", "languages"))):
        for name, measures in getattr(one.report, groups).items():
            rows.append({"tokenizer": one.name, "pieces": one.vocab_size, "by": kind, "name": name,
                         **dataclasses.asdict(measures)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(directory / TABLE, text.getvalue())
    write_json(directory / FACTS, {"kind": "tokenizer comparison", "holdout": holdout, "tokenizers": [
        {"name": one.name, "vocab_size": one.vocab_size, "sha256": one.sha256} for one in compared], "measures": rows})
    write_atomic(directory / CARD, card(compared, holdout))


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.tokenizer_compare",
                                     formatter_class=Help,
                                     description=__doc__.split("\n")[0].partition(": ")[2].capitalize())
    parser.add_argument("--corpus", required=True, help="directory made by data_pipeline.corpus")
    parser.add_argument("--output", required=True, help="directory for the tokenizers and the comparison")
    parser.add_argument("--vocab-sizes", default="8192,16384,32000", help="separated by commas; empty: train none")
    parser.add_argument("--algorithms", default="bpe,unigram", help="separated by commas")
    parser.add_argument("--tokenizer", action="append", default=[],
                        help="a frozen tokenizer to measure too; may be given more than once")
    parser.add_argument("--sample-mb", type=float, default=TokenizerConfig.sample_mb, help="text to train each on")
    parser.add_argument("--language-alpha", type=float, default=TokenizerConfig.language_alpha,
                        help="languages by their bytes to this power: 1 as they come, 0.3 lifts rare ones")
    parser.add_argument("--character-coverage", type=float, default=TokenizerConfig.character_coverage,
                        help="share of the text's characters that get a piece; 0.9995 for many scripts")
    parser.add_argument("--holdout", type=float, default=HOLDOUT, help="share of the documents to measure on")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments = parser.parse_args()
    try:
        sizes = [int(size) for size in arguments.vocab_sizes.split(",") if size.strip()]
    except ValueError as error:
        raise DataError(f"--vocab-sizes={arguments.vocab_sizes}: give whole numbers separated by commas.") from error
    algorithms = [name.strip() for name in arguments.algorithms.split(",") if name.strip()]
    shared = {name: getattr(arguments, name) for name in
              ("seed", "sample_mb", "language_alpha", "holdout", "character_coverage")}
    configs = [TokenizerConfig(size, name, **shared) for name in algorithms for size in sizes]
    compared = compare(arguments.corpus, arguments.output, configs, arguments.tokenizer)
    write(compared, arguments.output, arguments.holdout)
    print(card(compared, arguments.holdout))
    print(f"compare: {Path(arguments.output) / CARD}", file=sys.stderr)


if __name__ == "__main__":
    command(_main)
