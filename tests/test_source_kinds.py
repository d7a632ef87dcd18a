"""Sources beyond plain files: Arrow, WARC, hub and TensorFlow datasets, URLs; all go on exactly where they stood."""

import gzip
import io
import json
import random
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from corpora import documents, jsonl, mixture

from data_pipeline.corpus import build_corpus
from data_pipeline.curation import download
from data_pipeline.sources import Source, open_source, read_all, remote
from data_pipeline.sources.dataset import DatasetConfig
from data_pipeline.sources.files import FileSource
from data_pipeline.sources.streams import BrokenStream
from data_pipeline.sources.warc import WarcRecord, extractor, read_records
from data_pipeline.text.documents import Bad, Document, iso_date
from nanollama.data.files import DataError

TEXTS = [f"text {number} " + "word " * (number % 9) for number in range(600)]


def told(items: Any) -> list[tuple[str, str]]:
    return [(item.id, item.text) if isinstance(item, Document) else ("bad", item.reason) for item in items]


def check_resume(source: Source, every: int = 7) -> list[tuple[str, str]]:
    """Everything `source` gives; stopped after any row, a new reader gives exactly the rest."""
    whole = told(read_all(source))
    rng = random.Random(0)
    position = 0
    for part in source.parts():
        mine = told(part.open())
        for cut in {0, 1, len(mine) - 1, len(mine), *rng.choices(range(len(mine)), k=every)}:
            reader = part.open()
            rows = iter(reader)
            first = [next(rows) for _ in range(cut)]
            state = json.loads(json.dumps(reader.state()))  # it is kept as JSON
            assert told(first) == mine[:cut]
            assert told(part.open(state)) == mine[cut:], (part.name, cut)
        assert whole[position:position + len(mine)] == mine
        position += len(mine)
    assert position == len(whole)
    return whole


