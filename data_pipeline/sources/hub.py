"""Datasets of the Hugging Face hub or in a local folder, streamed through the `datasets` library (extra `data`).

Owns going on where a reader stood (the library's own state, exact also inside a file), and turning a missing extra
or a missing network into a message that says how to get the data.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from data_pipeline.engine.variables import expand_variables
from data_pipeline.sources.base import Input, State
from data_pipeline.sources.dataset import DatasetConfig, paths_of
from data_pipeline.sources.remote import FileRef
from data_pipeline.sources.rows import bounded, row_document
from data_pipeline.text.documents import Bad, Document, Place
from nanollama.data.files import DataError, sha256_json


@dataclasses.dataclass(frozen=True)
class HubSource:
    """Streams the splits of hub datasets, in the hub's order."""

    dataset: DatasetConfig

    def parts(self) -> list["HubPart"]:
        """One part per path and split."""
        _library(self.dataset)
        return [HubPart(self.dataset, path, split) for path in paths_of(self.dataset)
                for split in self.dataset.splits]


@dataclasses.dataclass(frozen=True)
class HubPart:
    """One split of one hub dataset."""

    dataset: DatasetConfig
    path: str
    split: str
    bytes: int = 0

    @property
    def name(self) -> str:
        """Dataset, path and split."""
        return f"{self.dataset.name} {self.path}/{self.split}"

    @property
    def place(self) -> str:
        """Path and split without a machine's folders."""
        expanded = expand_variables(self.path, f"dataset {self.dataset.name}: source")
        return f"{os.path.basename(os.path.normpath(expanded)) if _is_local(expanded) else self.path}/{self.split}"

    @property
    def folder(self) -> dict[str, str]:
        """The folder to read, as the library takes it."""
        return {"data_dir": self.dataset.data_dir} if self.dataset.data_dir is not None else {}

    def inputs(self) -> list[Input]:
        """Of a local folder, every file. Of the hub, what is asked: only a pinned `revision` makes it an identity."""
        expanded = expand_variables(self.path, f"dataset {self.dataset.name}: source")
        if _is_local(expanded):
            return list(_folder_inputs(expanded))
        revision = self.dataset.revision or "main"
        subset = self.dataset.subset or self.dataset.data_dir or "default"
        asked = {"path": self.path, "subset": self.dataset.subset, "split": self.split,
                 "revision": self.dataset.revision, **self.folder}
        return [Input(f"hf://{self.path}@{revision}/{subset}/{self.split}", 0, sha256_json(asked))]

    def open(self, state: State | None = None) -> "HubReader":
        """See Part."""
        return HubReader(self, state)


class HubReader:
    """One pass through a split."""

    def __init__(self, part: HubPart, state: State | None):
        self.part, self.dataset = part, part.dataset
        self.bytes_read = 0
        self._library = _library(part.dataset)
        self._start = state or {"row": 0, "library": None}
        self._row = self._start["row"]
        self._stream: Any = None

    def state(self) -> State:
        """The rows given and, where the library has one, its own state, which needs no reading again."""
        library = self._stream.state_dict() if hasattr(self._stream, "state_dict") else None
        return {"row": self._row, "library": library}

    def __iter__(self) -> Iterator[Document | Bad]:
        place = self.part.place
        for row in self._rows():
            self._row += 1
            where = Place(place, f", row {self._row}")
            yield bounded(self.dataset, row_document(self.dataset, row, f"{place}:{self._row}", where))

    def _rows(self) -> Iterator[dict[str, Any]]:
        part = self.part
        path = expand_variables(part.path, f"dataset {self.dataset.name}: source")
        try:
            self._stream = self._open(path)
            skip = self._start["row"]
            if self._start["library"] is not None and hasattr(self._stream, "load_state_dict"):
                self._stream.load_state_dict(self._start["library"])
                skip = 0
            for number, row in enumerate(self._stream):
                if number >= skip:
                    yield row
        except DataError:
            raise
        except Exception as error:  # the library raises its own, requests', httpx' and fsspec's errors
            if "scripts are no longer supported" in str(error):
                raise DataError(f"dataset {self.dataset.name}: {part.path} is a program that makes the set, which the "
                                f"`datasets` library does not run any more ({error}). Set in the mixture a revision "
                                "that holds files, often refs/convert/parquet (look at the hub whether it is whole), "
                                "or another set.") from error
            raise DataError(
                f"dataset {self.dataset.name}: cannot stream {part.path} (split {part.split}): "
                f"{type(error).__name__}: {str(error)[:300]}\n"
                "If this machine is offline, fetch the files where there is a network:\n"
                f"    hf download {part.path} --repo-type dataset --local-dir DIR\nand set in the mixture: "
                "source: DIR/**/*.parquet, format: parquet. A gated dataset also needs `hf auth login`."
            ) from error

    def _open(self, path: str) -> Any:
        if os.path.isfile(os.path.join(path, "state.json")) or os.path.isfile(
                os.path.join(path, "dataset_dict.json")):  # written by `save_to_disk`
            saved = self._library.load_from_disk(path)
            saved = saved[self.part.split] if isinstance(saved, dict) else saved
            return saved.to_iterable_dataset()
        return self._library.load_dataset(path, name=self.dataset.subset, split=self.part.split, streaming=True,
                                          revision=self.dataset.revision, **self.part.folder)


def _library(dataset: DatasetConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"dataset {dataset.name}: reading {', '.join(paths_of(dataset))} needs the `datasets` "
            "library, which is not installed. Install it with: pip install 'nanollama[data]'") from error
    return datasets


def _is_local(path: str) -> bool:
    return os.path.isdir(path)


def _folder_inputs(path: str) -> Iterator[Input]:
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            size = os.path.getsize(file)
            yield Input(os.path.relpath(file, path), size, FileRef(name, file, size).sha256())
