"""`python -m data_pipeline.corpus --config=MIX.yaml --output=DIR`: a mixture becomes JSONL shards.

Owns the order of the work: check everything, read each dataset once (a finished dataset is not read again
after a kill), put the result in place with the manifest last. The same inputs give the same bytes.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline import cards, corpus_format
from data_pipeline.config import DatasetConfig, MixtureConfig, load_mixture, mixture_mapping
from data_pipeline.corpus_format import ShardWriter
from data_pipeline.documents import Bad
from data_pipeline.progress import Progress
from data_pipeline.selection import OVER_CAP, Counts, Dropped, Kept, select
from data_pipeline.sources import Source, open_source
from data_pipeline.stage import WORK, code_version, command, disk_full_explained, finished, work_directory
from nanollama.data.files import (
    DataError,
    Lock,
    read_json,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
)

STAGE_VERSION = 1  # raise it when the same inputs would give other bytes
LISTED_INPUTS = 100  # a manifest names the inputs one by one up to this many
SHOWN_DROPS = 5  # bad rows printed per dataset; all are in dropped.jsonl


def build_corpus(config: str | os.PathLike[str],
                 output: str | os.PathLike[str],
                 *,
                 analyze_only: bool = False,
                 limit_mb: float | None = None) -> dict[str, Any]:
    """Make the corpus of the mixture file `config` in `output`; returns its manifest.

    `analyze_only` reads and counts all, and writes nothing. `limit_mb` takes only the first megabytes of each
    dataset, for a quick look. Errors: MixtureError, DataError.
    """
    mixture = load_mixture(config)
    if limit_mb is not None:
        mixture = _limited(mixture, limit_mb)
    sources = [open_source(dataset) for dataset in mixture.datasets]
    inputs = [_inputs(source) for source in sources]
    head: dict[str, Any] = {
        "schema_version": corpus_format.SCHEMA_VERSION, "kind": "corpus", "fingerprint": "", "mixture": {
            "file": Path(config).name, "sha256": sha256_json(mixture_mapping(mixture)),
            "config": mixture_mapping(mixture)
        }, "code": code_version(), "python": platform.python_version()
    }
    head["fingerprint"] = sha256_json({
        "stage": "corpus", "version": STAGE_VERSION, "mixture": head["mixture"]["sha256"],
        "inputs": [row["sha256"] for row in inputs]
    })
    if analyze_only:
        return _analyze(mixture, sources, inputs, head)
    output = Path(output)
    with Lock(output), disk_full_explained(output):
        done = finished(output, corpus_format.MANIFEST, head["fingerprint"],
                        lambda manifest: [*manifest["shards"], manifest["dropped"]])
        if done is not None:
            print(f"{output}: up to date, nothing to do", file=sys.stderr)
            return done
        work = work_directory(output, head["fingerprint"])
        parts = _build_parts(mixture, sources, work)
        return _put_in_place(output, work, head, mixture, inputs, parts)


def _limited(mixture: MixtureConfig, limit_mb: float) -> MixtureConfig:
    if limit_mb <= 0:
        raise DataError(f"--limit-mb={limit_mb}: give a number above 0.")
    limit = int(limit_mb * 1e6)
    return dataclasses.replace(mixture, datasets=tuple(
        dataclasses.replace(dataset, max_bytes=min(limit, dataset.max_bytes or limit), cap_order="head")
        for dataset in mixture.datasets))


def _inputs(source: Source) -> dict[str, Any]:
    rows = source.inputs()
    digest = sha256_json([[row.path, row.bytes, row.sha256] for row in rows])
    result = {"count": len(rows), "bytes": sum(row.bytes for row in rows), "sha256": digest}
    if len(rows) <= LISTED_INPUTS:
        result["files"] = [dataclasses.asdict(row) for row in rows]
    return result


def _build_parts(mixture: MixtureConfig, sources: list[Source], work: Path) -> list[dict[str, Any]]:
    """The shards of every dataset in `work`; a dataset whose marker is there is taken as it is."""
    if not (work / corpus_format.SHARDS).exists():
        shutil.rmtree(work / "state", ignore_errors=True)  # markers without shards: killed while moving them
    parts: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    first = 0
    with Progress("corpus") as progress:
        for index, (dataset, source) in enumerate(zip(mixture.datasets, sources, strict=True)):
            marker = work / "state" / f"{index:03d}.json"
            if marker.exists():
                digests = marker.with_suffix(".digests").read_bytes()
                seen.update(digests[at:at + 16] for at in range(0, len(digests), 16))
                part = read_json(marker)
            else:
                part = _build_part(dataset, source, seen, work, first, marker, progress)
            parts.append(part)
            first += len(part["shards"])
    return parts


def _build_part(dataset: DatasetConfig, source: Source, seen: set[bytes], work: Path, first: int,
                marker: Path, progress: Progress) -> dict[str, Any]:
    writer = ShardWriter(work / corpus_format.SHARDS, first, dataset.name)
    dropped_path = marker.with_suffix(".dropped")
    marker.parent.mkdir(parents=True, exist_ok=True)
    digests = bytearray()
    counts = Counts()
    with open(dropped_path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as dropped:
        for item in _counted(dataset, source, seen, counts, progress):
            if isinstance(item, Kept):
                writer.write(item.document)
                digests += item.digest
            elif item.reason != OVER_CAP:
                dropped.write(
                    json.dumps(
                        {
                            "dataset": dataset.name, "place": item.place.recorded, "reason": item.reason,
                            "detail": item.detail, "id": item.id
                        },
                        ensure_ascii=False) + "\n")
    writer.finish()
    write_atomic(marker.with_suffix(".digests"), bytes(digests))
    part = {**dataclasses.asdict(counts), "shards": [dataclasses.asdict(shard) for shard in writer.shards]}
    write_json(marker, part)
    return part


def _counted(dataset: DatasetConfig, source: Source, seen: set[bytes], counts: Counts,
             progress: Progress) -> Any:
    """The selection's items, counted, checked at the end, with progress and the first bad rows shown."""
    shown = 0
    for item in select(dataset, source, seen, counts):
        counts.add(item)
        if isinstance(item, Dropped) and item.id is None:
            shown += 1
            if shown <= SHOWN_DROPS:
                bad = Bad(item.place, item.reason, item.detail)
                print(f"{dataset.name}: skipped {bad}", file=sys.stderr)
        share = min(1.0, source.bytes_read / source.total_bytes) if source.total_bytes else None
        progress.update(dataset.name, share, f"{counts.kept:,} documents, {cards.size(counts.bytes)}")
        yield item
    if shown > SHOWN_DROPS:
        print(f"{dataset.name}: {shown:,} bad rows skipped in all, see {corpus_format.DROPPED}",
              file=sys.stderr)
    counts.check(dataset)
    progress.update(dataset.name, 1.0, f"{counts.kept:,} documents, {cards.size(counts.bytes)}", force=True)