def write(path: Path, texts: list[str]) -> None:
    """`texts` in the format of the suffix."""
    table = pyarrow.table({"text": texts, "n": range(len(texts))})
    name = path.name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=100)
    elif name.endswith("stream.arrow"):
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    elif name.endswith(".arrow"):
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    elif name.endswith(".txt"):
        path.write_bytes("<|endoftext|>".join(texts).encode())
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(texts)))
    else:
        path.write_bytes(jsonl(texts) + b"broken\n\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "a.stream.arrow", "a.txt", "a.json"])
def test_files_go_on_where_they_stood(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / name, TEXTS)
    write(tmp_path / f"b{name[1:]}", ["another", "file"])
    fields: dict[str, Any] = {"separator": "<|endoftext|>"} if name.endswith(".txt") else {}
    form = {"format": "json"} if name == "a.json" else {}
    source = open_source(DatasetConfig("set", str(tmp_path / f"[ab]{name[1:]}"), 1.0, **fields, **form))
    assert isinstance(source, FileSource) and len(source.parts()) == 1
    assert [text for _, text in check_resume(source) if text != "broken JSON"] == [*TEXTS, "another", "file"]
    monkeypatch.setattr("data_pipeline.sources.files.PART_BYTES", 1)
    assert len(source.parts()) == 2  # large files are parts of their own
    check_resume(source, every=1)


def test_schemas_that_change_halfway(tmp_path: Path) -> None:
    lines = [{"text": "a first text", "n": 1}, {"text": ["a", "list"]}, {"content": "renamed"},
             {"text": "a last text", "n": {"deep": 1}, "more": "x"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    items = list(read_all(open_source(DatasetConfig("set", str(tmp_path / "rows.jsonl"), 1.0))))
    assert [item.meta if isinstance(item, Document) else item.reason for item in items] == [
        {"n": 1}, "text is not a string", "no field 'text'", {"more": "x"}]
    tables = [{"text": ["one"], "n": [1]}, {"text": ["two"], "n": ["x"]}, {"content": ["three"]}]
    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{number}.parquet")
    rows = read_all(open_source(DatasetConfig("set", str(tmp_path / "*.parquet"), 1.0)))
    assert [next(rows).meta, next(rows).meta] == [{"n": 1}, {"n": "x"}]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"2\.parquet has no column 'text'.*Set text_field"):
        next(rows)


def test_documents_of_a_hundred_megabytes(tmp_path: Path) -> None:
    """Too long by default: counted, not held. Allowed: taken whole, its neighbours too."""
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(jsonl(["before"]) + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 999_990 + b" y\\n   \xe2\x80\xa8 ")  # U+2028 inside
        file.write(b'"}\n' + jsonl(["after"]))
    dataset = {"name": "set", "source": str(path)}
    tracemalloc.start()
    manifest = build_corpus(mixture(tmp_path / "mix.yaml", dataset), tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 150_000_000
    tracemalloc.stop()
    assert manifest["datasets"][0]["dropped"] == {"line over max_line_bytes": 1}
    config = mixture(tmp_path / "mix.yaml", {**dataset, "max_line_bytes": 200_000_000})
    manifest = build_corpus(config, tmp_path / "out")
    assert manifest["datasets"][0]["kept"] == 3 and manifest["datasets"][0]["bytes"] > 100_000_000
    assert [len(row["text"]) > 90_000_000 for row in documents(tmp_path / "out")] == [False, True, False]


def test_urls_through_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec (extra data)")
    memory = fsspec.filesystem("memory")
    for name in ("a/one", "b/two"):
        memory.pipe(f"/bucket/{name}.jsonl.gz", gzip.compress(jsonl([name[2:]])))
    source = open_source(DatasetConfig("set", "memory://bucket/**/*.jsonl.gz", 1.0))
    assert check_resume(source) == [("a/one.jsonl.gz:1", "one"), ("b/two.jsonl.gz:1", "two")]
    [part] = source.parts()
    before = [row.sha256 for row in part.inputs()]
    assert before == [row.sha256 for row in part.inputs()]
    memory.pipe("/bucket/b/two.jsonl.gz", gzip.compress(jsonl(["new"])))  # as long as before
    assert before[0] == part.inputs()[0].sha256 and before[1] != part.inputs()[1].sha256
    write(tmp_path / "a.parquet", TEXTS[:5])
    source = open_source(DatasetConfig("set", f"file://{tmp_path}/a.parquet", 1.0))
    assert [text for _, text in check_resume(source)] == TEXTS[:5]
    for url, message in [("memory://bucket/none.jsonl", "no file at memory://bucket/none.jsonl"),
                         ("nosuch://x/y.jsonl", "nosuch")]:
        with pytest.raises(DataError, match=message):
            open_source(DatasetConfig("set", url, 1.0))


# WARC


def record(kind: str, block: bytes, content: str = "application/http;msgtype=response", **fields: str) -> bytes:
    head = {"WARC-Type": kind, "WARC-Target-URI": "<http://example.org/page>", "WARC-Date": "2024-04-25T16:24:44Z",
            "Content-Type": content, "Content-Length": str(len(block)), **fields}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return gzip.compress(b"WARC/1.0\r\n" + lines.encode() + b"\r\n" + block + b"\r\n\r\n")


def response(body: bytes, *headers: str, status: int = 200, kind: str = "text/html; charset=utf-8") -> bytes:
    lines = [f"HTTP/1.1 {status} OK", f"Content-Type: {kind}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Flaky:
    """A store of one object per name that fails in the middle of it, `failures` times."""

    def __init__(self, objects: dict[str, bytes], failures: int):
        self.objects, self.failures = objects, failures

    def info(self, path: str) -> dict[str, Any]:
        return {"name": path, "size": len(self.objects[path]), "type": "file", "ETag": "one"}

    def ukey(self, path: str) -> str:
        return path

    def unstrip_protocol(self, path: str) -> str:
        return f"flaky://{path}"

    def open(self, path: str, mode: str) -> io.BytesIO:
        store, whole = self, self.objects[path]

        class Body(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if store.failures and self.tell() + (size or 0) > len(whole) // 2:
                    store.failures -= 1
                    raise TimeoutError("the store does not answer")
                return super().read(size)
        return Body(whole)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_a_store_that_fails_ends_the_run_and_costs_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          suffix: str) -> None:
    """Taken for a damaged file it would be counted, cached under the hash of the whole one, and never read again."""
    write(tmp_path / f"a.{suffix}", TEXTS * 20)
    store = Flaky({f"bucket/a.{suffix}": (tmp_path / f"a.{suffix}").read_bytes()}, failures=2)
    monkeypatch.setattr(remote, "filesystem", lambda url: (store, url.removeprefix("flaky://")))
    config = mixture(tmp_path / "mix.yaml", {"name": "set", "source": f"flaky://bucket/a.{suffix}"})
    for _ in range(2):
        with pytest.raises(DataError, match=rf"flaky://bucket/a.{suffix}: cannot be read \(TimeoutError: the store"):
            build_corpus(config, tmp_path / "out", workers=1)
    assert build_corpus(config, tmp_path / "out", workers=1)["datasets"][0]["kept"] == 20 * len(TEXTS)
    [part] = open_source(DatasetConfig("set", f"flaky://bucket/a.{suffix}", 1.0)).parts()
    before = part.inputs()
    monkeypatch.setattr(store, "info", lambda path: {**Flaky.info(store, path), "ETag": "two"})
    assert before != part.inputs()


def test_a_file_that_goes_or_changes_after_it_was_hashed_ends_the_run(tmp_path: Path) -> None:
    for change, message in [(lambda path: path.unlink(), r"cannot be read \(No such file"),
                            (lambda path: path.write_bytes(jsonl(["x"])), r"has \d+ bytes, and had [\d,]+ when")]:
        write(tmp_path / "a.jsonl", TEXTS)
        [part] = open_source(DatasetConfig("set", str(tmp_path / "a.jsonl"), 1.0)).parts()
        part.inputs()
        change(tmp_path / "a.jsonl")
        with pytest.raises(DataError, match=message):
            list(part.open())


PAGE = "<html><head><title>T</title><style>p {}</style></head><body><nav>menu</nav><p>{}</p></body></html>"


def page(text: str) -> bytes:
    return PAGE.replace("{}</p>", text + "</p>").encode()


def test_records_of_a_warc_file(tmp_path: Path) -> None:
    whole = b"".join([
        record("warcinfo", b"software: test", "application/warc-fields"),
        record("conversion", "Extracted caf\u00e9 text.\n".encode(), "text/plain",
               **{"WARC-Record-ID": "<urn:uuid:11>"}),
        record("conversion", b"x" * 5000, "text/plain"), record("conversion", b"last", "text/plain")])
    (tmp_path / "a.warc.gz").write_bytes(whole)
    dataset = DatasetConfig("set", str(tmp_path / "a.warc.gz"), 1.0, max_line_bytes=4000)
    items = list(read_all(open_source(dataset)))
    assert told(items) == [("11", "Extracted caf\u00e9 text.\n"), ("bad", "document over max_line_bytes"),
                           ("a.warc.gz:4", "last")]
    assert items[0].date == "2024-04-25"  # type: ignore[union-attr]
    assert items[0].meta == {"url": "http://example.org/page", "date": "2024-04-25T16:24:44Z"}  # type: ignore[union-attr]
    check_resume(open_source(dataset))
    (tmp_path / "a.warc.gz").write_bytes(whole[:-30])  # cut off in the last record
    assert told(read_all(open_source(dataset)))[-1] == ("bad", "file cut off or damaged")
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(b"something else\r\n\r\n"))
    assert told(read_all(open_source(dataset))) == [("bad", "file cut off or damaged")]


def test_a_warc_record_that_comes_twice_is_one_document(tmp_path: Path) -> None:
    once = record("conversion", b"A page of text.", "text/plain", **{"WARC-Record-ID": "<urn:uuid:11>"})
    other = record("conversion", b"Another one.", "text/plain", **{"WARC-Record-ID": "<urn:uuid:12>"})
    (tmp_path / "a.warc.gz").write_bytes(once + other)
    (tmp_path / "b.warc.gz").write_bytes(once)
    dataset = {"name": "set", "source": str(tmp_path / "*.warc.gz")}
    manifest = build_corpus(mixture(tmp_path / "mix.yaml", dataset), tmp_path / "out")
    assert manifest["datasets"][0]["dropped"] == {"duplicate id": 1}
    assert [row["id"] for row in documents(tmp_path / "out")] == ["set/11", "set/12"]
    with pytest.raises(DataError, match=r"1 documents have an id \(WARC-Record-ID\) that came before"):
        build_corpus(mixture(tmp_path / "mix.yaml", {**dataset, "on_error": "stop"}), tmp_path / "out")


def test_records_do_not_depend_on_how_the_stream_is_cut() -> None:
    content = gzip.decompress(record("conversion", b"one\r\n\r\ntwo", "text/plain")) * 3
    for size in (1, 3, 7, 50, 1000):
        blocks = iter([content[at:at + size] for at in range(0, len(content), size)])
        found = list(read_records(blocks, 1000))
        assert [one.block for one in found if isinstance(one, WarcRecord)] == [b"one\r\n\r\ntwo"] * 3 == [
            b"one\r\n\r\ntwo"] * len(found)
    assert isinstance(list(read_records(iter([content[:-20]]), 1000))[-1], BrokenStream)


def test_pages_become_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resiliparse", reason="needs resiliparse (extra warc)")
    extract = extractor("set")

    def text(block: bytes, kind: str = "response") -> str | None:
        return extract(WarcRecord({"warc-type": kind, "content-type": "application/http"}, block))

    body = page("Words of a caf\u00e9 &amp; more.")
    for block in (response(body), response(body, "Content-Encoding: gzip").replace(body, gzip.compress(body)),
                  response(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), "Transfer-Encoding: chunked"),
                  response(body.decode().encode("latin-1"), kind="text/html; charset=iso-8859-1")):
        found = text(block)
        assert found is not None and found.strip() == "Words of a caf\u00e9 & more."
    assert text(response(b"plain \xe2\x82\xac", kind="text/plain")) == "plain \u20ac"
    assert text(response(page("NUL \0 here"))) is not None and "\0" not in (text(response(page("NUL \0 here"))) or "")
    for nothing in (response(body, status=404), response(body, kind="image/png")):
        assert text(nothing) is None
    assert text(response(body), kind="request") is None
    for broken, reason in [(b"no end of headers", "without a body"), (b"HTTP\r\n\r\nx", "without a status"),
                           (response(body, "Content-Encoding: br"), "br encoding"),
                           (response(b"\x1f\x8bnot gzip", "Content-Encoding: gzip"), "does not decompress")]:
        with pytest.raises(ValueError, match=reason):
            text(broken)
    monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)
    with pytest.raises(DataError, match=r"pip install 'nanollama\[warc\]'"):
        text(response(body))


def test_the_shared_warc_files(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse", reason="needs resiliparse (extra warc)")
    name = Path("shared") / "data" / "pretrain" / "warc"
    folder = next((place / name for place in Path(__file__).parents if (place / name).exists()), None)
    if folder is None:
        pytest.skip(f"{name} is not beside this checkout")
    items = check_resume(open_source(DatasetConfig("set", str(folder / "*.warc.gz"), 1.0)), every=1)
    pages = [text for identity, text in items if identity != "bad"]
    assert len(pages) == 37 and sum(map(len, pages)) > 150_000 and not any("<div" in text for text in pages)


# Hub and TensorFlow datasets, through their real libraries


def test_hub_folders_go_on_where_they_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets (extra data)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / "folder" / f"{name}.jsonl").write_bytes(jsonl([f"{name} {text}" for text in TEXTS[:40]]))
    source = open_source(DatasetConfig("set", str(tmp_path / "folder"), 1.0, format="huggingface"))
    assert [text for _, text in check_resume(source, every=2)] == [f"{n} {text}" for n in "ab" for text in TEXTS[:40]]
    [part] = source.parts()
    assert [row.path for row in part.inputs()] == ["a.jsonl", "b.jsonl"]
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS[:30]})}).save_to_disk(tmp_path / "saved")
    source = open_source(DatasetConfig("set", str(tmp_path / "saved"), 1.0, format="huggingface"))
    assert [text for _, text in check_resume(source, every=2)] == TEXTS[:30]


