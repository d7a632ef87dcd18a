"""`python -m data_pipeline.corpus --config=MIX.yaml --output=DIR`: a mixture becomes a corpus.

Owns the order of the work: check everything, download (sources to raw shards), curate (filters, duplicates,
contamination), select, sample, and write the documents once, the manifest last. Every stage is made of parts named by
a hash of what decides them: a finished part is never made again, a stale one never used. The same inputs give the
same bytes, whatever was killed on the way and however many processes share the work.

DIR/shards and DIR/manifest.json are the corpus; DIR/decisions holds what every stage said of every row
(`data_pipeline.explain` reads it); DIR/.cache what a later run can use again: delete it when the disk is needed.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data_pipeline.curation import cards, corpus_format
from data_pipeline.curation.account import Counts
from data_pipeline.curation.corpus_run import CACHE, Plan, Run
from data_pipeline.curation.sampling import sample
from data_pipeline.engine.progress import Progress
from data_pipeline.engine.stage import command, disk_full_explained, finished, require_own
from data_pipeline.engine.tasks import Executor
from data_pipeline.engine.workers import ENGINES, open_executor
from data_pipeline.mixture import plan_of
from data_pipeline.mixtures.load import load_mixture
from data_pipeline.mixtures.schema import MixtureConfig
from nanollama.data.files import DataError, Lock, write_json

PLAN = "plan.json"  # of the mixture, written before anything is read
STEPS = ("download", "curate", "select", "sample", "full")
MADE = (corpus_format.SHARDS, corpus_format.DECISIONS, CACHE, corpus_format.CARD, corpus_format.DROPPED)
SMALL_BYTES = 50_000_000  # below, starting worker processes takes longer than they save


def build_corpus(config: str | os.PathLike[str],
                 output: str | os.PathLike[str] | None,
                 *,
                 step: str = "full",
                 analyze_only: bool = False,
                 limit_mb: float | None = None,
                 workers: int | None = None,
                 engine: str = "local",
                 shard_format: str = "jsonl") -> dict[str, Any]:
    """Make the corpus of the mixture file `config` in `output`; returns its manifest.

    `step` stops after that one (the manifest returned then has no shards, and none is written). `analyze_only` reads
    and counts all in a temporary folder, and leaves nothing: `output` may be None. `limit_mb` takes only the first
    megabytes of each dataset, for a quick look. `workers` defaults to the processors, or to one for little text.
    `shard_format`: one of corpus_format.FORMATS. Errors: MixtureError, DataError.
    """
    if step not in STEPS:
        raise DataError(f"--step={step}: known are {', '.join(STEPS)}.")
    if engine not in ENGINES:
        raise DataError(f"--engine={engine}: known are {', '.join(ENGINES)}.")
    if shard_format not in corpus_format.FORMATS:
        raise DataError(f"--format={shard_format}: known are {', '.join(corpus_format.FORMATS)}.")
    if workers is not None and workers < 1:
        raise DataError(f"--workers={workers}: give 1 or more.")
    mixture = load_mixture(config)
    if limit_mb is not None:
        mixture = _limited(mixture, limit_mb)
    if output is None and not analyze_only:
        raise DataError("--output is missing: give the corpus directory to make, or --analyze-only.")
    with contextlib.ExitStack() as stack:
        if workers is None:
            plan = Plan.of(mixture, Path(config).name, shard_format)
            executor = stack.enter_context(open_executor(engine, _workers(plan, engine)))
        else:  # they start up while this process plans
            executor = stack.enter_context(open_executor(engine, workers, soon=len(mixture.datasets)))
            plan = Plan.of(mixture, Path(config).name, shard_format)
        if output is None or analyze_only:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="nanollama-analyze-"))
            more = "Set TMPDIR to a folder with more room, or give --limit-mb."
            stack.enter_context(disk_full_explained(Path(temporary), more))
            return _build(plan, Path(temporary), "sample", executor)
        output = Path(output)
        stack.enter_context(Lock(output))
        stack.enter_context(disk_full_explained(output))
        require_own(output, corpus_format.MANIFEST, "corpus", PLAN, MADE)
        if step == "full":
            done = finished(output, corpus_format.MANIFEST, plan.head["fingerprint"],
                            lambda manifest: [*manifest["shards"], manifest["dropped"], manifest["decisions"]])
            if done is not None:
                print(f"{output}: up to date, nothing to do", file=sys.stderr)
                return done
        write_json(output / PLAN, plan_of(mixture, Path(config).name))
        return _build(plan, output, step, executor)


def _workers(plan: Plan, engine: str) -> int:
    little = sum(row["bytes"] for row in plan.inputs) < SMALL_BYTES
    return 1 if little and engine == "local" else len(os.sched_getaffinity(0))


def _limited(mixture: MixtureConfig, limit_mb: float) -> MixtureConfig:
    if not 0 < limit_mb < math.inf:
        raise DataError(f"--limit-mb={limit_mb}: give a number above 0.")
    limit = int(limit_mb * 1e6)
    return dataclasses.replace(mixture, datasets=tuple(
        dataclasses.replace(dataset, max_bytes=min(limit, dataset.max_bytes or limit), cap_order="head")
        for dataset in mixture.datasets))


def _build(plan: Plan, output: Path, step: str, executor: Executor) -> dict[str, Any]:
    with Progress("corpus") as progress:
        run = Run(plan, output, executor, progress)
        shards = run.download() if step == "download" else run.curate()
        if step in ("select", "sample", "full"):
            shards = run.steps(shards, ("selection",))
            run.account(shards)
        if step in ("sample", "full"):
            shards = sample(shards, plan.mixture.datasets, run.decisions)
        counts = run.account(shards)
        outputs = run.sizes(shards, counts)
        manifest = {**plan.head, "datasets": _dataset_rows(plan, counts), "shards": []}
        return run.finish(shards, outputs, manifest) if step == "full" else manifest


def _dataset_rows(plan: Plan, counts: list[Counts]) -> list[dict[str, Any]]:
    return [{"name": dataset.name, "mix_ratio": dataset.mix_ratio, "rows_in": own.rows_in, "kept": own.kept,
             "bytes": own.bytes, "characters": own.characters, "dropped": own.dropped, "inputs": row,
             "stages": [dataclasses.asdict(stage) for stage in own.stages]}
            for dataset, own, row in zip(plan.mixture.datasets, counts, plan.inputs, strict=True)]


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.corpus", description="Make the corpus that a "
                                     "mixture file describes. What is done is not done again.")
    parser.add_argument("--config", required=True, help="mixture file (YAML)")
    parser.add_argument("--output", help="corpus directory to make; not needed with --analyze-only")
    parser.add_argument("--step", choices=STEPS, default="full",
                        help="go as far as this step: what is done already is not done again")
    parser.add_argument("--analyze-only",
                        action="store_true",
                        help="read and count everything in a temporary folder (TMPDIR), leave nothing")
    parser.add_argument("--limit-mb", type=float, help="only the first megabytes of each dataset")
    parser.add_argument("--workers", type=int, help="processes; default: the processors, one for little text")
    parser.add_argument("--engine", choices=ENGINES, default="local",
                        help="local processes, or the tasks of a Ray cluster (RAY_ADDRESS, or one started here)")
    parser.add_argument("--format", choices=corpus_format.FORMATS, default="jsonl",
                        help="of the corpus's shards: JSON lines, or Parquet with meta as JSON")
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.analyze_only:  # SIGTERM ends it as an error would: the temporary folder goes
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    manifest = build_corpus(arguments.config, arguments.output, step=arguments.step,
                            analyze_only=arguments.analyze_only, limit_mb=arguments.limit_mb,
                            workers=arguments.workers, engine=arguments.engine,
                            shard_format=arguments.format)
    print(cards.corpus_table(manifest))
    if any(row["dropped"] for row in manifest["datasets"]):
        print("\n" + cards.drops_table(manifest))
    for row in manifest["datasets"]:
        if not row["kept"]:
            print(f"\nnote: nothing is left of {row['name']}, which has {row['mix_ratio']:.1%} of the weights",
                  file=sys.stderr)
    seconds = time.monotonic() - start
    where = arguments.output if arguments.step == "full" else f"{arguments.output} up to {arguments.step}"
    where = "nothing written (--analyze-only)" if arguments.analyze_only else where
    total = cards.size(sum(row["bytes"] for row in manifest["datasets"]))
    print(f"\ncorpus: {where}, {total} in {seconds:.1f} s")


if __name__ == "__main__":
    command(_main)
