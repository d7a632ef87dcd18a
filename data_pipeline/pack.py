"""`python -m data_pipeline.pack --corpus=DIR --tokenizer=DIR --output=DIR --record-length=N`: pack a corpus.

Owns the order of the work: tokenize shards, split by document and plan the records, write files, read everything back
and compare, put in place with the manifest last. All but the plan is done in processes; a finished shard or file is not
made again after a kill. The same inputs give the same bytes for any number of workers.
"""

import argparse
import dataclasses
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.curation import cards
from data_pipeline.curation.corpus_format import read_manifest
from data_pipeline.engine.progress import Progress
from data_pipeline.engine.stage import (
    WORK,
    code_version,
    command,
    disk_full_explained,
    finished,
    require_own,
    require_space,
    work_directory,
)
from data_pipeline.engine.tasks import Executor
from data_pipeline.engine.workers import LocalExecutor
from data_pipeline.mixtures.load import RATIO_SLACK
from data_pipeline.packing import pack_card
from data_pipeline.packing.files import FileTask, check_records, check_tasks, write_file
from data_pipeline.packing.phases import Phase, phases_of
from data_pipeline.packing.records import (
    SPLITS,
    WINDOW_DOCUMENTS,
    Documents,
    TableTask,
    load_documents,
    plan_split,
    table_task,
    write_table,
)
from data_pipeline.packing.tokens import ShardTask, token_dtype, tokenize_shard
from nanollama.data.files import DataError, Lock, sha256_json, write_atomic, write_json
from nanollama.data.packed import DOCUMENTS_FILE, MANIFEST_FILE, SCHEMA_VERSION, dataset_id
from nanollama.data.strict import nearest
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer

STAGE_VERSION = 4  # raise it when the same inputs would give other bytes
CARD_FILE = "DATA_CARD.md"
LONGEST_RECORD = 65_536


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Everything besides corpus and tokenizer that decides a packed set's bytes."""

    record_length: int
    validation_fraction: float
    seed: int

    def check(self) -> None:
        """Raises DataError on values that cannot work."""
        if not 8 <= self.record_length <= LONGEST_RECORD:
            raise DataError(f"--record-length={self.record_length}: give 8 to {LONGEST_RECORD}.")
        if not 0 <= self.validation_fraction < 1:
            raise DataError(
                f"--validation-fraction={self.validation_fraction}: give a number in [0, 1), such as 0.02.")


def build_packed(corpus: str | os.PathLike[str],
                 tokenizer: str | os.PathLike[str],
                 output: str | os.PathLike[str],
                 *,
                 record_length: int,
                 validation_fraction: float | None = None,
                 seed: int | None = None,
                 workers: int = 1,
                 dataset: str | None = None,
                 phase: Phase | None = None) -> dict[str, Any]:
    """Pack `corpus` with `tokenizer` into `output`; returns the set's manifest.

    `validation_fraction` and `seed` default to the mixture's `validation`. `dataset`: only this one of the
    corpus's datasets; sets of one dataset each are what the trainer can weigh. `phase`: only the documents of this one.
    Errors: DataError.
    """
    if workers < 1:
        raise DataError(f"--workers={workers}: give 1 or more.")
    corpus_manifest, corpus_sha256 = read_manifest(corpus)
    if dataset is not None:
        corpus_manifest = _only(corpus_manifest, dataset, corpus)
    if phase is not None:
        corpus_manifest = phase.part_of(corpus_manifest)
    frozen = load_tokenizer(tokenizer)
    validation = corpus_manifest["mixture"]["config"]["validation"]
    config = PackConfig(record_length,
                        validation["ratio"] if validation_fraction is None else validation_fraction,
                        validation["seed"] if seed is None else seed)
    config.check()
    output = Path(output)
    fingerprint = sha256_json({"stage": "pack", "version": STAGE_VERSION, "corpus": corpus_sha256,
                               "tokenizer": frozen.sha256, "config": dataclasses.asdict(config),
                               **({} if dataset is None else {"dataset": dataset}),
                               **({} if phase is None else {"phase": phase.number})})
    with Lock(output), disk_full_explained(output):
        require_own(output, MANIFEST_FILE, "packed", WORK, ("*.array_record", DOCUMENTS_FILE, CARD_FILE))
        done = finished(output, MANIFEST_FILE, fingerprint, lambda manifest: manifest["files"])
        if done is not None:
            print(f"{output}: up to date, nothing to do", file=sys.stderr)
            return done
        text_bytes = sum(row["bytes"] for row in corpus_manifest["datasets"])
        item = token_dtype(frozen.vocab_size).itemsize
        require_space(output, int(0.8 * item * text_bytes),
                      "packing")  # tokens and records, at 2.5 bytes a token or more
        work = work_directory(output, fingerprint)
        head: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION, "kind": "packed", "dataset_id": "", "fingerprint": fingerprint,
            "code": code_version(), "tokenizer": {
                name: getattr(frozen, name)
                for name in ("sha256", "normalized_sha256", "vocab_size", "bos_id", "eos_id", "pad_id")
            }, "corpus": {"path": os.path.relpath(corpus, output), "manifest_sha256": corpus_sha256}
        }
        manifest = _build(head, corpus, corpus_manifest, frozen, config, work, workers,
                          None if phase is None else phase.number)
        _put_in_place(output, work, manifest)
        return manifest


