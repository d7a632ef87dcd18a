"""A pipeline's working directory as the stages leave it, for tests of what reads one. Nothing is trained."""

import json
import math
import random
from pathlib import Path
from typing import Any

from nanollama.config import as_dict, resolve
from nanollama.data.files import write_json

SOURCES = {"python-stdlib": (9_100, 14_220_000, 0.46), "docstrings": (21_400, 9_870_000, 0.33),
           "package-metadata": (640, 6_350_000, 0.21)}
TOKENIZER_SHA, DATASET_ID = "8c1f" * 16, "51d0" * 16


def make_config(**changes: Any) -> dict[str, Any]:
    """A resolved config as a mapping."""
    values: dict[str, Any] = {
        "name": "quickstart", "steps": 1200,
        "model": {"vocab_size": 8192, "hidden_size": 192, "intermediate_size": 512, "num_layers": 6, "num_heads": 6,
                  "num_kv_heads": 2, "head_dim": 32, "tie_embeddings": True},
        "data": {"sets": [{"path": "packed"}], "tokenizer": "tokenizer", "sequence_length": 512},
        "batch": {"global_rows": 16}, "optimizer": {"name": "muon", "learning_rate": 6e-3},
        "schedule": {"name": "wsd", "warmup_steps": 60, "decay_steps": 240}}
    return as_dict(resolve({**values, **changes}))


def make_run(folder: Path, *, logged: int = 1200, **changes: Any) -> Path:
    """A run folder alone: config, environment, lineage, metrics of `logged` steps."""
    run = folder / "train"
    config = make_config(**changes)
    write_json(run / "config.json", config)
    write_json(run / "environment.json", {
        "python": "3.12.4", "platform": "Linux-6.1-x86_64", "packages": {"jax": "0.12.0", "numpy": "2.4.6"},
        "devices": {"kind": "cpu", "platform": "cpu", "count": 1, "hosts": 1}, "variables": {},
        "processor": {"model": "AMD EPYC", "cores": 2, "memory_bytes": 25 << 30}})
    write_json(run / "lineage.json", {
        "code": {"nanollama": "0.1.0", "git_commit": "ab12" * 10, "git_dirty": False},
        "tokenizer": {"sha256": TOKENIZER_SHA}, "parent": None, "starts": [{"step": 0}],
        "sets": [{"path": "packed", "dataset_id": DATASET_ID, "corpus_manifest_sha256": "77ae" * 16}]})
    lines = list(metric_lines(logged, 16 * 512))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def metric_lines(steps: int, tokens_per_step: int) -> Any:
    """Curves with the shape of a small run: warm-up, plateau, decay, one resume."""
    dice = random.Random(0)
    yield {"step": 0, "kind": "event", "event": "convention", "text":
           "MFU = 6N + causal attention. Peak here: 112 GFLOP/s, the float32 matmul rate measured on this CPU."}
    for step in range(1, steps + 1):
        if step == 700:
            yield {"step": 600, "kind": "event", "event": "resumed", "earlier_events": [],
                   "text": "resumed at step 600; 9 lines of the interrupted run, up to step 690, are computed again"}
        tokens = step * tokens_per_step
        rate = 6e-3 * min(step / 60, 1.0) * (1 - math.sqrt(max(0, step - 960) / 240) if step > 960 else 1.0)
        nll = 2.62 + 6.4 * math.exp(-step / 45) + 1.3 * math.exp(-step / 420) - 0.22 * max(0, step - 960) / 240
        if step % 5 == 0 or step == 1:
            yield {"step": step, "kind": "train", "loss": nll + dice.gauss(0, 0.07), "learning_rate": rate,
                   "grad_norm": 0.35 + 2.6 * math.exp(-step / 30) + abs(dice.gauss(0, 0.06)), "tokens": tokens,
                   "tokens_per_second": 24_800 + dice.gauss(0, 500), "mfu": 0.41, "memory_bytes": 1_480_000_000,
                   "source_tokens": {f"packed/{name}": round(tokens * share)
                                     for name, (_, _, share) in SOURCES.items()},
                   "epochs": {f"packed/{name}": tokens / 9_300_000 for name in SOURCES}}
        if step % 100 == 0:
            held = nll + 0.09
            yield {"step": step, "kind": "validation", "nll": held, "perplexity": math.exp(held),
                   "bits_per_byte": held / math.log(2) / 3.31, "tokens": 181_000}


