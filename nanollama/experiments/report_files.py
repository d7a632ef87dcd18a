"""Finds and reads what a report is made of: a run folder, alone or inside a pipeline's working directory.

Owns where each file is looked for and what happens when it is absent (None) or broken (None, and a warning).
Knows nothing of what the files mean or how a page looks.
"""

from pathlib import Path
from typing import Any

from nanollama.data.files import DataError, read_json
from nanollama.training.metrics import FILE_NAME, read_metrics


class RunFiles:
    """Every file of one run, read once. `problems` are files that are there but cannot be read."""

    def __init__(self, directory: str | Path):
        given = Path(directory)
        if not given.is_dir():
            raise DataError(f"--run={given}: no such directory. Give a run folder, or the --workdir of a "
                            "pipeline.")
        self.problems: list[str] = []
        self.given = given
        self.run = given / "train" if (given / "train").is_dir() and not _is_run(given) else given
        self.workdir = self.run.parent if self.run.resolve().name == "train" else self.run
        if not _is_run(self.run) and not (self.workdir / "stages").is_dir():
            raise DataError(
                f"--run={given}: holds neither config.json nor {FILE_NAME}, so no run was started there. "
                "Start one with `python -m nanollama.train --config=... --workdir=...`.")
        self.config: dict[str, Any] = self.mapping(self.run / "config.json") or {}
        self.environment = self.mapping(self.run / "environment.json") or {}
        self.lineage = self.mapping(self.run / "lineage.json") or {}
        self.metrics = read_metrics(self.run / FILE_NAME)
        given_config = self.run / "config_as_given.txt"
        self.config_as_given = given_config.read_text("utf-8", "replace") if given_config.is_file() else ""

    def mapping(self, path: Path) -> dict[str, Any] | None:
        """The JSON object in `path`."""
        if not path.is_file():
            return None
        try:
            value = read_json(path)
        except (DataError, UnicodeDecodeError, RecursionError) as error:
            self.problems.append(f"{path.name} could not be read: {error}")
            return None
        if not isinstance(value, dict):
            self.problems.append(f"{path.name} could not be read: it holds no JSON object")
            return None
        return value

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of one kind."""
        return [line for line in self.metrics if line["kind"] == kind]

    def evaluation(self) -> dict[str, Any] | None:
        """Perplexity results: of the pipeline's evaluation stage, else of the run folder's results.json."""
        found = self.mapping(self.workdir / "evaluation" / "results.json")
        if found is None:
            results = self.mapping(self.run / "results.json") or {}
            candidates = [value for value in (results, *results.values()) if isinstance(value, dict)]
            found = next((value for value in candidates if value.get("kind") == "perplexity"), None)
        return found

    def samples(self) -> dict[str, Any] | None:
        """The newest samples: of the pipeline's stage, else those written while training."""
        places = [self.workdir / "samples" / "samples.json", *sorted(
            (self.run / "samples").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)]
        return next((found for place in places if (found := self.mapping(place)) is not None), None)

    def stages(self) -> list[dict[str, Any]]:
        """Markers of the pipeline's stages, in the order they were started."""
        folder = self.workdir / "stages"
        markers = []
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            marker = self.mapping(path) or {}
            if isinstance(marker.get("command"), (list, tuple)):
                name = marker.get("stage") or marker.get("name") or path.stem
                markers.append({**marker, "name": str(name), "path": path})
        return sorted(markers, key=lambda row: (str(row.get("started", "")), row["path"].stat().st_mtime))

    def tokenizer(self) -> tuple[Path | None, dict[str, Any]]:
        """Directory and manifest of the tokenizer; the run folder's copy outlives the original."""
        named = (self.config.get("data") or {}).get("tokenizer") or ""
        for place in (Path(named), self.run / "tokenizer", self.workdir / "tokenizer"):
            if (place / "tokenizer.model").is_file():
                return place, self.mapping(place / "manifest.json") or {}
        return None, {}

    def packed_sets(self) -> list[tuple[Path, dict[str, Any]]]:
        """Directories and manifests of the packed sets that are still where the config names them."""
        sets = (self.config.get("data") or {}).get("sets") or []
        places = [Path(item["path"]) for item in sets if isinstance(item, dict) and item.get("path")]
        places = places or [self.workdir / "packed"]
        return [(place, manifest) for place in places if (manifest := self.mapping(place / "manifest.json"))]

    def corpora(self) -> list[tuple[Path, dict[str, Any]]]:
        """Directories and manifests of the corpora the packed sets were made from."""
        places = [Path(corpus["path"]) for _, manifest in self.packed_sets()
                  if isinstance(corpus := manifest.get("corpus"), dict) and corpus.get("path")]
        places = list(dict.fromkeys([*places, self.workdir / "corpus"]))
        found = [(place, manifest) for place in places if (manifest := self.mapping(place / "manifest.json"))]
        unique = {place.resolve(): (place, manifest) for place, manifest in found}
        return list(unique.values())


def _is_run(directory: Path) -> bool:
    return (directory / "config.json").is_file() or (directory / FILE_NAME).is_file()