def pack_datasets(corpus: str | os.PathLike[str], tokenizer: str | os.PathLike[str],
                  output: str | os.PathLike[str], **options: Any) -> dict[str, dict[str, Any]]:
    """{dataset: manifest} of one packed set per dataset of `corpus`, in `output`/NAME. Options: `build_packed`'s."""
    rows = read_manifest(corpus)[0]["datasets"]
    return {row["name"]: build_packed(corpus, tokenizer, Path(output) / row["name"], dataset=row["name"], **options)
            for row in rows if row["kept"]}


def pack_phases(corpus: str | os.PathLike[str], tokenizer: str | os.PathLike[str], output: str | os.PathLike[str],
                *, per_dataset: bool = False, **options: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """{phase-N: {part: manifest}} of a packed set for each phase of `corpus` that has documents, in `output`/phase-N;
    with `per_dataset` of one for each of its datasets, in `output`/phase-N/NAME. Options: `build_packed`'s."""
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for phase in phases_of(corpus):
        datasets = [dataset for dataset, count in phase.documents.items() if count]
        if datasets:
            name, parts = f"phase-{phase.number}", datasets if per_dataset else [""]
            made[name] = {part: build_packed(corpus, tokenizer, Path(output) / name / part, dataset=part or None,
                                             phase=phase, **options) for part in parts}
    return made


def _only(manifest: dict[str, Any], dataset: str, corpus: str | os.PathLike[str]) -> dict[str, Any]:
    """The corpus manifest as if the corpus were this dataset alone."""
    rows = [row for row in manifest["datasets"] if row["name"] == dataset]
    if not rows:
        raise DataError(f"{corpus}: has no dataset {dataset!r}. "
                        f"{nearest(dataset, [row['name'] for row in manifest['datasets']])}")
    return {**manifest, "datasets": rows,
            "shards": [shard for shard in manifest["shards"] if shard["dataset"] == dataset]}


def _build(head: dict[str, Any], corpus: str | os.PathLike[str], corpus_manifest: dict[str, Any],
           tokenizer: Tokenizer, config: PackConfig, work: Path, workers: int, phase: int | None) -> dict[str, Any]:
    """Everything up to the manifest, in `work`."""
    sources = [row["name"] for row in corpus_manifest["datasets"]]
    for name in ("tokens", "recipes", "set"):
        (work / name).mkdir(exist_ok=True)
    tasks = [
        ShardTask(os.fspath(corpus), shard, tuple(sources), os.fspath(tokenizer.directory), tokenizer.sha256,
                  config.seed, str(work / "tokens" / f"{index:05d}"), phase)
        for index, shard in enumerate(corpus_manifest["shards"])
    ]
    with Progress("pack") as progress, LocalExecutor(workers, soon=len(tasks)) as executor:
        _tokenize(tasks, executor, progress)
        documents = load_documents(tasks, config.validation_fraction)
        _check_split_sizes(documents, config)
        dtype = token_dtype(tokenizer.vocab_size)
        planned = {split: plan_split(split, documents, tasks, dtype, config.record_length, work) for split in SPLITS}
        table = table_task(documents, tasks, sources, work)
        rows = _write([*(file for split in SPLITS for file in planned[split]), table], executor, progress)
        splits = {split: _checked(split, planned[split], documents, config, executor, progress) for split in SPLITS}
    account = {row["name"]: {"rows_in": row["rows_in"], "kept": row["kept"], "dropped": row["dropped"]}
            for row in corpus_manifest["datasets"]}
    if sum(row["kept"] for row in account.values()) != len(documents.tokens):
        raise DataError(f"{corpus}: {len(documents.tokens)} documents, the manifest says "
                        f"{sum(row['kept'] for row in account.values())}. Make the corpus again.")
    manifest = {
        **head, "record_length": config.record_length, "splits": splits, "sources": sources,
        "weights": {row["name"]: row["mix_ratio"] for row in corpus_manifest["datasets"]},
        "source_counts": {split: _source_counts(split, documents, sources) for split in SPLITS},
        "files": rows, "seed": config.seed, "validation_fraction": config.validation_fraction, "packing": {
            "method": "best-fit-decreasing, long documents chained", "window_documents": WINDOW_DOCUMENTS
        }, "rows": account, "mixture": corpus_manifest["mixture"]
    }
    manifest["dataset_id"] = dataset_id(manifest)
    return manifest


def _tokenize(tasks: list[ShardTask], executor: Executor, progress: Progress) -> None:
    total = sum(task.shard["documents"] for task in tasks)
    documents = tokens = 0
    for _, (more_documents, more_tokens) in executor.run(tokenize_shard, tasks):
        documents, tokens = documents + more_documents, tokens + more_tokens
        progress.update("tokenizing",
                        documents / max(total, 1),
                        f"{tokens / 1e6:.2f} M tokens",
                        force=documents == total)


def _check_split_sizes(documents: Documents, config: PackConfig) -> None:
    if documents.validation.all():
        raise DataError(
            f"all {len(documents.tokens)} documents fall into the validation split. Lower --validation-fraction "
            f"(it is {config.validation_fraction}; 0 holds nothing out), change --seed, or add documents.")


def _write(tasks: list[FileTask | TableTask], executor: Executor, progress: Progress) -> list[dict[str, Any]]:
    """The files' rows for the manifest, in the order of `tasks`."""
    rows: dict[int, dict[str, Any]] = {}
    total, done = sum(task.weight for task in tasks), 0
    for number, row in executor.run(_write_one, tasks):
        rows[number] = row
        done += tasks[number].weight
        progress.update("packing", done / max(total, 1), f"{done / 1e6:.2f} M tokens", force=len(rows) == len(tasks))
    return [rows[number] for number in range(len(tasks))]


def _write_one(task: FileTask | TableTask) -> dict[str, Any]:
    return write_file(task) if isinstance(task, FileTask) else write_table(task)


def _checked(split: str, files: list[FileTask], documents: Documents, config: PackConfig, executor: Executor,
             progress: Progress) -> dict[str, int]:
    """The account of a split, whose records are all read back."""
    tasks = [task for file in files for task in check_tasks(file)]
    chosen = documents.validation == (split == "validation")
    total, tokens = int(documents.tokens[chosen].sum()), 0
    for _, more in executor.run(check_records, tasks):
        tokens += more
        progress.update(f"checking {split}", tokens / max(total, 1), f"{tokens / 1e6:.2f} M tokens")
    if tokens != total:
        raise DataError(f"{split}: {total:,} tokens in, {tokens:,} in records. This is a bug; please report it.")
    records = sum(file.records for file in files)
    return {"records": records, "tokens": tokens, "padding": records * config.record_length - tokens,
            "documents": int(chosen.sum()), "bytes_of_text": int(documents.bytes[chosen].sum())}


def _source_counts(split: str, documents: Documents, sources: list[str]) -> dict[str, dict[str, int]]:
    counts = {}
    for index, source in enumerate(sources):
        rows = np.flatnonzero((documents.sources == index)
                              & (documents.validation == (split == "validation")))
        counts[source] = {
            "documents": len(rows), "tokens": int(documents.tokens[rows].sum()),
            "bytes": int(documents.bytes[rows].sum()), "characters": int(documents.characters[rows].sum())
        }
    return counts


def _put_in_place(output: Path, work: Path, manifest: dict[str, Any]) -> None:
    """Move the finished set into `output`, the manifest last. The earlier set stays whole until here."""
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    for old in [*output.glob("*.array_record"), output / DOCUMENTS_FILE, output / CARD_FILE]:
        old.unlink(missing_ok=True)
    for row in manifest["files"]:
        os.replace(work / "set" / row["path"], output / row["path"])
    write_atomic(output / CARD_FILE, pack_card.card(manifest))
    write_json(output / MANIFEST_FILE, manifest)
    shutil.rmtree(output / WORK, ignore_errors=True)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.pack",
                                     description="Tokenize a corpus and pack it.")
    parser.add_argument("--corpus", required=True, help="directory made by data_pipeline.corpus")
    parser.add_argument("--tokenizer", required=True, help="directory made by data_pipeline.tokenizer")
    parser.add_argument("--output", required=True, help="packed set to make")
    parser.add_argument("--record-length", type=int, required=True,
                        help="tokens in a record; sequences are this long or a multiple of it")
    parser.add_argument("--validation-fraction", type=float, help="default: the mixture's validation.ratio")
    parser.add_argument("--seed", type=int, help="of the split; default: the mixture's validation.seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--per-dataset", action="store_true",
                        help="one packed set for each dataset, in OUTPUT/NAME: what the trainer mixes by weight")
    parser.add_argument("--per-phase", action="store_true",
                        help="one packed set (or one for each dataset) for each phase of a curriculum, in "
                        "OUTPUT/phase-N: to be trained on one after the other")
    arguments = parser.parse_args()
    start = time.monotonic()
    options = {"record_length": arguments.record_length, "validation_fraction": arguments.validation_fraction,
               "seed": arguments.seed, "workers": arguments.workers}
    if arguments.per_phase:
        phases = pack_phases(arguments.corpus, arguments.tokenizer, arguments.output,
                             per_dataset=arguments.per_dataset, **options)
        for name, sets in phases.items():
            print(f"\n{name}\n")
            _print_sets(str(Path(arguments.output) / name), sets)
        print("\nTrain on the phases in this order, each run with the last one's as config.initial_checkpoint.")
    elif arguments.per_dataset:
        manifests = pack_datasets(arguments.corpus, arguments.tokenizer, arguments.output, **options)
        _print_sets(arguments.output, manifests)
    else:
        manifest = build_packed(arguments.corpus, arguments.tokenizer, arguments.output, **options)
        print(pack_card.splits_table(manifest))
        disk = sum(row["bytes"] for row in manifest["files"])
        print(f"\npack: {arguments.output}, {cards.size(disk)} on disk, dataset_id {manifest['dataset_id'][:16]}, "
              f"{time.monotonic() - start:.1f} s")


def _print_sets(output: str, manifests: dict[str, dict[str, Any]]) -> None:
    """A table of the sets, and what the trainer's config says to use them in the mixture's proportion."""
    weights = {name: math.fsum(manifest["weights"].values()) for name, manifest in manifests.items()}
    print(cards.table(
        ["packed set", "documents", "tokens", "records", "weight"],
        [[name or "all", *(f"{manifest['splits']['train'][key]:,}" for key in ("documents", "tokens", "records")),
          f"{weights[name]:.2%}"] for name, manifest in manifests.items()]))
    if (missing := 1 - math.fsum(weights.values())) > RATIO_SLACK:
        print(f"\n{missing:.2%} of the mixture is datasets that kept nothing; the others share it in their proportion.")
    print("\nconfig.data.sets = [")
    for name, weight in weights.items():
        print(f"  {{'path': '{Path(output) / name}', 'weight': {weight:.6g}}},")
    print("]")


if __name__ == "__main__":
    command(_main)