def _put_in_place(output: Path, work: Path, head: dict[str, Any], mixture: MixtureConfig,
                  inputs: list[dict[str, Any]], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Move the finished shards into `output`, the manifest last. The earlier corpus is whole until here."""
    manifest = _manifest(head, mixture, inputs, parts)
    if sum(row["kept"] for row in manifest["datasets"]) == 0:
        raise DataError(
            f"{output}: the corpus is empty: no document of any dataset was kept.\n"
            f"{cards.drops_table(manifest)}\nCheck text_field, format and filters of the mixture.")
    dropped = b"".join((work / "state" / f"{index:03d}.dropped").read_bytes() for index in range(len(parts)))
    (output / corpus_format.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(output / corpus_format.SHARDS, ignore_errors=True)
    os.replace(work / corpus_format.SHARDS, output / corpus_format.SHARDS)
    write_atomic(output / corpus_format.DROPPED, dropped)
    manifest["dropped"] = {"path": corpus_format.DROPPED, "rows": dropped.count(b"\n"),
                           "sha256": sha256_file(output / corpus_format.DROPPED)}
    write_atomic(output / corpus_format.CARD, cards.corpus_card(manifest))
    write_json(output / corpus_format.MANIFEST, manifest)
    shutil.rmtree(output / WORK, ignore_errors=True)
    return manifest


def _manifest(head: dict[str, Any], mixture: MixtureConfig, inputs: list[dict[str, Any]],
              parts: list[dict[str, Any]]) -> dict[str, Any]:
    datasets = []
    for dataset, row, part in zip(mixture.datasets, inputs, parts, strict=True):
        counts = {key: part[key] for key in ("rows_in", "kept", "bytes", "characters", "dropped")}
        datasets.append({"name": dataset.name, "mix_ratio": dataset.mix_ratio, **counts, "inputs": row})
    return {**head, "datasets": datasets, "shards": [shard for part in parts for shard in part["shards"]]}


def _analyze(mixture: MixtureConfig, sources: list[Source], inputs: list[dict[str, Any]],
             head: dict[str, Any]) -> dict[str, Any]:
    seen: set[bytes] = set()
    parts = []
    with Progress("analyze") as progress:
        for dataset, source in zip(mixture.datasets, sources, strict=True):
            counts = Counts()
            for _ in _counted(dataset, source, seen, counts, progress):
                pass
            parts.append({**dataclasses.asdict(counts), "shards": []})
    return _manifest(head, mixture, inputs, parts)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.corpus",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="mixture file (YAML)")
    parser.add_argument("--output", required=True, help="corpus directory to make")
    parser.add_argument("--analyze-only",
                        action="store_true",
                        help="read and count everything, write nothing")
    parser.add_argument("--limit-mb", type=float, help="only the first megabytes of each dataset")
    arguments = parser.parse_args()
    start = time.monotonic()
    manifest = build_corpus(arguments.config, arguments.output, analyze_only=arguments.analyze_only,
                            limit_mb=arguments.limit_mb)
    print(cards.corpus_table(manifest))
    if any(row["dropped"] for row in manifest["datasets"]):
        print("\n" + cards.drops_table(manifest))
    seconds = time.monotonic() - start
    where = "nothing written (--analyze-only)" if arguments.analyze_only else arguments.output
    total = cards.size(sum(row["bytes"] for row in manifest["datasets"]))
    print(f"\ncorpus: {where}, {total} in {seconds:.1f} s")


if __name__ == "__main__":
    command(_main)
