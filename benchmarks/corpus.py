"""Raw text to packed records, MB of raw text a second of one core: `python benchmarks/corpus.py --data=DIR`.

The chain whose parts were measured when its goal was set: read, language, heuristics, personal data, perplexity; exact
and MinHash duplicates and 13-gram decontamination; write; BPE and packing. On real text (DIR/pretrain/*.jsonl.gz, the
first megabytes of six sources), by one worker and by two. Processor time of all processes together hardly changes with
what else the machine does; the gain of the second worker is of wall time and wants a quiet machine, so the load is
written beside it. Tokenizer and language model are made first, and not counted. Writes benchmarks/results/corpus.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "corpus.json"
SOURCES = ("arxiv_abstracts_astroph", "books_eltec_eng", "code_python", "news_reuters21578", "technical_docs",
           "wikipedia_en")
GOAL, GAIN_GOAL = 1.5, 1.7  # MB/s and core; one worker's wall time over two workers'
VOCABULARY, RECORD = 16_000, 2048


def timed(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Wall and processor seconds of a command and all processes it waited for, and its peak memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_seconds": round(wall, 2), "processor_seconds": round(
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)}


def write_mixture(path: Path, sources: tuple[str, ...], limit_mb: float, model: Path | None) -> None:
    """The mixture file (JSON is YAML) of the chain; without a model only the text as it is."""
    filters = [{"type": "language", "languages": ["en"], "min_score": 0.3}, {"type": "heuristics"}, {"type": "pii"},
               {"type": "perplexity", "model": str(model), "max_perplexity": 5000}]
    datasets = [{"name": name, "source": f"${{NANOLLAMA_DATA}}/pretrain/{name}.jsonl.gz", "id_field": "id",
                 "mix_ratio": 1 / len(sources), "max_bytes": int(limit_mb * 1e6), "cap_order": "head",
                 "filters": filters if model else []} for name in sources]
    steps = {"deduplication": [{"type": "exact"}, {"type": "minhash"}],
             "decontamination": [{"type": "decontaminate", "missing": "record"}]}
    path.write_text(json.dumps({"metadata": {"phase": "benchmark", "description": "a benchmark"},
                                "datasets": datasets, **(steps if model else {})}))


def measure(data: Path, limit_mb: float, workers: list[int]) -> dict[str, Any]:
    """The figures of the chain for each number of workers."""
    environment = {**os.environ, "NANOLLAMA_DATA": str(data), "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": "1",
                   "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nanollama-benchmark-") as temporary:
        room = Path(temporary)
        write_mixture(room / "plain.yaml", ("wikipedia_en",), 5, None)
        timed(["data_pipeline.corpus", f"--config={room / 'plain.yaml'}", f"--output={room / 'plain'}"], environment)
        timed(["data_pipeline.language_model", "train", f"--corpus={room / 'plain'}", f"--output={room / 'words'}"],
              environment)
        timed(["data_pipeline.tokenizer", f"--corpus={room / 'plain'}", f"--output={room / 'tokenizer'}",
               f"--vocab-size={VOCABULARY}"], environment)
        write_mixture(room / "chain.yaml", SOURCES, limit_mb, room / "words")
        for count in workers:
            corpus, packed = room / f"corpus{count}", room / f"packed{count}"
            stages = {
                "corpus": timed(["data_pipeline.corpus", f"--config={room / 'chain.yaml'}", f"--output={corpus}",
                                 f"--workers={count}"], environment),
                "pack": timed(["data_pipeline.pack", f"--corpus={corpus}", f"--tokenizer={room / 'tokenizer'}",
                               f"--output={packed}", f"--record-length={RECORD}", f"--workers={count}"], environment)}
            figures[f"{count} worker{'s' if count > 1 else ''}"] = {"stages": stages, **_account(corpus, stages)}
        figures["same_bytes"] = len({_identity(room / f"packed{count}") for count in workers}) == 1
    return figures


def _account(corpus: Path, stages: dict[str, dict[str, float]]) -> dict[str, Any]:
    manifest = json.loads((corpus / "manifest.json").read_text())
    raw = sum(json.loads(path.read_text())["bytes"] for path in (corpus / ".cache" / "raw").rglob("*.json"))
    kept = sum(row["bytes"] for row in manifest["datasets"])
    wall, processor = (sum(stage[key] for stage in stages.values()) for key in ("wall_seconds", "processor_seconds"))
    return {"raw_mb": round(raw / 1e6, 1), "kept_mb": round(kept / 1e6, 1), "wall_seconds": round(wall, 1),
            "processor_seconds": round(processor, 1), "raw_mb_per_core_second": round(raw / 1e6 / processor, 2)}


def _identity(packed: Path) -> str:
    identity: str = json.loads((packed / "manifest.json").read_text())["dataset_id"]
    return identity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of real text (NANOLLAMA_DATA)")
    parser.add_argument("--limit-mb", type=float, default=20.0, help="the first megabytes of each source")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = machine()
    figures = measure(options.data.resolve(), options.limit_mb, options.workers)
    result: dict[str, Any] = {
        "what": "raw text to packed ArrayRecord with BPE, see the docstring",
        "goal_mb_per_core_second": GOAL, "goal_gain_of_two_workers": GAIN_GOAL, "vocabulary": VOCABULARY,
        "limit_mb": options.limit_mb, "figures": figures, "machine_before": before, "machine_after": machine()}
    if {"1 worker", "2 workers"} <= set(figures):
        result["gain_of_two_workers"] = round(
            figures["1 worker"]["wall_seconds"] / figures["2 workers"]["wall_seconds"], 2)
    for name, row in figures.items():
        if isinstance(row, dict):
            print(f"{name}: {row['raw_mb']} MB raw, {row['kept_mb']} MB kept, {row['wall_seconds']} s, "
                  f"{row['processor_seconds']} processor s, {row['raw_mb_per_core_second']} MB/s and core "
                  f"({'reaches' if row['raw_mb_per_core_second'] >= GOAL else 'misses'} {GOAL})")
    print(f"second worker: {result.get('gain_of_two_workers', '?')} times as fast (goal {GAIN_GOAL}), load "
          f"{result['machine_after']['load_average'][0]} on {result['machine_after']['cores']} cores; same bytes: "
          f"{figures['same_bytes']}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "figures"}))


if __name__ == "__main__":
    main()
