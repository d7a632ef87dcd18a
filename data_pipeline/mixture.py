"""`python -m data_pipeline.mixture plan MIX.yaml`: what a mixture file means, before anything is read.

Owns the compiled plan (what is read, by which filters and steps in which order, how many tokens and epochs of
each dataset, the weights for the trainer), its hash and its printed form; and `count`, which reads the rows
and says what came of them. Knows nothing of how the corpus is made.
"""

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.curation import cards
from data_pipeline.engine.progress import Progress
from data_pipeline.engine.stage import Help, command
from data_pipeline.filters import make_batch
from data_pipeline.mixtures.load import load_mixture, mixture_mapping
from data_pipeline.mixtures.schema import MixtureConfig, epochs_of
from data_pipeline.mixtures.steps import SECTIONS
from data_pipeline.sources import open_source, read_all
from data_pipeline.sources.dataset import (
    BYTES_PER_TOKEN,
    DatasetConfig,
    available_tokens,
    format_of,
    paths_of,
    removes_duplicates,
)
from data_pipeline.text.documents import Bad, Document, text_digest
from nanollama.data.files import DataError, sha256_json, write_json
from nanollama.data.strict import to_mapping
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer
from nanollama.quantities import si

SCHEMA_VERSION = 1
GOOD_EPOCHS = 4  # repeating up to here costs almost nothing (Muennighoff et al. 2023, arXiv:2305.16264)
JUDGED_AT_ONCE = 256  # documents


def compile_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plan of the mixture file at `path`, as plain JSON with its own hash. Raises MixtureError."""
    return plan_of(load_mixture(path), Path(path).name)


def plan_of(mixture: MixtureConfig, file: str) -> dict[str, Any]:
    """The plan of `mixture`, which the file named `file` holds."""
    plan: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "kind": "mixture plan",
        "mixture": {"file": file, "sha256": sha256_json(mixture_mapping(mixture))},
        "metadata": to_mapping(mixture.metadata), "validation": to_mapping(mixture.validation),
        "datasets": [_dataset_plan(dataset, mixture) for dataset in mixture.datasets],
        "steps": [{"section": section, **to_mapping(step)}
                  for section in SECTIONS for step in mixture.steps(section)],
        "sampling": {**to_mapping(mixture.built_sampling), "formula": mixture.built_sampling.formula},
    }
    return {**plan, "sha256": sha256_json(plan)}


def _dataset_plan(dataset: DatasetConfig, mixture: MixtureConfig) -> dict[str, Any]:
    """One dataset's part of the plan."""
    total, available = mixture.metadata.total_tokens, available_tokens(dataset)
    epochs = epochs_of(dataset, mixture.metadata)
    return {
        "name": dataset.name, "source": list(paths_of(dataset)), "format": format_of(dataset), "rows": dataset.rows,
        "layout": dataset.layout, "subset": dataset.subset, "data_dir": dataset.data_dir,
        "splits": list(dataset.splits), "revision": dataset.revision, "licence": dataset.licence,
        "filters": [to_mapping(item) for item in dataset.built_filters],
        "max_bytes": dataset.max_bytes, "sampling": to_mapping(dataset.sampling),
        "weight": dataset.mix_ratio, "available_tokens": available,
        "training_tokens": None if total is None else dataset.mix_ratio * total, "epochs": epochs,
    }


def trainer_sets(plan: dict[str, Any], root: str = "DIR/packed") -> list[dict[str, Any]]:
    """`config.data.sets` for a corpus of the plan that was packed with --per-dataset."""
    return [{"path": f"{root}/{row['name']}", "weight": row["weight"]} for row in plan["datasets"]]