def make_pipeline(folder: Path, **changes: Any) -> Path:
    """Everything the pipeline leaves; paths in the config are absolute, so that any directory will do."""
    data = {"sets": [{"path": str(folder / "packed")}], "tokenizer": str(folder / "tokenizer"),
            "sequence_length": 512}
    make_run(folder, data=data, **changes)
    write_json(folder / "corpus" / "manifest.json", {
        "kind": "corpus", "mixture": {"file": "quickstart.yaml", "config": {"datasets": [
            {"name": name, "licence": "PSF-2.0" if name != "package-metadata" else "as each package"}
            for name in SOURCES]}},
        "datasets": [{"name": name, "kept": documents, "rows_in": documents + 120, "characters": characters,
                      "bytes": characters + 9_000, "dropped": {"too_short": 120}}
                     for name, (documents, characters, _) in SOURCES.items()]})
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"pieces")
    write_json(folder / "tokenizer" / "manifest.json", {
        "kind": "sentencepiece", "algorithm": "bpe", "sha256": TOKENIZER_SHA, "vocab_size": 8192})
    write_json(folder / "packed" / "manifest.json", {
        "kind": "packed", "dataset_id": DATASET_ID, "tokenizer": {"sha256": TOKENIZER_SHA}, "record_length": 512,
        "corpus": {"path": str(folder / "corpus"), "manifest_sha256": "77ae" * 16},
        "splits": {"train": {"records": 18_160, "tokens": 9_294_000, "padding": 3_900, "documents": 30_500},
                   "validation": {"records": 355, "tokens": 181_300, "padding": 460, "documents": 640}},
        "source_counts": {"train": {name: {"documents": documents, "characters": characters, "tokens":
                                           round(characters / 3.28), "bytes": characters + 9_000}
                                    for name, (documents, characters, _) in SOURCES.items()}}})
    write_json(folder / "evaluation" / "results.json", evaluation())
    write_json(folder / "samples" / "samples.json", {"checkpoint": {"step": 1200}, "samples": SAMPLES})
    seconds = {"corpus": 31.2, "tokenizer": 18.4, "pack": 12.9, "train": 398.0, "evaluate": 21.5, "sample": 9.8}
    for index, (name, spent) in enumerate(seconds.items()):
        write_json(folder / "stages" / f"{name}.json", {
            "stage": name, "state": "done", "key": "k", "seconds": spent, "attempts": 2 if name == "train" else 1,
            "command": ["/usr/bin/python3.12", "-m", f"nanollama.{name}", "--workdir=runs/quickstart/train"],
            "started": f"2026-01-01T00:0{index}:00+0000", "outputs": {}})
    write_json(folder / "stages" / "hashes.json", {"/some/file": [1, 2, "3"]})
    return folder


def evaluation() -> dict[str, Any]:
    """evaluation/results.json of `python -m evals.perplexity`."""
    def row(nll: float, tokens: int) -> dict[str, Any]:
        return {"tokens": tokens, "words": round(tokens * 0.58), "bytes": round(tokens * 3.31), "nll_per_token": nll,
                "perplexity_token": math.exp(nll), "perplexity_word": math.exp(nll / 0.58),
                "perplexity_byte": math.exp(nll / 3.31), "bits_per_byte": nll / math.log(2) / 3.31}
    return {"kind": "perplexity", "data": "runs/quickstart/packed", "split": "validation", "window": 512,
            "stride": 256, **row(2.4472, 180_640), "checkpoint": {"step": 1200},
            "sources": {"python-stdlib": row(2.2210, 83_100), "docstrings": row(2.7301, 59_900),
                        "package-metadata": row(2.4950, 37_640)}}


SAMPLES = [
    {"prompt": "def read_json(path):\n", "temperature": 0.8, "top_p": 0.95, "seed": 0, "tokens": 64, "text":
     '    """Read a JSON file and return its content.\n\n    The path must name a file.\n    """\n'
     "    with open(path, encoding=\"utf-8\") as file:\n        return json.load(file)\n"},
    {"prompt": "The standard library ", "temperature": 0.8, "top_p": 0.95, "seed": 1, "tokens": 64, "text":
     "provides a number of modules for working with files and directories. Each of them raises an OSError when the "
     "operation is not permitted by the system, and returns the path of the file that was created."},
    {"prompt": "import ", "temperature": 0.8, "top_p": 0.95, "seed": 2, "tokens": 64, "text":
     "os\nimport sys\nimport types\n\nfrom collections import namedtuple\n\n\nclass _Wrapper:\n"
     "    def __init__(self, value):\n        self._value = value\n"},
    {"prompt": "A language model is", "temperature": 0.0, "seed": 3, "tokens": 64, "text":
     " a module that provides the interface to the parser. The default value is None, which means that the current "
     "context is used."}]
