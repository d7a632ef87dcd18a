"""Where text comes from: every format gives the same texts, broken ends cost no row, memory is bounded."""

import gzip
import json
import random
import sys
import tracemalloc
import types
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from corpora import documents, jsonl, mixture

from data_pipeline.corpus import build_corpus
from data_pipeline.sources import open_source, read_all
from data_pipeline.sources.dataset import DatasetConfig
from data_pipeline.sources.python_code import docstrings, stdlib_files
from data_pipeline.sources.streams import TooLong, read_blocks, split_rows
from data_pipeline.text.documents import Bad, Document
from nanollama.data.files import DataError

# Characters that str.splitlines breaks at, and others that get lost in careless code.
TEXTS = [
    "plain\ntext\n", "a\u2028b\u2029c\u0085d", "tab\tand\rreturn\r\nend", "  spaces  ", "emoji 👩‍👩‍👧 汉字",
    "\ufeffmark"
]


def source_items(tmp_path: Path,
                 content: bytes,
                 name: str = "rows.jsonl",
                 **fields: Any) -> list[Document | Bad]:
    (tmp_path / name).write_bytes(content)
    return list(read_all(open_source(DatasetConfig("set", str(tmp_path / name), 1.0, **fields))))


@pytest.mark.parametrize("name",
                         ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "rows.txt"])
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    fields: dict[str, Any] = {}
    content = jsonl(TEXTS)
    if name.endswith(".gz"):
        content = gzip.compress(content[:50]) + gzip.compress(
            content[50:])  # two members, as `cat` makes them
    elif name.endswith(".zst"):
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name)
        content = (tmp_path / name).read_bytes()
    elif name.endswith(".txt"):
        fields = {"separator": "<|endoftext|>"}
        content = "<|endoftext|>".join(TEXTS).encode()
    items = source_items(tmp_path, content, name, **fields)
    assert [item.text for item in items if isinstance(item, Document)] == TEXTS
    assert [item.id for item in items if isinstance(item, Document)] == [f"{name}:{n}" for n in range(1, 7)]


