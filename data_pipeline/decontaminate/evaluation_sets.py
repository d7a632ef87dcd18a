"""Evaluation sets as a list in YAML, and their items as texts.

Owns the list's form, the reading of JSON Lines, JSON documents (plain, .gz or .zst) and Parquet, and the law that a
set that is not there is called missing. Knows nothing of n-grams.
"""

import dataclasses
import functools
import glob
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet

from data_pipeline.engine.variables import expand_variables
from data_pipeline.engine.yaml_lines import YamlError, line_of, load_with_lines
from data_pipeline.sources.streams import read_blocks, split_rows
from nanollama.data.files import DataError, sha256_file
from nanollama.data.strict import FieldError, from_mapping, nearest

LIST = Path(__file__).parent / "benchmarks.yaml"
_ROOT = "benchmarks"


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """One set: where its items are and which of their fields hold text that must not be trained on.

    A field is a path of names through an item (`question.content`); lists on the way are gone through. Texts of
    one field of one item are read as one text, as choices of a question.
    """

    name: str
    path: str | tuple[str, ...]  # files, with ${VARIABLES} and globs
    fields: tuple[str, ...]
    items: str = ""  # path to the items inside each JSON value; empty: the value is one


@dataclasses.dataclass(frozen=True)
class _List:
    sets: tuple[EvaluationSet, ...]


class Item(NamedTuple):
    """One text of one item."""

    id: str  # set/number
    field: str
    text: str


@dataclasses.dataclass(frozen=True)
class Found:
    """A set on this machine: its files, or none and why."""

    set: EvaluationSet
    files: tuple[str, ...]
    status: Literal["used", "missing"]
    reason: str = ""

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of every file, or "missing"."""
        return " ".join(sha256_file(Path(file)) for file in self.files) or "missing"


def load_list(path: str | Path = LIST) -> dict[str, EvaluationSet]:
    """The sets of a list, by name. Errors: DataError names file, line, field and the fix."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        content = b""  # `_load` says what is wrong with it
    return dict(_load(path, content))


@functools.lru_cache(maxsize=8)  # asked for at every shard and step, and parsing takes 25 ms
def _load(path: str | Path, content: bytes) -> dict[str, EvaluationSet]:
    try:
        value, lines = load_with_lines(path, _ROOT)
    except YamlError as error:
        raise DataError(str(error)) from error
    try:
        made = from_mapping(_List, value, _ROOT)
        names = [one.name for one in made.sets]
        for index, one in enumerate(made.sets):
            if names.index(one.name) != index:
                raise FieldError(f"{_ROOT}.sets[{index}].name", f"{one.name!r} is used twice", "Names must differ.")
            if not one.fields:
                raise FieldError(f"{_ROOT}.sets[{index}].fields", "is empty", "Name the fields that hold text.")
    except FieldError as error:
        field = error.field.removeprefix(f"{_ROOT}.")
        raise DataError(f"{path}:{line_of(error.field, lines)}: {field}: {error.problem}. {error.fix}") from error
    return {one.name: one for one in made.sets}


def choose(names: tuple[str, ...], path: str | Path = LIST) -> tuple[EvaluationSet, ...]:
    """The sets called `names`, all of the list when there are none. Errors: DataError."""
    known = load_list(path)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(f"{path}: no evaluation set is called {unknown[0]!r}. {nearest(unknown[0], list(known))}")
    return tuple(known[name] for name in names) if names else tuple(known.values())


def find(one: EvaluationSet) -> Found:
    """The set's files. A variable that is not set and a path that matches nothing make it missing."""
    files: list[str] = []
    for path in (one.path,) if isinstance(one.path, str) else one.path:
        try:
            expanded = expand_variables(path, "path")
        except FieldError as error:
            return Found(one, (), "missing", error.problem)
        matches = sorted(match for match in glob.glob(expanded, recursive=True) if os.path.isfile(match))
        if not matches:
            return Found(one, (), "missing", f"no file matches {path}")
        files += matches
    return Found(one, tuple(files), "used")


def read_items(found: Found) -> Iterator[Item]:
    """Every text of every item. Errors: DataError on what is not JSON, and on a field that no item has."""
    seen = dict.fromkeys(found.set.fields, 0)
    paths = [(field, field.split(".")) for field in found.set.fields]
    number = 0
    for file in found.files:
        for value in _values(file):
            for item in _walk(value, found.set.items.split(".")) if found.set.items else [value]:
                for field, names in paths:
                    texts = [str(part) for part in _walk(item, names) if isinstance(part, (str, int, float))]
                    if texts:
                        seen[field] += 1
                        yield Item(f"{found.set.name}/{number}", field, "\n".join(texts))
                number += 1
    for field, count in seen.items():
        if not count:
            raise DataError(f"evaluation set {found.set.name}: none of its {number:,} items has text in the field "
                            f"{field!r} ({', '.join(found.files)}). A set read as empty would pass for clean: "
                            "name the right fields.")


def _values(path: str) -> Iterator[Any]:
    """The rows of a Parquet file, the JSON value of every line, or the one of the whole file. Errors: DataError, also
    when a part cannot be read: the rest of a set would pass for all of it."""
    if path.endswith(".parquet"):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({error}). Fetch the file again.") from error
        return
    lines = _lines(path)
    _, first = next(lines, (1, b""))
    try:
        value = json.loads(first)
    except ValueError:
        try:
            yield json.loads(b"\n".join([first, *(line for _, line in lines)]))
        except ValueError as error:
            raise DataError(f"{path}: neither JSON Lines nor a JSON document nor called .parquet ({error}).") from error
        return
    yield value
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}).") from error


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a plain, .gz or .zst file."""
    for number, line in split_rows(read_blocks(path), b"\n", sys.maxsize):
        if not isinstance(line, bytes):
            raise DataError(f"{path}:{number}: {line}. Fetch the file again.")
        yield number, line


def _walk(value: Any, names: list[str]) -> list[Any]:
    """What the path leads to, through lists."""
    found = _flat([value])
    for name in names:
        found = _flat([one[name] for one in found if isinstance(one, dict) and name in one])
    return found


def _flat(values: list[Any]) -> list[Any]:
    """The elements of `values`, those of lists among them in their place."""
    if not any(isinstance(one, list) for one in values):
        return values
    return [inner for one in values for inner in (_flat(one) if isinstance(one, list) else [one])]
