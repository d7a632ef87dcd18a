"""Small mixtures and corpora for tests of the pipeline."""

import json
import os
from pathlib import Path
from typing import Any

from data_pipeline.curation import corpus_format


def mixture(path: Path, *datasets: dict[str, Any], **top: Any) -> Path:
    """A mixture file (JSON is YAML); equal ratios where none are given."""
    rows = [{"mix_ratio": 1 / len(datasets), **dataset} for dataset in datasets]
    path.write_text(
        json.dumps({"metadata": {"phase": "test", "description": "a test"}, "datasets": rows, **top}))
    return path


def documents(corpus: Path) -> list[dict[str, Any]]:
    manifest, _ = corpus_format.read_manifest(corpus)
    return [row for shard in manifest["shards"] for row in corpus_format.read_shard(corpus, shard)]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def jsonl(texts: list[Any], **fields: Any) -> bytes:
    return b"".join(
        json.dumps({"text": text, **fields}, ensure_ascii=False).encode() + b"\n" for text in texts)


def small_mixture(tmp_path: Path) -> Path:
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.jsonl").write_bytes(
            jsonl([f"{name} {number} " + "z" * 300 for number in range(400)]))
    return mixture(
        tmp_path / "mix.yaml",
        *({"name": name, "source": str(tmp_path / f"{name}.jsonl"), "filters": [{"type": "exact_duplicate"}]}
          for name in ("one", "two", "three")))


def data_folder() -> Path | None:
    """The folder of real text: the variable NANOLLAMA_DATA, or shared/data beside the checkout; None where absent."""
    places = [Path(os.environ["NANOLLAMA_DATA"])] if os.environ.get("NANOLLAMA_DATA") else [
        parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    return next((place for place in places if (place / "pretrain").is_dir()), None)