def describe(plan: dict[str, Any]) -> str:
    """The plan as text for people."""
    metadata, rows = plan["metadata"], plan["datasets"]
    total = metadata["total_tokens"]
    facts = [f"{name.replace('_', ' ')} {metadata[name]:,}" for name in ("total_tokens", "steps", "max_seq_length")
             if metadata[name] is not None]
    if total and metadata["steps"]:
        facts.append(f"{total / metadata['steps']:,.0f} tokens a step")
    table = cards.table(
        ["dataset", "source", "rows", "weight", "tokens of training", "tokens there", "epochs"],
        [[row["name"], _where(row), row["rows"], f"{row['weight']:.2%}", _tokens(row["training_tokens"]),
          _tokens(row["available_tokens"]), "?" if row["epochs"] is None else f"{row['epochs']:.2f}"]
         for row in rows], text=(0, 1, 2))
    order = ["Each dataset:"] + [f"  {row['name']}: {_chain(row)}" for row in rows]
    whole = [f"  {number}. {step['section']}: {_call(step)}" for number, step in enumerate(plan["steps"], start=1)]
    order += ["Then the whole corpus:", *(whole or ["  nothing: it is taken as it is"])]
    method = plan["sampling"]
    order += [f"Weights by method {method['method']}: {method['formula']}",
              f"Held out for validation: {plan['validation']['ratio']:.2%} of the documents, by hash of the text"]
    sets = "\n".join(f"  {{'path': '{row['path']}', 'weight': {row['weight']:.6g}}}," for row in trainer_sets(plan))
    notes = "".join(f"\nnote: {note}" for note in _notes(plan))
    return (f"{metadata['phase']}: {metadata['description']}\n{', '.join(facts)}\n\n{table}\n\n"
            + "\n".join(order) + f"\n\nFor the trainer, packed with --per-dataset:\n"
            f"config.data.sets = [\n{sets}\n]\n{notes}\n"
            f"mixture {plan['mixture']['sha256'][:16]}, plan {plan['sha256'][:16]}")


def _where(row: dict[str, Any]) -> str:
    extra = [part for part in (row["subset"], row["data_dir"]) if part]
    splits = [] if row["splits"] == ["train"] else row["splits"]
    shown = row["source"][0] + (f" and {len(row['source']) - 1} more" if len(row["source"]) > 1 else "")
    return shown + (f" ({', '.join([*extra, *splits])})" if extra or splits else "")


def _tokens(count: float | None) -> str:
    return "?" if count is None else si(count)


def _call(item: dict[str, Any], key: str = "type") -> str:
    parts = ", ".join(f"{name} {value}" for name, value in item.items() if name not in (key, "section"))
    return f"{item[key]}({parts})"


def _chain(row: dict[str, Any]) -> str:
    steps = [_call(item) for item in row["filters"]]
    if row["sampling"]["rate"] < 1:
        steps.append(f"a sample of {row['sampling']['rate']:.1%}")
    if row["max_bytes"]:
        steps.append(f"at most {cards.size(row['max_bytes'])}")
    return " -> ".join([row["format"], *steps])


def _notes(plan: dict[str, Any]) -> Iterator[str]:
    for row in plan["datasets"]:
        if row["epochs"] is not None and row["epochs"] > GOOD_EPOCHS * 1.001:  # UniMax may ask for it exactly
            yield (f"{row['name']} is repeated {row['epochs']:.1f} times; beyond {GOOD_EPOCHS} epochs new text is "
                   "worth more. Lower its mix_ratio, or set sampling.max_epochs to make this an error.")
    unpinned = [row["name"] for row in plan["datasets"] if row["format"] == "huggingface" and not row["revision"]]
    if unpinned:
        yield f"without a revision, so a later run may get other text: {', '.join(unpinned)}."
    unlicensed = [row["name"] for row in plan["datasets"] if not row["licence"]]
    if unlicensed:
        yield f"no licence is stated for {', '.join(unlicensed)}."


@dataclasses.dataclass
class Count:
    """What came of the rows of one dataset."""

    rows: int = 0
    kept: int = 0
    turns: int = 0
    bytes: int = 0
    tokens: float = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Count a row that is not kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def count_rows(mixture: MixtureConfig, *, most: int | None = None, tokenizer: Tokenizer | None = None,
               progress: Progress | None = None) -> dict[str, Count]:
    """{dataset: Count} of the first `most` rows of each, filtered one document at a time.

    Whole-corpus steps are not done. Errors: DataError when a source cannot be read, or a dataset has no row left.
    """
    if most is not None and most < 1:
        raise DataError(f"--rows={most}: give 1 or more.")
    counts = {}
    for dataset in mixture.datasets:
        count = counts[dataset.name] = Count()
        seen: set[bytes] | None = set() if removes_duplicates(dataset) else None
        items = itertools.islice(read_all(open_source(dataset)), most)
        while slice_ := list(itertools.islice(items, JUDGED_AT_ONCE)):
            _count_slice(slice_, dataset, count, seen, tokenizer)
            if progress is not None:
                progress.update(dataset.name, None, f"{count.rows:,} rows")
        if count.rows != count.kept + sum(count.dropped.values()):
            raise DataError(f"dataset {dataset.name}: rows are lost. This is a bug; please report it.")
        if not count.kept:
            raise DataError(f"dataset {dataset.name}: none of {count.rows} rows is kept: {count.dropped or 'no rows'}. "
                            "Check format, rows, layout, fields and filters.")
    return counts


