"""Stages of a pipeline: what they are, and when one is done.

Owns the pipeline file's fields, the hashes that decide whether a stage must run, and the markers on disk.
Knows nothing of how a stage is run (see `nanollama.run`) or of what it does.

A stage is done when it ended well under the same *key* and its outputs still are what it left. The key is the
hash of: the package version, the command as the pipeline file writes it (so a moved working directory stays
done), and the content of every input; a config file counts as the values it resolves to. Source code is not
in it: after changing code of your own, say `--force STAGE`.
"""

import contextlib
import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import Any

import nanollama
from nanollama.config_files import load_file
from nanollama.data.files import DataError, read_json, sha256_file, sha256_json, write_json
from nanollama.data.strict import FieldError, from_mapping

FRESH_SECONDS = 0.1  # a file changed this shortly before hashing may change again within one clock tick


@dataclasses.dataclass(frozen=True)
class Gate:
    """Go on only if a figure the stage wrote lies within bounds. Not in the key: a new one reruns nothing."""

    file: str  # JSON
    field: str  # path inside it, with dots
    min: float | None = None
    max: float | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command. `{workdir}` and `{python}` are replaced in every text."""

    name: str
    about: str  # one line for the reader
    command: tuple[str, ...]
    outputs: tuple[str, ...]  # files and directories that exist afterwards
    inputs: tuple[str, ...] = ()  # files, directories, config files (FILE.py or FILE.py:arg)
    continues: str = ""  # what the command goes on from; moved aside when the key changes, so that it starts anew
    gate: Gate | None = None


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What a pipeline file returns."""

    name: str
    stages: tuple[Stage, ...]
    report: str = ""  # file to open at the end
    then: tuple[str, ...] = ()  # the command to try next


class Run:
    """A pipeline in a working directory: markers, hashes, and what is done."""

    def __init__(self, pipeline: Pipeline, workdir: Path):
        self.pipeline, self.workdir = pipeline, workdir
        self.folder = workdir / "stages"
        self._hashes: dict[str, Any] = self._read(self.folder / ".hashes.json")

    def fill(self, text: str) -> str:
        return text.replace("{workdir}", str(self.workdir)).replace("{python}", this_python())

    def command(self, stage: Stage) -> list[str]:
        return [self.fill(part) for part in stage.command]

    def marker(self, stage: Stage) -> dict[str, Any]:
        """What is known of the stage's last attempt; empty before the first."""
        return self._read(self.folder / f"{stage.name}.json")

    def key(self, stage: Stage) -> str:
        """Hash of all that decides the stage's result. Errors: DataError when an input is missing."""
        inputs = {}
        for text in stage.inputs:
            inputs[text] = self.input_hash(self.fill(text))
            if inputs[text] is None:
                makers = [s.name for s in self.pipeline.stages for o in s.outputs if text.startswith(o)]
                fix = f"Stage {makers[0]!r} makes it." if makers else "Put it there, or correct the pipeline."
                raise DataError(f"stage {stage.name!r}: its input {self.fill(text)!r} does not exist. {fix}")
        return sha256_json({"version": nanollama.__version__, "command": stage.command, "inputs": inputs})

    def input_hash(self, text: str) -> str | None:
        """Content hash of an input; a config file counts as the values it returns, whatever its layout."""
        if text.partition(":")[0].endswith(".py"):
            return sha256_json(load_file(text))
        return self.content_hash(Path(text))

    def content_hash(self, path: Path) -> str | None:
        """SHA-256 of a file, or of the files in a directory, dot files apart; None = nothing there."""
        if path.is_dir():
            files = [(file.relative_to(path), file) for file in sorted(path.rglob("*")) if file.is_file()]
            kept = [(name, file) for name, file in files if not any(p.startswith(".") for p in name.parts)]
            return (
                sha256_json([[str(name), self.content_hash(file)] for name, file in kept]) if kept else None
            )
        if not path.is_file():
            return None
        status, name = path.stat(), str(path.resolve())
        known = self._hashes.get(name)
        if known and known[:2] == [status.st_size, status.st_mtime_ns]:
            return str(known[2])
        digest = sha256_file(path)
        if time.time_ns() - status.st_mtime_ns > FRESH_SECONDS * 1e9:
            self._hashes[name] = [status.st_size, status.st_mtime_ns, digest]
        return digest

    def output_hashes(self, stage: Stage) -> dict[str, str | None]:
        return {text: self.content_hash(Path(self.fill(text))) for text in stage.outputs}

    def is_done(self, stage: Stage, key: str) -> bool:
        marker = self.marker(stage)
        return (
            marker.get("state") == "done"
            and marker["key"] == key
            and marker["outputs"] == self.output_hashes(stage)
        )

    def save(self, stage: Stage, marker: dict[str, Any]) -> None:
        write_json(self.folder / f"{stage.name}.json", marker)
        write_json(self.folder / ".hashes.json", self._hashes)

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, DataError):  # a lost marker only costs a rerun
            return dict(read_json(path))
        return {}


def load_pipeline(spec: str) -> Pipeline:
    """The pipeline of a file `get_config(arg)`, checked. Errors: FieldError with field, value and fix."""
    pipeline = from_mapping(Pipeline, load_file(spec), "pipeline")
    names = [stage.name for stage in pipeline.stages]
    for index, stage in enumerate(pipeline.stages):
        where = f"pipeline.stages[{index}]"
        if not re.fullmatch(r"[a-z0-9_-]+", stage.name) or names.count(stage.name) > 1:
            raise FieldError(
                f"{where}.name", f"{stage.name!r} is not a name of its own", "Use a-z, 0-9, - and _, once."
            )
        if not stage.command or not stage.outputs:
            raise FieldError(
                where, "has no command or no outputs", "Give both: outputs show that it is done."
            )
    return pipeline


def this_python() -> str:
    """This interpreter, as short as a reader would write it."""
    with contextlib.suppress(ValueError):
        return str(Path(sys.executable).relative_to(Path.cwd()))
    return sys.executable
