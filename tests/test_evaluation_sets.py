"""Lists of evaluation sets are strict, every layout of their files is read, and none is read as empty."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.decontaminate.evaluation_sets import EvaluationSet, choose, find, load_list, read_items
from nanollama.data.files import DataError

SHARED = Path(os.environ.get("NANOLLAMA_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.parametrize("text, message", [
    ("sets:\n  - {name: a, path: x, fields: [q]}\n  - {name: a, path: y, fields: [q]}\n", r":3: sets\[1\].name: 'a'"),
    ("sets:\n  - {name: a, path: x, fields: []}\n", r":2: sets\[0\].fields: is empty"),
    ("sets:\n  - name: a\n    path: x\n    field: [q]\n", r":4: sets\[0\].field: no such field. Did you mean 'f"),
])
def test_a_list_is_strict(tmp_path, text, message):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_list(path)


def test_a_list_that_changes_is_read_again(tmp_path):
    path = tmp_path / "list.yaml"
    for name in ("a", "b"):  # of one length, within the clock's grain
        path.write_text(f"sets:\n  - {{name: {name}, path: x, fields: [q]}}\n")
        assert list(load_list(path)) == [name]


def read(tmp_path, content, name="set.json", **fields):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return [(item.id, item.field, item.text) for item in read_items(find(EvaluationSet("s", str(path), **fields)))]


def test_layouts_of_sets(tmp_path):
    rows = [("s/0", "q", "a\u2028b"), ("s/0", "c", "x\ny"), ("s/1", "q", "z"), ("s/1", "c", "1")]
    lines = '{"q": "a\u2028b", "c": ["x", "y"]}\n\n{"q": "z", "c": [1]}\n'
    assert read(tmp_path, lines, fields=("q", "c")) == rows
    assert read(tmp_path, lines, "set.jsonl.gz", fields=("q", "c")) == rows
    (tmp_path / "set.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
    assert list(read_items(find(EvaluationSet("s", str(tmp_path / "set.jsonl.zst"), ("q", "c"))))) == rows
    table = pyarrow.Table.from_pylist([{"q": "a\u2028b", "c": ["x", "y"]}, {"q": "z", "c": ["1"]}])
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / "test.parquet")
    assert list(read_items(find(EvaluationSet("s", str(tmp_path / "hub" / "**" / "*.parquet"), ("q", "c"))))) == rows
    whole = json.dumps({"data": [{"p": [{"q": "a"}, {"q": "b"}]}, {"p": [{"q": "c", "w": None}]}]}, indent=1)
    assert [row[2] for row in read(tmp_path, whole, items="data.p", fields=("q",))] == ["a", "b", "c"]
    assert read(tmp_path, json.dumps({"t": [[{"role": "user", "content": "hi"}]]}), fields=("t.content",)) == [
        ("s/0", "t.content", "hi")]


def test_a_set_read_as_empty_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none of its 1 items has text in the field 'answer'"):
        read(tmp_path, '{"q": "a"}\n', fields=("q", "answer"))
    with pytest.raises(DataError, match=r"set.json:2: not JSON"):
        read(tmp_path, '{"q": "a"}\n{"q": \n', fields=("q",))
    with pytest.raises(DataError, match=r"neither JSON Lines nor a JSON document"):
        read(tmp_path, "{\n oh\n", fields=("q",))
    with pytest.raises(DataError, match=r"neither JSON Lines nor a JSON document"):
        read(tmp_path, "", fields=("q",))


def test_a_set_that_is_cut_off_is_no_set(tmp_path):
    rows = [{"q": f"question {number} {number ** 9}"} for number in range(500)]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:len(packed) // 2])
    with pytest.raises(DataError, match=r"cut.jsonl.gz:\d+: gzip data is cut off. Fetch the file again"):
        list(read_items(find(EvaluationSet("s", str(tmp_path / "cut.jsonl.gz"), ("q",)))))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.parquet: cannot be read as Parquet"):
        list(read_items(find(EvaluationSet("s", str(tmp_path / "cut.parquet"), ("q",)))))
    assert find(EvaluationSet("s", str(tmp_path), ("q",))).status == "missing"  # a folder is no file


def test_the_projects_list_reads_real_sets(monkeypatch):
    if not (SHARED / "eval").is_dir():
        pytest.skip(f"no evaluation sets in {SHARED}")
    monkeypatch.setenv("NANOLLAMA_DATA", str(SHARED))
    sets = choose(("squad", "gsm8k", "bigbench", "tool-use"))
    counts = {one.name: sum(1 for _ in read_items(find(one))) for one in sets}
    assert counts["gsm8k"] == 2 * 1319 and min(counts.values()) > 2000
    assert all(find(one).status == "used" for one in choose(()))
