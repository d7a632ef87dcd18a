"""Raw shards and sidecars: what the corpus command keeps between its stages, and how to read it back.

A raw shard is a Parquet file with every row of its source in order: documents with id, text, meta, date and digest,
and broken rows with the reason why they are none. Stages never change it: each writes a sidecar beside it, with one
line per row it judged (`row`, `reason` where it drops the row, and whatever it measured), and the texts it rewrote.
The rows that a sidecar lists without a reason are those that the next stage judges. Owns these files; knows no stage.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow
import pyarrow.parquet

from data_pipeline.filters.base import Batch
from data_pipeline.text.documents import Bad, Document, text_digest
from nanollama.data.files import DataError, into_place, sha256_json

GROUP_BYTES = 8_000_000  # of text held at once when a shard is written or read
GROUP_ROWS = 20_000
ATTRIBUTES = "attributes"  # a column of slices: JSON of what the stages measured of a document
REWRITES = b"nanollama.rewrites"
RAW = pyarrow.schema([
    ("id", pyarrow.string()), ("text", pyarrow.large_string()), ("meta", pyarrow.string()),
    ("date", pyarrow.string()), ("place", pyarrow.string()), ("bytes", pyarrow.uint64()),
    ("characters", pyarrow.uint64()), ("digest", pyarrow.binary(16)), ("reason", pyarrow.string()),
    ("detail", pyarrow.string())])
TEXTS = pyarrow.schema([("row", pyarrow.uint32()), ("text", pyarrow.large_string()), ("bytes", pyarrow.uint64()),
                        ("characters", pyarrow.uint64()), ("digest", pyarrow.binary(16))])


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What one stage said of one shard."""

    stage: str  # for people: "length", "minhash", ...
    section: str  # filters, ids, deduplication, decontamination, selection or sampling
    path: str
    texts: str | None = None  # where the texts are that it rewrote, if it did

    def new_texts(self) -> str | None:
        """`texts` if the stage rewrote any. The sidecar itself says so: a lost file is no unchanged text."""
        if self.texts is None:
            return None
        try:
            metadata = pyarrow.parquet.read_schema(self.path).metadata or {}
        except (OSError, pyarrow.ArrowException) as error:
            raise _gone(self.path, error) from error
        return self.texts if metadata.get(REWRITES) == b"yes" else None

    def is_there(self) -> bool:
        """Whether the stage is done."""
        if not os.path.exists(self.path):
            return False
        texts = self.new_texts()
        return texts is None or os.path.exists(texts)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A raw shard and the stages it has been through."""

    dataset: str
    number: int  # within its dataset
    path: str
    key: str  # hash of everything that decided its rows and its sidecars
    rows: int
    sidecars: tuple[Sidecar, ...] = ()

    def after(self, key: str, *sidecars: Sidecar) -> "Shard":
        """The shard after further stages."""
        return dataclasses.replace(self, key=key, sidecars=self.sidecars + sidecars)

    def after_step(self, name: str, section: str, step_key: str, decisions: Path) -> "Shard":
        """The shard after a stage that decides over many shards; `step_key`: hash of all that decides it."""
        key = sha256_json([self.key, step_key])
        file = f"{len(self.sidecars):02d}-{name}-{key[:24]}.parquet"
        return self.after(key, Sidecar(name, section, str(decisions / self.dataset / f"{self.number:05d}" / file)))

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.dataset} shard {self.number}"

    @property
    def weight(self) -> int:
        """Bytes of its file, about the work it is; who reads the file says when it is gone."""
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0


class RawWriter:
    """Writes one raw shard; it gets its name when it is whole."""

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = pyarrow.parquet.ParquetWriter(self._temporary, RAW, compression="zstd", compression_level=1,
                                                   use_dictionary=["reason"], write_statistics=False,
                                                   write_page_checksum=True)
        self._held: list[dict[str, Any]] = []
        self._held_bytes = 0
        self.rows = self.documents = self.bytes = self.characters = 0
        self.bad: dict[str, int] = {}

    def add(self, item: Document | Bad) -> None:
        """Append one row."""
        if isinstance(item, Document):
            size = len(item.encoded)
            self._held.append({
                "id": item.id, "text": item.text, "meta": json.dumps(item.meta, ensure_ascii=False),
                "date": item.date, "place": item.place.recorded, "bytes": size, "characters": len(item.text),
                "digest": text_digest(item.encoded)})
            self.documents += 1
            self.bytes, self.characters = self.bytes + size, self.characters + len(item.text)
            self._held_bytes += size
        else:
            self._held.append({"place": _storable(item.place.recorded), "reason": _storable(item.reason),
                               "detail": _storable(item.detail)})
            self.bad[item.reason] = self.bad.get(item.reason, 0) + 1
        self.rows += 1
        if self._held_bytes >= GROUP_BYTES or len(self._held) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(pyarrow.Table.from_pylist(self._held, RAW))
        self._held, self._held_bytes = [], 0

    def finish(self) -> None:
        """Give it its name."""
        if self._held:
            self._flush()
        self._file.close()
        into_place(self._temporary, self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_table(path: str | os.PathLike[str], table: pyarrow.Table) -> None:
    """Write a Parquet file so that its name means that it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    pyarrow.parquet.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    into_place(temporary, path)


