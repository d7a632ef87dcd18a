"""Where text comes from. `open_source` gives the source of one dataset of a mixture."""

from data_pipeline.sources.base import Input, Part, Reader, Source, State, read_all
from data_pipeline.sources.dataset import PACKAGE_METADATA, PYTHON_STDLIB, DatasetConfig, format_of, paths_of
from data_pipeline.sources.files import FileSource
from data_pipeline.sources.find import find_files, local_files
from data_pipeline.sources.hub import HubSource
from data_pipeline.sources.packages import PackageSource
from data_pipeline.sources.python_code import stdlib_files
from data_pipeline.sources.tfds import TfdsSource

__all__ = ["Input", "Part", "Reader", "Source", "State", "open_source", "read_all"]


def open_source(dataset: DatasetConfig) -> Source:
    """The source that `dataset` names. Errors: DataError when it has no files."""
    first = paths_of(dataset)[0]
    if first == PYTHON_STDLIB:
        return FileSource(dataset, local_files(stdlib_files()))
    if first == PACKAGE_METADATA:
        return PackageSource()
    if format_of(dataset) == "huggingface":
        return HubSource(dataset)
    if format_of(dataset) == "tfds":
        return TfdsSource(dataset)
    return FileSource(dataset, find_files(dataset))