def test_globs_ids_meta_and_order(tmp_path: Path) -> None:
    for name in ("b/two.jsonl", "a/one.jsonl", "a/skipped.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(
            jsonl([name], key=name[0], deep={"x": 1}, long="x" * 600, bad="\ud800"[:0], n=3))
    source = open_source(DatasetConfig("set", str(tmp_path / "**" / "*.jsonl"), 1.0, id_field="key"))
    found = [item for item in read_all(source) if isinstance(item, Document)]
    assert [(item.id, item.text, item.meta) for item in found] == [
        ("a", "a/one.jsonl", {"bad": "", "n": 3}), ("b", "b/two.jsonl", {"bad": "", "n": 3})]
    assert [row.path for part in source.parts() for row in part.inputs()] == ["a/one.jsonl", "b/two.jsonl"]
    for pattern, fix in [(tmp_path, r"/\*\*/\*\.jsonl"), (tmp_path / "c" / "*.jsonl", "no file at")]:
        with pytest.raises(DataError, match=fix):
            open_source(DatasetConfig("set", str(pattern), 1.0, format="jsonl"))
    with pytest.raises(DataError, match="Make them two datasets"):
        open_source(
            DatasetConfig("set",
                          (str(tmp_path / "a" / "*.jsonl"), str(tmp_path / "b" / "..") + "/a/one.jsonl"),
                          1.0))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_off_keeps_every_whole_line(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=300)) for _ in range(8000)]
    whole = jsonl(texts)
    packed = gzip.compress(whole, 1) if suffix == ".gz" else pyarrow.compress(
        whole, codec="zstd", asbytes=True)
    items = source_items(tmp_path, packed[:len(packed) // 2], f"rows.jsonl{suffix}")
    kept = [item.text for item in items if isinstance(item, Document)]
    assert kept == texts[:len(kept)] and len(kept) > 2000
    assert isinstance(items[-1],
                      Bad) and items[-1].reason == "file cut off or damaged" and len(items) == len(kept) + 1
    # no good byte before the cut is lost: the decompressor's own output decides
    if suffix == ".gz":
        good = zlib.decompressobj(wbits=31).decompress(packed[:len(packed) // 2])
        assert len(kept) == good.count(b"\n")
    items = source_items(tmp_path, b"this is not compressed at all", f"other.jsonl{suffix}")
    assert [item.reason for item in items if isinstance(item, Bad)] == ["file cut off or damaged"]
    assert source_items(tmp_path, b"PAR1 no",
                        "rows.parquet")[0].reason == "file cut off or damaged"  # type: ignore[union-attr]


def test_memory_stays_bounded_whatever_a_line_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(jsonl(["first"]))
        for _ in range(60):
            file.write(b"x" * 1_000_000)  # one line of 60 MB
        file.write(b"\n" + jsonl(["last"]))
    tracemalloc.start()
    items = list(read_all(open_source(DatasetConfig("set", str(path), 1.0, max_line_bytes=2_000_000))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(item).__name__ for item in items] == ["Document", "Bad", "Document"]
    assert items[2].place.recorded == "rows.jsonl:3"
    assert peak < 12_000_000


def test_rows_are_split_as_bytes_split_does() -> None:
    rng = random.Random(1)
    for _ in range(300):
        separator = rng.choice([b"\n", b"ab", b"\n\n\n"])
        text = bytes(rng.choices(b"ab\n", k=rng.randrange(60)))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(5)))
        blocks = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        limit = rng.choice([3, 100])
        wanted = text.split(separator)
        if wanted[-1] == b"":
            wanted.pop()
        found = list(split_rows(iter(blocks), separator, limit))
        assert [number for number, _ in found] == list(range(1, len(wanted) + 1))
        assert [None if isinstance(row, TooLong) else row for _, row in found] == [
            row if len(row) <= limit else None for row in wanted]


def test_a_gzip_bomb_and_an_unreadable_path_stay_small(tmp_path: Path) -> None:
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(bytes(20_000_000)))
    sizes = [len(block) for block in read_blocks(tmp_path / "zeros.gz")]
    assert sum(sizes) == 20_000_000 and max(sizes) <= 1 << 20
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        list(read_blocks(tmp_path))


def test_the_standard_library_as_code_and_as_prose() -> None:
    names = [name for name, _ in stdlib_files()]
    assert len(names) > 300 and names == sorted(names) and "json/decoder.py" in names
    assert not any(part in ("test", "tests", "idle_test", "site-packages") for name in names
                   for part in name.split("/"))
    source = ('"""Module."""\nclass A:\n    """Class.\n\n    More.\n    """\n'
              '    def f(self):\n        "Method."\ndef g(): pass\n')
    assert docstrings(source) == "Module.\n\nA\n\nClass.\n\nMore.\n\nA.f\n\nMethod."
    assert docstrings("x = 1\n") == ""
    with pytest.raises(ValueError, match="does not parse"):
        docstrings("def f(:\n")


def test_quickstart_sources_give_real_text(tmp_path: Path) -> None:
    datasets = [{"name": "code", "source": "python-stdlib", "format": "code"},
                {"name": "prose", "source": "python-stdlib", "format": "docstrings"},
                {"name": "packages", "source": "package-metadata"}]
    manifest = build_corpus(mixture(tmp_path / "mix.yaml", *datasets), tmp_path / "out", limit_mb=0.1)
    assert all(row["kept"] >= 3 for row in manifest["datasets"])
    rows = documents(tmp_path / "out")
    assert {row["source"] for row in rows} == {"code", "prose", "packages"}
    code = {row["id"].split("/", 1)[1]: row for row in rows if row["source"] == "code"}
    prose = [row for row in rows if row["source"] == "prose"]
    assert all(len(row["meta"]["derived_from"]) == 32 for row in prose)
    assert any(row["id"].split("/", 1)[1] in code for row in prose)
    packages = {row["id"].split("/", 1)[1]: row for row in rows if row["source"] == "packages"}
    assert all(row["meta"]["version"] == version(name) for name, row in packages.items())
    assert "Abseil" in packages["absl-py"]["text"]


def test_hub_datasets_through_the_datasets_library(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[Any] = []
    fake = types.ModuleType("datasets")

    def load_dataset(path: str, **keywords: Any) -> Iterator[dict[str, Any]]:
        asked.append((path, keywords))
        yield from ({"content": text, "url": "u"} for text in ["first", "", "third"])
        if keywords["split"] == "broken":
            raise ConnectionError("no route to host")
        if keywords["split"] == "script":
            raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    dataset = {
        "name": "hub", "source": "owner/set", "format": "huggingface", "text_field": "content",
        "subset": "en", "revision": "abc"
    }
    manifest = build_corpus(mixture(tmp_path / "mix.yaml", dataset), tmp_path / "out")
    assert asked == [("owner/set", {"name": "en", "split": "train", "streaming": True, "revision": "abc"})]
    assert manifest["datasets"][0]["dropped"] == {"empty text": 1}
    assert [row["id"]
            for row in documents(tmp_path / "out")] == ["hub/owner/set/train:1", "hub/owner/set/train:3"]
    with pytest.raises(DataError, match=r"(?s)no route to host.*hf download owner/set.*parquet"):
        build_corpus(mixture(tmp_path / "mix.yaml", {**dataset, "splits": ["broken"]}), tmp_path / "out")
    with pytest.raises(DataError, match=r"does not run any more .*set\.py.*Set in the mixture a revision that holds"):
        build_corpus(mixture(tmp_path / "mix.yaml", {**dataset, "splits": ["script"]}), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'nanollama\[data\]'"):
        build_corpus(mixture(tmp_path / "mix.yaml", dataset), tmp_path / "out")


def test_the_shared_wikipedia_file(tmp_path: Path, monkeypatch: Any) -> None:
    name = Path("shared") / "data" / "pretrain" / "wikipedia_en.jsonl.gz"
    path = next((folder / name for folder in Path(__file__).parents if (folder / name).exists()), None)
    if path is None:
        pytest.skip(f"{name} is not beside this checkout")
    monkeypatch.setenv("WIKIPEDIA", str(path.parent))
    dataset = {"name": "wikipedia", "source": "${WIKIPEDIA}/wikipedia_en.jsonl.gz", "id_field": "id"}
    manifest = build_corpus(mixture(tmp_path / "mix.yaml", dataset), tmp_path / "out", limit_mb=2)
    assert manifest["datasets"][0]["kept"] > 50
    assert str(path.parent) not in (tmp_path / "out"
                                    / "manifest.json").read_text()  # no machine's paths are recorded
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        wanted = [json.loads(next(file))["text"] for _ in range(50)]
    assert [row["text"] for row in documents(tmp_path / "out")][:50] == wanted
