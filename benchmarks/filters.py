"""Megabytes of text per second of one core that the curation filters judge: `python benchmarks/filters.py`.

The text is the standard library's: sources, and their docstrings as prose; `--texts FILE.jsonl.gz` takes another. One
thread; processor time, so that other work on the machine hardly changes the figures. Where the package datatrove is
installed its filters run beside ours on a part of the same documents, in its default settings. Writes
benchmarks/results/filters.json.
"""

import argparse
import ast
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["POLARS_MAX_THREADS"] = "1"  # read when polars is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine
from data_pipeline.corpus import build_corpus
from data_pipeline.filters import make_batch, make_filter
from data_pipeline.language_model import build

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "filters.json"
PACKAGES = ("polars", "numpy", "pyarrow", "fasttext-predict", "ufal.kenlm", "ftfy")
OURS = ("heuristics", "gopher_quality", "gopher_repetition", "c4", "fineweb", "pii", "language", "clean")
GOAL = 30.0  # MB/s per core of `heuristics`
THEIRS = {"gopher_quality": "GopherQualityFilter", "gopher_repetition": "GopherRepetitionFilter",
          "c4": "C4QualityFilter", "fineweb": "FineWebQualityFilter"}


def library_texts() -> list[str]:
    """The standard library's modules, and the docstrings of each as a text of its own."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        found.append(source)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        prose = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        found.append("\n\n".join(text for text in prose if text))
    return [text for text in found if text.strip()]


def read_texts(paths: list[str]) -> list[str]:
    """The field `text` of JSONL files."""
    texts = []
    for path in paths:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            texts += [json.loads(line)["text"] for line in file]
    return [text for text in texts if text]


def spread(texts: list[str], megabytes: float) -> list[str]:
    """Some of the texts, evenly over them, about so many megabytes."""
    step = max(1.0, sum(map(len, texts)) / (megabytes * 1e6))
    return [texts[int(index * step)] for index in range(int(len(texts) / step))]


def size(texts: list[str]) -> float:
    """Megabytes of UTF-8."""
    return sum(len(text.encode()) for text in texts) / 1e6


def rate(run: Callable[[], Any], megabytes: float, rounds: int = 3) -> float:
    """Megabytes per second of processor time, the best of `rounds`."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return megabytes / best


def language_model(directory: Path, texts: list[str]) -> Path:
    """A model of some of the texts, trained as the command does it."""
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "mixture.yaml").write_text(json.dumps({  # JSON is YAML
        "metadata": {"phase": "benchmark", "description": "texts for the language model"},
        "datasets": [{"name": "texts", "source": str(directory / "texts.jsonl"), "mix_ratio": 1}]}))
    build_corpus(directory / "mixture.yaml", directory / "corpus")
    build(directory / "corpus", directory / "model", trainer="python")
    return directory / "model"


def measure_ours(texts: list[str], directory: Path) -> dict[str, dict[str, float]]:
    """Rate and share kept, filter by filter."""
    mappings: list[dict[str, Any]] = [{"type": name} for name in OURS]
    noise = {"max_perplexity": 1000.0}  # so little text makes a model that finds noise less unlikely than a real one
    mappings.append({"type": "perplexity", "model": str(language_model(directory, spread(texts, 2))), **noise})
    figures = {}
    for mapping in mappings:
        item = make_filter(mapping, "benchmark")
        item.judge(make_batch(texts[:1]))  # models are loaded
        fast = rate(lambda item=item: item.judge(make_batch(texts)), size(texts))
        kept = item.judge(make_batch(texts)).reasons.null_count() / len(texts)
        figures[mapping["type"]] = {"mb_per_core_second": round(fast, 1), "kept": round(kept, 3)}
    return figures


def measure_datatrove(texts: list[str]) -> dict[str, dict[str, float]]:
    """The same of datatrove's filters, which have more than the rate in common with ours only where words agree."""
    import datatrove.pipeline.filters as filters
    from datatrove.data import Document as Row
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.utils.text import split_into_parts

    figures = {}
    for name, kind in THEIRS.items():
        item = getattr(filters, kind)()

        def judge(item: Any = item) -> list[bool]:
            split_into_parts.cache_clear()
            return [item.filter(Row(text=text, id="")) is True for text in texts]

        judge()  # tokenizers are loaded
        fast = rate(judge, size(texts), rounds=1)
        figures[name] = {"mb_per_core_second": round(fast, 2), "kept": round(sum(judge()) / len(texts), 3)}
    scrub = PIIFormatter()
    fast = rate(lambda: [scrub.format(text) for text in texts], size(texts))
    figures["pii"] = {"mb_per_core_second": round(fast, 2), "kept": 1.0}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Megabytes per second of one core that the filters judge.")
    parser.add_argument("--texts", action="append", help="JSONL file with a field text, .gz too; may be given again")
    parser.add_argument("--megabytes", type=float, default=8, help="of text, spread over all of it")
    parser.add_argument("--beside", type=float, default=0.5, help="megabytes for datatrove, which is slower")
    options = parser.parse_args()
    every = read_texts(options.texts) if options.texts else library_texts()
    texts = spread(every, options.megabytes)
    with tempfile.TemporaryDirectory() as directory:
        ours = measure_ours(texts, Path(directory))
    theirs = {}
    if importlib.util.find_spec("datatrove") is not None:
        theirs = measure_datatrove(spread(every, options.beside))
    named = ", ".join(Path(path).name for path in options.texts or []) or "the standard library and its docstrings"
    print(f"{named}: {len(texts):,} texts, {size(texts):.1f} MB, one thread")
    print(f"{'':<20}{'MB/s/core':>10}{'kept':>7}" + (f"{'datatrove':>12}{'ratio':>8}" if theirs else ""))
    for name, figure in ours.items():
        beside = ""
        if name in theirs:
            other = theirs[name]["mb_per_core_second"]
            beside = f"{other:>12.2f}{figure['mb_per_core_second'] / other:>7.0f}x"
        print(f"{name:<20}{figure['mb_per_core_second']:>10.1f}{figure['kept']:>7.0%}{beside}")
    reached = ours["heuristics"]["mb_per_core_second"]
    print(f"goal for heuristics {GOAL:.0f} MB/s: {'reached' if reached >= GOAL else 'MISSED'} ({reached})")
    packages = [*PACKAGES, *(["datatrove"] if theirs else [])]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({
        "what": "megabytes of text per second of processor time, one thread; share of documents kept",
        "texts": {"of": named, "documents": len(texts), "megabytes": round(size(texts), 1)}, "ours": ours,
        "datatrove": theirs, "machine": machine(),
        "versions": {"python": platform.python_version(),
                     **{name: importlib.metadata.version(name) for name in packages}}
    }, indent=1) + "\n")
    print(f"written: {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
