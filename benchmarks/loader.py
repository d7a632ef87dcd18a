"""Rows of 2,048 tokens the loader makes per second of one core: `python benchmarks/loader.py`.

Real text (the standard library's sources), real tokenizer, ArrayRecord files read at random, shuffled by
Grain; labels, weights, positions and document boundaries of every row. Counted in processor time, all threads
together, so that other work on the machine hardly changes the figure. Writes benchmarks/results/loader.json.
"""

import argparse
import importlib.metadata
import io
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # Grain imports JAX
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import sentencepiece
from packed_sets import make_packed_set

from benchmarks.machine import machine
from nanollama.config import DataConfig, PackedSetConfig
from nanollama.data.loader import HostBatch, Loader, read_rows, row_order
from nanollama.data.mixture import Mixture, open_mixture
from nanollama.data.sentencepiece_tokenizer import freeze_sentencepiece
from nanollama.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
GOAL = 10_000  # rows of 2,048 tokens a second and core
RESULTS = ROOT / "benchmarks" / "results" / "loader.json"
PACKAGES = ("grain", "array_record", "sentencepiece", "numpy", "jax")


def texts() -> list[str]:
    """The standard library's own modules, no tests."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py"))
             if not {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts)]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def make_tokenizer(directory: Path, documents: list[str]) -> Tokenizer:
    model = io.BytesIO()
    lines = (line for text in documents[::4] for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=8192, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2)
    made_by = {"made_by": "benchmarks/loader.py"}
    return freeze_sentencepiece(directory, model.getvalue(), algorithm="bpe", corpus=made_by)


def make_mixture(directory: Path, rows: int) -> Mixture:
    """A packed set of `rows` rows or more: pieces of about 350 tokens of the documents, over and over."""
    documents = texts()
    tokenizer = make_tokenizer(directory / "tokenizer", documents)
    ids = tokenizer.encode_documents(documents)
    ids = [part for document in ids for part in np.array_split(document, max(1, len(document) // 350))]
    again = -(-rows * 2048 // sum(map(len, ids)))
    path = make_packed_set(directory / "set", tokenizer=tokenizer, documents=ids * again, record_length=2048)
    return open_mixture(DataConfig((PackedSetConfig(str(path)),), str(tokenizer.directory), 2048))


def measure(run: Callable[[int], object], batches: int, rows: int, rounds: int = 5) -> dict[str, float]:
    """Rows per second of processor and of wall time over `batches` calls: median and best of `rounds`."""
    run(0)
    processor, wall = [], []
    for number in range(rounds):
        start = time.process_time(), time.perf_counter()
        for batch in range(batches):
            run(number * batches + batch)
        processor.append(batches * rows / (time.process_time() - start[0]))
        wall.append(batches * rows / (time.perf_counter() - start[1]))
    return {"rows_per_core_second": round(statistics.median(processor)), "best": round(max(processor)),
            "rows_per_wall_second": round(statistics.median(wall))}


def measure_all(mixture: Mixture, global_batch: int) -> dict[str, dict[str, float]]:
    batches = max(1, 4096 // global_batch)
    loader = Loader(mixture, seed=0, global_batch=global_batch)
    figures = {"batch(step)": measure(loader.batch, batches, global_batch)}
    for threads in (1, 2, 4):
        ahead = Loader(mixture, seed=0, global_batch=global_batch, threads=threads).iterate()
        figures[f"iterate, {threads} threads"] = measure(partial(next_of, ahead), batches, global_batch)
        ahead.close()
    order = row_order(mixture, seed=0)
    keys = [[order[batch * global_batch + row] for row in range(global_batch)] for batch in range(20)]
    figures["read and derive, no Grain"] = measure(lambda batch: read_rows(mixture, keys[batch % 20]),
                                                   batches, global_batch)
    return figures


def next_of(iterator: Iterator[HostBatch], _: int) -> HostBatch:
    return next(iterator)


def seek_seconds(mixture: Mixture, global_batch: int) -> dict[str, float]:
    """First batch of a new loader at step 0 and at step ten million: files open, then nothing to replay."""
    seconds = {}
    for step in (0, 10_000_000):
        start = time.perf_counter()
        Loader(mixture, seed=0, global_batch=global_batch).batch(step)
        seconds[f"step {step:,}"] = round(time.perf_counter() - start, 4)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows of 2,048 tokens the loader makes per second and core.")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the packed set it makes and reads")
    parser.add_argument("--global-batch", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        mixture = make_mixture(Path(directory), options.rows)
        packed = mixture.sets[0].packed.manifest
        segments = packed["splits"]["train"]["documents"] / mixture.sets[0].rows
        disk = sum(file["bytes"] for file in packed["files"]) / packed["splits"]["train"]["tokens"]
        figures = measure_all(mixture, options.global_batch)
        seeks = seek_seconds(mixture, options.global_batch)
    rows = mixture.sets[0].rows
    print(f"{rows:,} rows of 2,048 tokens, {segments:.1f} documents a row, {disk:.2f} bytes a token on disk, "
          f"global batch {options.global_batch}")
    print(f"{'':<28}{'rows/s/core':>12}{'best':>9}{'rows/s wall':>13}{'Mtok/s/core':>13}")
    for name, figure in figures.items():
        rate, best, wall = figure.values()
        print(f"{name:<28}{rate:>12,}{best:>9,}{wall:>13,}{rate * 2048 / 1e6:>13.1f}")
    times = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seeks.items())
    print(f"first batch of a new loader: {times}")
    reached = figures["batch(step)"]["rows_per_core_second"]
    print(f"goal {GOAL:,} rows/s/core: {'reached' if reached >= GOAL else 'MISSED'} ({reached:,})")
    RESULTS.parent.mkdir(exist_ok=True)
    versions = {"python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in PACKAGES}}
    RESULTS.write_text(json.dumps({
        "what": "rows of 2,048 tokens per second of processor time (all threads together) and of wall time; "
                "every row read at random, decoded, labels, weights, positions and boundaries derived",
        "goal_rows_per_core_second": GOAL, "rows": rows, "documents_per_row": round(segments, 2),
        "bytes_per_token_on_disk": round(disk, 3), "global_batch": options.global_batch, "figures": figures,
        "first_batch_seconds": seeks, "machine": machine(), "versions": versions}, indent=2) + "\n")
    print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
