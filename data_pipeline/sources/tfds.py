"""Datasets prepared by tensorflow-datasets, read by number without TensorFlow (extra `data`).

The set must have been prepared as ArrayRecord files (`file_format="array_record"`), which a reader can seek in.
`source` is a name such as "my_set/config:1.0.0" below TFDS_DATA_DIR, or the folder that holds dataset_info.json.
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
from nanollama.data.files import DataError


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """The splits of prepared sets."""

    dataset: DatasetConfig

    def parts(self) -> list["TfdsPart"]:
        """One part per set and split."""
        return [TfdsPart(self.dataset, path, split) for path in paths_of(self.dataset)
                for split in self.dataset.splits]


@dataclasses.dataclass(frozen=True)
class TfdsPart:
    """One split of one set."""

    dataset: DatasetConfig
    path: str
    split: str

    @property
    def name(self) -> str:
        """Dataset, set and split."""
        return f"{self.dataset.name} {self.path}/{self.split}"

    @property
    def bytes(self) -> int:
        """Of the split's files."""
        return sum(file.bytes for file in self._files())

    def inputs(self) -> list[Input]:
        """Name, size and hash of the split's files."""
        return [Input(file.name, file.bytes, file.sha256()) for file in self._files()]

    def open(self, state: State | None = None) -> "TfdsReader":
        """See Part."""
        return TfdsReader(self, state)

    def builder(self) -> Any:
        """The library's object for the set. Errors: DataError."""
        where = f"dataset {self.dataset.name}: source"
        try:
            import tensorflow_datasets
        except ImportError as error:
            raise DataError(f"{where} {self.path} needs tensorflow-datasets, which is not installed. Install it with: "
                            "pip install 'nanollama[data]'") from error
        expanded = expand_variables(self.path, where)
        try:
            if os.path.isdir(expanded):
                return tensorflow_datasets.builder_from_directory(expanded)
            return tensorflow_datasets.builder(expanded)
        except Exception as error:  # the library raises its own, Python's and Abseil's errors
            raise DataError(f"{where} {self.path}: no prepared tensorflow-datasets set there: "
                            f"{type(error).__name__}: {str(error)[:300]}") from error

    def _files(self) -> list[FileRef]:
        info = self.builder().info
        if self.split not in info.splits:
            raise DataError(f"dataset {self.dataset.name}: {self.path} has no split {self.split!r}; it has "
                            f"{', '.join(info.splits) or 'none'}. Set splits.")
        paths = [os.fspath(path) for path in info.splits[self.split].filepaths]
        return [FileRef(os.path.basename(path), path, os.path.getsize(path)) for path in paths]


class TfdsReader:
    """One pass through a split, by number."""

    def __init__(self, part: TfdsPart, state: State | None):
        self.part = part
        self.bytes_read = 0
        self._row = state["row"] if state else 0

    def state(self) -> State:
        """See Reader."""
        return {"row": self._row}

    def __iter__(self) -> Iterator[Document | Bad]:
        dataset = self.part.dataset
        try:
            rows = self.part.builder().as_data_source(split=self.part.split)
        except NotImplementedError as error:
            raise DataError(f"dataset {dataset.name}: {self.part.path} is not stored as ArrayRecord "
                            f"({str(error)[:200]}). Prepare it with file_format='array_record'.") from error
        name = f"{os.path.basename(os.path.normpath(self.part.path))}/{self.part.split}"
        for index in range(self._row, len(rows)):
            self._row = index + 1
            place = Place(name, f", row {index + 1}")
            try:
                row = {key: _plain(value) for key, value in rows[index].items()}
            except UnicodeDecodeError as error:
                yield Bad(place, "not UTF-8", str(error)[:200])
                continue
            yield bounded(dataset, row_document(dataset, row, f"{name}:{index + 1}", place))


def _plain(value: Any) -> Any:
    """Python values from NumPy's; texts come as bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