def read_columns(path: str, columns: list[str] | None = None) -> pyarrow.Table:
    """Columns, default all, of a raw shard or sidecar. Errors: DataError when it is gone or changed."""
    try:
        return pyarrow.parquet.read_table(path, columns=columns, page_checksum_verification=True, use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise _gone(path, error) from error


def alive_rows(shard: Shard) -> np.ndarray:
    """Rows [n] int64 that no stage has dropped, ascending."""
    if not shard.sidecars:
        reasons = read_columns(shard.path, ["reason"]).column("reason")
        return np.flatnonzero(np.asarray(reasons.is_null()))
    table = read_columns(shard.sidecars[-1].path, ["row", "reason"])
    return np.asarray(table.column("row"))[np.asarray(table.column("reason").is_null())].astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Size and identity of the texts of some rows of a shard, as they stand after its stages."""

    rows: np.ndarray  # [n] int64
    bytes: np.ndarray  # [n] int64
    characters: np.ndarray  # [n] int64
    digests: np.ndarray  # [n, 16] uint8


def text_facts(shard: Shard) -> Facts:
    """Facts of the rows that are alive."""
    rows = alive_rows(shard)
    raw = read_columns(shard.path, ["bytes", "characters", "digest"]).take(rows)
    sizes, characters = (np.asarray(raw.column(name)).astype(np.int64) for name in ("bytes", "characters"))
    digests = _digests(raw.column("digest"))
    for sidecar in shard.sidecars:
        if (texts := sidecar.new_texts()) is not None:
            new = read_columns(texts, ["row", "bytes", "characters", "digest"])
            where, found = _positions(rows, np.asarray(new.column("row")).astype(np.int64))
            sizes[where] = np.asarray(new.column("bytes"))[found]
            characters[where] = np.asarray(new.column("characters"))[found]
            digests[where] = _digests(new.column("digest"))[found]
    return Facts(rows, sizes, characters, digests)


def _digests(column: pyarrow.ChunkedArray) -> np.ndarray:
    joined = b"".join(value for value in column.to_pylist())
    return np.frombuffer(joined, np.uint8).reshape(len(column), 16).copy()


def _positions(rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index in rows, index in others) of the rows that both have; both ascending."""
    at = np.searchsorted(rows, others)
    hit = (at < len(rows)) & (rows[np.minimum(at, len(rows) - 1)] == others) if len(rows) else np.zeros(
        len(others), bool)
    return at[hit], np.flatnonzero(hit)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some documents of a shard, as they stand after its stages."""

    rows: np.ndarray  # [n] int64, in the shard
    table: pl.DataFrame  # the raw columns of these rows, `text` as rewritten

    def batch(self, dataset: str) -> Batch:
        """As filters and steps take it: where they were read too, `meta` has the date and the filters' attributes."""
        metas = [json.loads(meta) for meta in self.table["meta"]]
        if "date" in self.table.columns:
            for meta, date in zip(metas, self.table["date"], strict=True):
                meta.update({"date": date} if date is not None else {})
        if ATTRIBUTES in self.table.columns:
            for meta, attributes in zip(metas, self.table[ATTRIBUTES], strict=True):
                meta.update(json.loads(attributes))
        return Batch(ids=(dataset + "/" + self.table["id"]).alias("ids"), text=self.table["text"].alias("text"),
                     meta=metas)


def read_slices(shard: Shard, columns: Sequence[str] = ("id", "text", "meta"), start: int = 0,
                stop: int | None = None) -> Iterator[Slice]:
    """The documents that are alive, of rows `start` to `stop`, a bounded piece at a time. Errors: DataError."""
    rows = alive_rows(shard)
    rows = rows[np.searchsorted(rows, start):None if stop is None else np.searchsorted(rows, stop)]
    attributes = _Attributes(shard) if ATTRIBUTES in columns else None
    columns = [name for name in columns if name != ATTRIBUTES]
    texts = [pl.from_arrow(read_columns(path, ["row", "text"])) for sidecar in shard.sidecars
             if (path := sidecar.new_texts()) is not None] if len(rows) and "text" in columns else []
    first = 0
    try:
        with pyarrow.parquet.ParquetFile(shard.path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                chosen = rows[np.searchsorted(rows, first):np.searchsorted(rows, first + count)]
                if len(chosen):
                    table = file.read_row_group(group, columns=list(columns), use_threads=False)
                    frame = pl.from_arrow(table.take(chosen - first))
                    assert isinstance(frame, pl.DataFrame)
                    frame = _rewritten(frame, chosen, texts)
                    yield Slice(chosen, frame if attributes is None else frame.with_columns(
                        attributes.values(chosen)))
                first += count
    except (OSError, pyarrow.ArrowException) as error:
        raise _gone(shard.path, error) from error


def _rewritten(frame: pl.DataFrame, rows: np.ndarray, texts: list[Any]) -> pl.DataFrame:
    if not texts:
        return frame
    frame = frame.with_columns(pl.Series("row", rows.astype(np.uint32)))
    for new in texts:
        frame = frame.join(new, on="row", how="left", maintain_order="left").with_columns(
            pl.coalesce("text_right", "text").alias("text")).drop("text_right")
    return frame.drop("row")


class _Attributes:
    """What filters and selection measured of each row, as JSON; a later stage's value of one name replaces an
    earlier's."""

    def __init__(self, shard: Shard):
        self._columns: dict[str, tuple[np.ndarray, list[Any]]] = {}
        for sidecar in shard.sidecars:
            if sidecar.section in ("filters", "selection"):
                table = read_columns(sidecar.path)
                rows = np.asarray(table.column("row")).astype(np.int64)
                for name in table.column_names:
                    if name not in ("row", "reason"):
                        self._columns[name] = (rows, table.column(name).to_pylist())

    def values(self, rows: np.ndarray) -> pl.Series:
        """One JSON object per row."""
        found: list[dict[str, Any]] = [{} for _ in rows]
        for name, (known, values) in self._columns.items():
            where, at = _positions(rows, known)
            for index, source in zip(where.tolist(), at.tolist(), strict=True):
                if values[source] is not None:
                    found[index][name] = values[source]
        return pl.Series(ATTRIBUTES, [json.dumps(one, ensure_ascii=False, default=str) for one in found],
                         dtype=pl.String)


def sidecar_table(rows: np.ndarray, reasons: pl.Series, columns: dict[str, pl.Series],
                  rewrites: bool = False) -> pyarrow.Table:
    """The table of a sidecar; `rewrites`: the stage wrote new texts beside it."""
    frame = pl.DataFrame([pl.Series("row", rows.astype(np.uint32)), reasons.cast(pl.String).alias("reason"),
                          *(values.alias(name) for name, values in columns.items())])
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    return table.replace_schema_metadata({REWRITES: b"yes"}) if rewrites else table


def texts_table(rows: np.ndarray, texts: list[str]) -> pyarrow.Table:
    """The table of rewritten texts."""
    encoded = [text.encode() for text in texts]
    return pyarrow.table({
        "row": pyarrow.array(rows.astype(np.uint32)), "text": pyarrow.array(texts, pyarrow.large_string()),
        "bytes": pyarrow.array([len(one) for one in encoded], pyarrow.uint64()),
        "characters": pyarrow.array([len(text) for text in texts], pyarrow.uint64()),
        "digest": pyarrow.array([text_digest(one) for one in encoded], pyarrow.binary(16))}, schema=TEXTS)


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _gone(path: str, error: Exception) -> DataError:
    what = "gone" if isinstance(error, FileNotFoundError) else f"changed since it was made ({str(error)[:200]})"
    return DataError(f"{path}: {what}. Delete it if it is still there and run the same command again: what is missing "
                     "is made again.")
