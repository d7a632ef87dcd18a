"""Raw text to packed records, MB of raw text a second of one core: `python benchmarks/corpus.py --data=DIR`.

The chain whose parts were measured when its goal was set: read, language, heuristics, personal data, perplexity; exact
and MinHash duplicates and 13-gram decontamination; write; BPE and packing. On real text (DIR/pretrain/*.jsonl.gz, the
first megabytes of six sources), by one worker and by two. Processor time of all processes together hardly changes with
what else the machine does; the gain of the second worker is of wall time and wants a quiet machine, so what other
processes took meanwhile is written beside it. Its ceiling is measured too: two runs of one worker each at once, which
wait for nothing but the machine (memory, caches), over one alone. Tokenizer and language model are made first, and not
counted. Writes benchmarks/results/corpus.json.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "corpus.json"
SOURCES = ("arxiv_abstracts_astroph", "books_eltec_eng", "code_python", "news_reuters21578", "technical_docs",
           "wikipedia_en")
GOAL, GAIN_GOAL = 1.5, 1.7  # MB/s and core; one worker's wall time over two workers'
VOCABULARY, RECORD = 16_000, 2048


def timed(commands: Sequence[list[str]], environment: dict[str, str]) -> dict[str, float]:
    """Wall and processor seconds of commands, all at once, and of all processes they waited for; and what the
    machine's other processes took meanwhile."""
    before, busy = resource.getrusage(resource.RUSAGE_CHILDREN), _busy_seconds()
    start = time.perf_counter()
    running = [subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"one of these failed: {commands}")
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": round(wall, 2), "processor_seconds": round(processor, 2),
            "processor_seconds_of_others": round(max(0.0, _busy_seconds() - busy - processor), 2)}


def _busy_seconds() -> float:
    """Processor seconds that anything on this machine has taken, or was taken from it; 0 where that is not known."""
    path = Path("/proc/stat")
    if not path.is_file():
        return 0.0
    user, nice, system, _, _, *rest = (int(word) for word in path.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


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


def measure(data: Path, limit_mb: float, workers: list[int], rounds: int) -> tuple[list[dict[str, Any]], bool]:
    """(the figures of each round: the chain for each number of workers, and the ceiling; whether bytes were equal)."""
    environment = {**os.environ, "NANOLLAMA_DATA": str(data), "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": "1",
                   "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    figures: list[dict[str, Any]] = []
    identities = set()
    with tempfile.TemporaryDirectory(prefix="nanollama-benchmark-") as temporary:
        room = Path(temporary)
        write_mixture(room / "plain.yaml", ("wikipedia_en",), 5, None)
        timed([["data_pipeline.corpus", f"--config={room / 'plain.yaml'}", f"--output={room / 'plain'}"]], environment)
        timed([["data_pipeline.language_model", "train", f"--corpus={room / 'plain'}", f"--output={room / 'words'}"]],
              environment)
        timed([["data_pipeline.tokenizer", f"--corpus={room / 'plain'}", f"--output={room / 'tokenizer'}",
                f"--vocab-size={VOCABULARY}"]], environment)
        write_mixture(room / "chain.yaml", SOURCES, limit_mb, room / "words")
        for _ in range(rounds):
            figures.append({})
            runs = [(f"{count} worker{'s' if count > 1 else ''}", count, 1) for count in workers]
            for name, count, copies in [*runs, ("two runs of one worker at once", 1, 2)]:
                outputs = [room / f"run{copy}" for copy in range(copies)]
                stages = _chain(room, outputs, count, environment)
                figures[-1][name] = {"stages": stages, **_account(outputs, stages)}
                identities |= {_identity(output / "packed") for output in outputs}
                for output in outputs:
                    shutil.rmtree(output)
    return figures, len(identities) == 1


def _chain(room: Path, outputs: list[Path], workers: int, environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """Seconds of the two commands of the chain, into all `outputs` at once."""
    return {
        "corpus": timed([["data_pipeline.corpus", f"--config={room / 'chain.yaml'}", f"--output={output / 'corpus'}",
                          f"--workers={workers}"] for output in outputs], environment),
        "pack": timed([["data_pipeline.pack", f"--corpus={output / 'corpus'}", f"--tokenizer={room / 'tokenizer'}",
                        f"--output={output / 'packed'}", f"--record-length={RECORD}", f"--workers={workers}"]
                       for output in outputs], environment)}


def _account(outputs: list[Path], stages: dict[str, dict[str, float]]) -> dict[str, Any]:
    raw = kept = 0
    for corpus in (output / "corpus" for output in outputs):
        raw += sum(json.loads(path.read_text())["bytes"] for path in (corpus / ".cache" / "raw").rglob("*.json"))
        kept += sum(row["bytes"] for row in json.loads((corpus / "manifest.json").read_text())["datasets"])
    wall, processor = (sum(stage[key] for stage in stages.values()) for key in ("wall_seconds", "processor_seconds"))
    return {"raw_mb": round(raw / 1e6, 1), "kept_mb": round(kept / 1e6, 1), "wall_seconds": round(wall, 2),
            "processor_seconds": round(processor, 2), "raw_mb_per_core_second": round(raw / 1e6 / processor, 2)}


def _identity(packed: Path) -> str:
    identity: str = json.loads((packed / "manifest.json").read_text())["dataset_id"]
    return identity


def gains(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Of the second worker, over all rounds: in all, of each stage, and the most that the machine allows."""
    def seconds(name: str, stage: str | None = None) -> float:
        rows = [figures[name] if stage is None else figures[name]["stages"][stage] for figures in rounds]
        return float(sum(row["wall_seconds"] for row in rows))

    if "1 worker" not in rounds[0]:
        return {}
    result = {"ceiling": round(2 * seconds("1 worker") / seconds("two runs of one worker at once"), 2)}
    if "2 workers" in rounds[0]:
        result["gain"] = round(seconds("1 worker") / seconds("2 workers"), 2)
        for stage in ("corpus", "pack"):
            result[f"gain_{stage}"] = round(seconds("1 worker", stage) / seconds("2 workers", stage), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of real text (NANOLLAMA_DATA)")
    parser.add_argument("--limit-mb", type=float, default=20.0, help="the first megabytes of each source")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = machine()
    rounds, same = measure(options.data.resolve(), options.limit_mb, options.workers, options.rounds)
    second = gains(rounds)
    result: dict[str, Any] = {
        "what": "raw text to packed ArrayRecord with BPE, see the docstring", "versions": versions("nanollama"),
        "goal_mb_per_core_second": GOAL, "goal_gain_of_two_workers": GAIN_GOAL, "vocabulary": VOCABULARY,
        "limit_mb": options.limit_mb, "rounds": rounds, "same_bytes": same, "second_worker": second,
        "machine_before": before, "machine_after": machine()}
    for number, figures in enumerate(rounds):
        for name, row in figures.items():
            others = sum(stage["processor_seconds_of_others"] for stage in row["stages"].values())
            print(f"round {number + 1}, {name}: {row['raw_mb']} MB raw, {row['kept_mb']} MB kept, "
                  f"{row['wall_seconds']} s, {row['processor_seconds']} processor s (others {others:.1f}), "
                  f"{row['raw_mb_per_core_second']} MB/s and core "
                  f"({'reaches' if row['raw_mb_per_core_second'] >= GOAL else 'misses'} {GOAL})")
    print(f"second worker: {second.get('gain', '?')} times as fast (goal {GAIN_GOAL}, ceiling of this machine "
          f"{second.get('ceiling', '?')}) on {result['machine_after']['cores']} cores; same bytes: {same}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}))


if __name__ == "__main__":
    main()
