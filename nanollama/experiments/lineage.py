"""What a run was made from: code, tokenizer, packed sets and their corpora, the parent checkpoint.

Owns lineage.json's content. Reads manifests, never data; knows nothing of how they were made.
"""

import subprocess
from pathlib import Path
from typing import Any

import nanollama
from nanollama.config import Config
from nanollama.data.files import read_json, sha256_file
from nanollama.data.tokenizer import MODEL_FILE, MODEL_FILES
from nanollama.experiments.environment import public_path


def lineage(config: Config, parent: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON-able origin of a run. What cannot be found is None: never a guess.

    `parent`: the checkpoint the run started from, e.g. {"path", "step", "hash"}.
    """
    return {"code": code(), "tokenizer": tokenizer(Path(config.data.tokenizer)),
            "sets": [packed_set(Path(item.path)) for item in config.data.sets], "parent": parent}


def code() -> dict[str, Any]:
    """nanollama's version and, when it runs from its own git checkout, commit and whether it was changed."""
    package = Path(nanollama.__file__).parent
    # A virtual environment inside somebody else's checkout must not report that project's commit.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"nanollama": nanollama.__version__, "git_commit": None, "git_dirty": None}
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return {"nanollama": nanollama.__version__, "git_commit": _git(package, "rev-parse", "HEAD"),
            "git_dirty": None if changes is None else bool(changes)}


def tokenizer(directory: Path) -> dict[str, Any]:
    """Identity of the frozen tokenizer in `directory`."""
    files = [directory / name for name in MODEL_FILES.values() if (directory / name).is_file()]
    model, manifest = files[0] if files else directory / MODEL_FILE, _manifest(directory)
    return {"path": public_path(directory), "sha256": sha256_file(model) if model.is_file() else None,
            "vocab_size": manifest.get("vocab_size"), "algorithm": manifest.get("algorithm")}


def packed_set(directory: Path) -> dict[str, Any]:
    """Identity of a packed set and of the corpus it was packed from."""
    manifest = _manifest(directory)
    corpus = manifest.get("corpus") or {}
    return {"path": public_path(directory), "dataset_id": manifest.get("dataset_id"),
            "manifest_sha256": sha256_file(directory / "manifest.json") if manifest else None,
            "tokenizer_sha256": (manifest.get("tokenizer") or {}).get("sha256"),
            "corpus_manifest_sha256": corpus.get("manifest_sha256") or corpus.get("sha256")}


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    return read_json(path) if path.is_file() else {}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True,
                              timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