@pytest.mark.filterwarnings("ignore")
def test_tensorflow_datasets_without_tensorflow(tmp_path: Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets (extra data)")
    import numpy as np

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "n": np.int64}))

        def _split_generators(self, manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[Any]:
            yield from ((n, {"text": text, "n": n}) for n, text in enumerate(TEXTS[:50]))

    builder = Tiny(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = open_source(DatasetConfig("set", str(builder.data_path), 1.0, format="tfds"))
    items = check_resume(source, every=2)
    assert sorted(text for _, text in items) == sorted(TEXTS[:50]) and "tensorflow" not in sys.modules
    [part] = source.parts()
    assert len(part.inputs()) == 1 and part.bytes > 500
    other = DatasetConfig("set", str(builder.data_path), 1.0, format="tfds", splits=("test",))
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        open_source(other).parts()[0].inputs()
    with pytest.raises(DataError, match="no prepared tensorflow-datasets set"):
        open_source(DatasetConfig("set", str(tmp_path), 1.0, format="tfds")).parts()[0].inputs()


# Raw shards


def test_a_part_goes_on_from_its_last_finished_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dies in the third shard; the second run opens the source there, and no row is read into a shard twice."""
    (tmp_path / "rows.jsonl").write_bytes(jsonl(TEXTS))
    monkeypatch.setattr(download, "SHARD_BYTES", 2_000)
    dataset = DatasetConfig("set", str(tmp_path / "rows.jsonl"), 1.0)
    [part] = open_source(dataset).parts()
    task = download.read_task(dataset, part, part.inputs(), tmp_path / "cache")
    whole = download.read_part(download.read_task(dataset, part, part.inputs(), tmp_path / "whole"))
    assert len(whole.markers) > 5 and sum(marker["rows"] for marker in whole.markers) == 600
    add, calls = download.RawWriter.add, 0

    def dying(self: Any, item: Document | Bad) -> None:
        nonlocal calls
        calls += 1
        if calls == 200:
            raise KeyboardInterrupt
        add(self, item)

    monkeypatch.setattr(download.RawWriter, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        download.read_part(task)
    finished = len(list(Path(task.directory).glob("*.json")))
    assert finished == 2 and not list(Path(task.directory).glob("*.tmp"))
    calls = 1000
    assert download.read_part(task).markers == whole.markers
    assert calls - 1000 == 600 - sum(marker["rows"] for marker in whole.markers[:finished])


def test_dates_of_many_kinds() -> None:
    for value, wanted in [("2025-04-17", "2025-04-17"), ("2019-04-19T14:58:17Z", "2019-04-19"), (1611, "1611"),
                          ("26-FEB-1987 15:01:01.79", "1987-02-26"), ("Thu, 5 Jan 2023 10:00:00 GMT", "2023-01-05"),
                          ("2020-07", "2020-07"), ("1999", "1999"), ("July 1994", None), ("", None), (None, None),
                          (True, None), (12, None), ("2020-13-01", "2020"), ("2023-02-29", "2023-02"),
                          ("2024-02-29", "2024-02-29"), ("31-APR-1987", "1987-04"), ("20201301", None),
                          ("1/2/2020", None)]:
        assert iso_date(value) == wanted, value