def _count_slice(items: list[Document | Bad], dataset: DatasetConfig, count: Count, seen: set[bytes] | None,
                 tokenizer: Tokenizer | None) -> None:
    count.rows += len(items)
    for item in items:
        if isinstance(item, Bad):
            count.drop(item.reason)
    kept = [item for item in items if isinstance(item, Document)]
    texts = [item.text for item in kept]
    for judge in dataset.built_filters:
        if not kept:
            return
        judged = judge.judge(make_batch(texts, [item.id for item in kept], [item.meta for item in kept]))
        texts = judged.text.to_list() if judged.text is not None else texts
        reasons = judged.reasons.to_list()
        for reason in reasons:
            if reason is not None:
                count.drop(reason)
        stays = [index for index, reason in enumerate(reasons) if reason is None]
        kept, texts = [kept[index] for index in stays], [texts[index] for index in stays]
    for item, text in zip(kept, texts, strict=True):
        encoded = text.encode()
        digest = text_digest(encoded)
        if seen is not None and digest in seen:
            count.drop("exact duplicate")
            continue
        if seen is not None:
            seen.add(digest)
        count.kept += 1
        count.turns += item.meta.get("turns", 0) if dataset.rows != "text" else 0
        count.bytes += len(encoded)
        count.tokens += len(tokenizer.encode(text)) if tokenizer is not None else len(encoded) / BYTES_PER_TOKEN


def counts_table(counts: dict[str, Count], measured: bool) -> str:
    """The counts as a table, and the reasons of what was dropped."""
    rows = [[name, f"{one.rows:,}", f"{one.kept:,}", f"{one.turns:,}", cards.size(one.bytes), f"{one.tokens:,.0f}"]
            for name, one in counts.items()]
    tokens = "tokens" if measured else f"tokens at {BYTES_PER_TOKEN:g} bytes"
    text = cards.table(["dataset", "rows in", "kept", "turns", "text", tokens], rows)
    drops = [[name, reason, f"{number:,}"] for name, one in counts.items() for reason, number in
             sorted(one.dropped.items(), key=lambda item: (-item[1], item[0]))]
    return text + ("\n\n" + cards.table(["dataset", "dropped because", "rows"], drops, text=(0, 1)) if drops else "")


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.mixture", formatter_class=Help,
                                     description=__doc__.split("\n")[0].partition(": ")[2].capitalize())
    parser.add_argument("action", choices=["plan", "count"], help="plan: read nothing but the file; count: read rows")
    parser.add_argument("mixture", help="mixture file (YAML)")
    parser.add_argument("--output", help="file to write the plan, or the counts, to as JSON")
    parser.add_argument("--rows", type=int, help="count: at most this many of each dataset")
    parser.add_argument("--tokenizer", help="count: directory of a tokenizer to count tokens with")
    arguments = parser.parse_args()
    result: dict[str, Any] = compile_plan(arguments.mixture)
    if arguments.action == "plan":
        print(describe(result))
    else:
        tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
        with Progress("count") as progress:
            counts = count_rows(load_mixture(arguments.mixture), most=arguments.rows, tokenizer=tokenizer,
                                progress=progress)
        print(counts_table(counts, tokenizer is not None))
        result = {"plan": result["sha256"], "counts": {name: dataclasses.asdict(one) for name, one in counts.items()}}
    if arguments.output:
        write_json(arguments.output, result)
        print(f"{arguments.action}: {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    command(_main)
