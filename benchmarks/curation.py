"""Megabytes of text per second of one core that whole-corpus curation handles: `python benchmarks/curation.py`.

From text to features, per step and for MinHash and 13-grams in one pass (the words are hashed once), then what the
decision over all features costs. Text: the standard library's sources, or JSONL files with --data (`text` fields, plain
or .gz). Counted in processor time of all threads. datatrove's MinHash signatures are measured beside it on the same
texts when `--peer` names a Python that can import it. Writes benchmarks/results/curation.json.
"""

import argparse
import glob
import gzip
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["POLARS_MAX_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as pq

from benchmarks.machine import machine
from data_pipeline.decontaminate.evaluation_sets import Item
from data_pipeline.decontaminate.index import Index
from data_pipeline.decontaminate.step import Decontamination
from data_pipeline.dedup.exact import ExactDeduplication
from data_pipeline.dedup.minhash import MinHashDeduplication
from data_pipeline.dedup.simhash import SimHashDeduplication
from data_pipeline.filters.base import Batch, make_batch
from data_pipeline.filters.corpus_step import CorpusStep, FeatureFile, documents_table
from data_pipeline.select.dsir import ImportanceResampling

ROOT = Path(__file__).resolve().parents[1]
GOAL = 15  # MB per second and core, MinHash and 13-grams in one pass
RESULTS = ROOT / "benchmarks" / "results" / "curation.json"
BATCH = 500  # documents
PACKAGES = ("numpy", "polars", "pyarrow", "rensa")


def texts_of(patterns: list[str], megabytes: float) -> list[str]:
    """Documents of the files, evenly from all of them, or of the standard library."""
    if not patterns:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
        found = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    else:
        found = []
        for name in sorted(name for pattern in patterns for name in glob.glob(pattern)):
            with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as file:
                found += [text for line in file if isinstance(text := json.loads(line).get("text"), str)]
    random.Random(0).shuffle(found)
    total, taken = 0, []
    for text in found:
        total += len(text.encode())
        taken.append(text)
        if total > megabytes * 1e6:
            break
    return taken


def items_of(texts: list[str], count: int) -> list[Item]:
    """Evaluation items: pieces of 15 to 120 words of texts that are not measured."""
    dice, items = random.Random(1), []
    words = [text.split() for text in texts]
    for number in range(count):
        source = words[number % len(words)]
        start, length = dice.randrange(max(1, len(source))), dice.randrange(15, 120)
        items.append(Item(f"made/{number}", "text", " ".join(source[start:start + length])))
    return items


def measure(batches: list[Batch], run: Callable[[Batch], object], rounds: int) -> float:
    """Best megabytes per second of processor time over `rounds` passes through fresh batches."""
    size = sum(batch.text.str.len_bytes().sum() for batch in batches) / 1e6
    best = 0.0
    for _ in range(rounds):
        seconds = 0.0
        for batch in batches:
            fresh = Batch(batch.ids, batch.text, batch.meta)
            start = time.process_time()
            run(fresh)
            seconds += time.process_time() - start
        best = max(best, size / seconds)
    return best


def measure_features(batches: list[Batch], index: Index, rounds: int) -> dict[str, float]:
    minhash = MinHashDeduplication()
    steps: dict[str, Callable[[Batch], object]] = {
        "words hashed": lambda batch: batch.words,
        "exact digests": ExactDeduplication().features,
        "MinHash": minhash.features,
        "SimHash": SimHashDeduplication().features,
        "13-grams and near items": lambda batch: list(index.search(batch.words)),
        "DSIR, shared words": ImportanceResampling(target=("x",)).features,
        "DSIR, sha256 (parity)": ImportanceResampling(target=("x",), hashing="sha256").features,
        "MinHash + 13-grams, one pass": lambda batch: (minhash.features(batch), list(index.search(batch.words))),
    }
    return {name: measure(batches, run, rounds) for name, run in steps.items()}


def measure_resolve(batches: list[Batch], step: CorpusStep) -> dict[str, Any]:
    """Megabytes of text per second that the decision over all shards takes, and what it drops."""
    with tempfile.TemporaryDirectory() as directory:
        files = []
        for number, batch in enumerate(batches):
            file = FeatureFile(Path(directory, f"f{number}"), number, "set", Path(directory, f"d{number}"))
            pq.write_table(step.features(batch), file.path)
            pq.write_table(documents_table(batch.ids.to_list(), [None] * len(batch), 0), file.documents)
            files.append(file)
        start = time.process_time()
        dropped = sum(len(table) - table["reason"].null_count for table in step.resolve(files, Path(directory, "work")))
        seconds = time.process_time() - start
    size = sum(batch.text.str.len_bytes().sum() for batch in batches) / 1e6
    return {"mb_per_core_second": round(size / seconds, 1), "dropped": dropped}


PEER = """
import json, sys, time
try:
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    import importlib.metadata
except ImportError as error:
    sys.exit(f"not measured: {error}")
texts = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
made = MinhashDedupSignature(sys.argv[1] + ".out", MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8))
made.get_signature(made.get_shingles("warm up the tokenizer of five words or more"))
start = time.process_time()
for text in texts:
    shingles = made.get_shingles(text)
    if shingles.size:
        made.get_signature(shingles)
seconds = time.process_time() - start
print(json.dumps({"mb_per_core_second": sum(len(t.encode()) for t in texts) / 1e6 / seconds,
                  "version": importlib.metadata.version("datatrove")}))
"""


def measure_peer(python: str, texts: list[str]) -> dict[str, Any] | None:
    """datatrove's MinHash signatures, in the interpreter `python`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "texts.jsonl")
        path.write_text("".join(json.dumps(text) + "\n" for text in texts))
        ran = subprocess.run([python, "-c", PEER, str(path)], capture_output=True, text=True)
    if ran.returncode:
        print(f"datatrove {ran.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="*", default=[], help="JSONL files, plain or .gz, globs allowed")
    parser.add_argument("--megabytes", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=20_000, help="made evaluation items, where no sets are at hand")
    parser.add_argument("--peer", default=sys.executable, help="a Python that can import datatrove")
    options = parser.parse_args()
    texts = texts_of(options.data, options.megabytes * 1.1)
    cut = max(1, len(texts) // 11)  # a part makes the evaluation items
    measured = texts[cut:]
    names = [f"d{number}" for number in range(len(measured))]
    batches = [make_batch(measured[start:start + BATCH], names[start:start + BATCH])
               for start in range(0, len(measured), BATCH)]
    size = sum(batch.text.str.len_bytes().sum() for batch in batches) / 1e6
    if os.environ.get("NANOLLAMA_DATA"):
        step = Decontamination(missing="record")
        index, source = step._index(), "the project's list of evaluation sets"
    else:
        index, source = Index(items_of(texts[:cut], options.items), 13, 6, 0.8), "made items"
    print(f"{len(measured):,} documents, {size:.1f} MB; {len(index):,} evaluation texts ({source})")
    figures = measure_features(batches, index, options.rounds)
    resolved = {name: measure_resolve(batches, step) for name, step in (
        ("exact", ExactDeduplication()), ("MinHash", MinHashDeduplication()), ("SimHash", SimHashDeduplication()))}
    peer = measure_peer(options.peer, measured[:max(1, len(measured) // 40)])
    print(f"{'features':<34}{'MB per core second':>20}")
    for name, rate in figures.items():
        print(f"{name:<34}{rate:>20.1f}")
    if peer is not None:
        name, rate = f"datatrove {peer['version']}, MinHash", peer["mb_per_core_second"]
        print(f"{name:<34}{rate:>20.2f}   ours {figures['MinHash'] / rate:.0f}x")
    print(f"{'decision over all':<34}")
    for name, row in resolved.items():
        print(f"{name:<34}{row['mb_per_core_second']:>20.1f}   {row['dropped']:,} dropped")
    reached = figures["MinHash + 13-grams, one pass"]
    print(f"goal {GOAL} MB/s: {'reached' if reached >= GOAL else 'MISSED'} ({reached:.1f})")
    RESULTS.write_text(json.dumps({
        "what": "megabytes of UTF-8 text per second of processor time, all threads together, best of the rounds",
        "goal_one_pass": GOAL, "megabytes": round(size, 1), "documents": len(measured), "data": "own files"
        if options.data else "standard library", "evaluation_texts": len(index), "evaluation_sets": source,
        "features_mb_per_core_second": {name: round(rate, 1) for name, rate in figures.items()},
        "decision": resolved, "datatrove_minhash": peer, "machine": machine(),
        "versions": {"python": platform.python_version(),
                     **{name: importlib.metadata.version(name) for name in PACKAGES}}}, indent=2) + "\n")
    print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
