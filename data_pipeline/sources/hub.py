"""Datasets of the Hugging Face hub, streamed through the `datasets` library (extra `data`).

Owns turning a missing extra or a missing network into a message that says how to get the data.
"""

from collections.abc import Iterator
from typing import Any

from data_pipeline.config import DatasetConfig, paths_of
from data_pipeline.documents import Bad, Document, Place
from data_pipeline.sources.base import Input
from data_pipeline.sources.files import FileSource
from nanollama.data.files import DataError, sha256_json


class HubSource:
    """Streams the splits of one hub dataset, in the hub's order."""

    def __init__(self, dataset: DatasetConfig):
        self.dataset = dataset
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"dataset {dataset.name}: reading {', '.join(paths_of(dataset))} needs the `datasets` "
                "library, which is not installed. Install it with: pip install 'nanollama[data]'") from error
        self._library: Any = datasets
        self._rows = FileSource(dataset, [])
        self._folder = {"data_dir": dataset.data_dir} if dataset.data_dir is not None else {}
        self.total_bytes = 0
        self.bytes_read = 0

    def inputs(self) -> list[Input]:
        """What is asked of the hub. Only a pinned `revision` makes it an identity; the card says so."""
        rows = []
        for path in paths_of(self.dataset):
            for split in self.dataset.splits:
                asked = {
                    "path": path, "subset": self.dataset.subset, "split": split,
                    "revision": self.dataset.revision, **self._folder
                }
                revision = self.dataset.revision or "main"
                subset = self.dataset.subset or self.dataset.data_dir or "default"
                name = f"hf://{path}@{revision}/{subset}/{split}"
                rows.append(Input(name, 0, sha256_json(asked)))
        return rows

    def read(self) -> Iterator[Document | Bad]:
        """The rows of all splits."""
        for path in paths_of(self.dataset):
            for split in self.dataset.splits:
                for number, row in enumerate(self._stream(path, split), start=1):
                    place = Place(f"{path}/{split}", f", row {number}")
                    document = self._rows.row_document(row, f"{path}/{split}:{number}", place)
                    if isinstance(document, Document) and len(document.encoded) > self.dataset.max_line_bytes:
                        document = Bad(place, "document over max_line_bytes",
                                       f"{len(document.encoded):,} bytes")
                    yield document

    def _stream(self, path: str, split: str) -> Iterator[dict[str, Any]]:
        try:
            yield from self._library.load_dataset(path, name=self.dataset.subset, split=split, streaming=True,
                                             revision=self.dataset.revision, **self._folder)
        except DataError:
            raise
        except Exception as error:  # the library raises its own, requests', httpx' and fsspec's errors
            raise DataError(
                f"dataset {self.dataset.name}: cannot stream {path} (split {split}): "
                f"{type(error).__name__}: {str(error)[:300]}\n"
                "If this machine is offline, fetch the files where there is a network:\n"
                f"    hf download {path} --repo-type dataset --local-dir DIR\nand set in the mixture: "
                "source: DIR/**/*.parquet, format: parquet. A gated dataset also needs `hf auth login`."
            ) from error
