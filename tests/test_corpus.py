"""The corpus command: every kind of broken input, kills, filters, and the account of rows."""

import datetime
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from corpora import documents, files_of, jsonl, mixture, small_mixture

from data_pipeline.corpus import _main as corpus_main
from data_pipeline.corpus import build_corpus
from data_pipeline.curation import corpus_format, curate, shards, whole
from data_pipeline.engine.progress import Progress
from data_pipeline.engine.stage import command
from data_pipeline.sources.files import FileReader
from nanollama.data.files import DataError

BROKEN_LINES = {
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "cut': "broken JSON",
    b'["a list"]': "not a JSON object",
    b'{"txt": "a"}': "no field 'text'",
    b'{"text": null}': "missing text",
    b'{"text": 7}': "text is not a string",
    b'{"text": " \\n "}': "empty text",
    b'{"text": "a\\u0000b"}': "NUL character in the text",
    b'{"text": "\\ud800"}': "lone surrogate in the text",
    b'{"\\ud800": "a name that is no text"}': "no field 'text'",
    b"[" * 100_000: "broken JSON",  # nested too deep for the parser
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "broken JSON",  # an integer too long to convert
    b'{"text": "' + b"x" * 200_000 + b'"}': "line over max_line_bytes",
}


def test_each_broken_line_is_named_counted_and_costs_nothing_else(tmp_path: Path, capsys: Any) -> None:
    lines: list[bytes] = []
    for line in BROKEN_LINES:
        good = b'{"text": "good %d", "\\udfff": 1, "of": "\\udfff"}'  # what cannot be stored is not kept beside a text
        lines += [good % len(lines), line]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    config = mixture(tmp_path / "mix.yaml",
                     {"name": "set", "source": str(tmp_path / "rows.jsonl"), "max_line_bytes": 150_000})
    manifest = build_corpus(config, tmp_path / "out")
    row = manifest["datasets"][0]
    assert row["rows_in"] == len(lines) and row["kept"] == len(BROKEN_LINES)
    assert row["dropped"] == {
        reason: list(BROKEN_LINES.values()).count(reason) for reason in BROKEN_LINES.values()
    }
    assert [one["text"]
            for one in documents(tmp_path / "out")] == [f"good {2 * n}" for n in range(len(BROKEN_LINES))]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().split("\n")[:-1]]
    assert [(one["place"], one["reason"]) for one in dropped] == [
        (f"rows.jsonl:{2 * n + 2}", reason) for n, reason in enumerate(BROKEN_LINES.values())]
    assert f"skipped {tmp_path}/rows.jsonl:2: not UTF-8 (byte 13 of the line is 0xe9)" in capsys.readouterr(
    ).err
    card = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert "| set     | broken JSON " in card and "| 1 |" not in card.split("##")[0]


def test_on_error_stop_and_too_much_loss(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(["a good one"]) + b"oops\n" * 19)
    dataset = {"name": "set", "source": str(path)}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: broken JSON .*on_error: skip"):
        build_corpus(mixture(tmp_path / "mix.yaml", {**dataset, "on_error": "stop"}), tmp_path / "out")
    with pytest.raises(DataError, match=r"19 of 20 rows are dropped \(95.0%, allowed 90%\): broken JSON: 19"):
        build_corpus(mixture(tmp_path / "mix.yaml", dataset), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert build_corpus(mixture(tmp_path / "mix.yaml", {**dataset, "max_loss": 1.0}), tmp_path / "out")


def test_an_empty_corpus_stops(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no rows"):
        build_corpus(mixture(tmp_path / "mix.yaml", {"name": "set", "source": str(path)}), tmp_path / "out")
    path.write_bytes(jsonl(["short"]))
    dataset = {
        "name": "set", "source": str(path), "max_loss": 1.0,
        "filters": [{"type": "length", "min_characters": 10}]
    }
    with pytest.raises(DataError, match=r"(?s)the corpus is empty.*shorter than 10 characters"):
        build_corpus(mixture(tmp_path / "mix.yaml", dataset), tmp_path / "out")


def test_filters_duplicates_and_ids(tmp_path: Path) -> None:
    rows = [("1", "a text of some length"), ("2", "short"), ("3", "a text of some length"),
            ("1", "an id again, new text"), ("4", "x" * 80), ("5", "a text of some length ")]
    (tmp_path / "one.jsonl").write_bytes(b"".join(jsonl([text], key=key) for key, text in rows))
    (tmp_path / "two.jsonl").write_bytes(jsonl(["a text of some length", "only in the second"]))
    filters = [{"type": "length", "min_characters": 6, "max_characters": 50}, {"type": "exact_duplicate"}]
    manifest = build_corpus(
        mixture(tmp_path / "mix.yaml",
                {"name": "one", "source": str(tmp_path / "one.jsonl"), "id_field": "key", "filters": filters},
                {"name": "two", "source": str(tmp_path / "two.jsonl"), "filters": filters},
                {"name": "three", "source": str(tmp_path / "two.jsonl")}), tmp_path / "out")
    assert [row["dropped"] for row in manifest["datasets"]] == [{
        "shorter than 6 characters": 1, "exact duplicate": 1, "duplicate id": 1,
        "longer than 50 characters": 1
    }, {"exact duplicate": 1}, {}]
    assert [row["id"] for row in documents(tmp_path / "out")] == [
        "one/1", "one/5", "two/two.jsonl:2", "three/two.jsonl:1", "three/two.jsonl:2"]


def test_max_bytes_takes_an_even_sample_by_hash(tmp_path: Path) -> None:
    texts = [f"document number {number} " + "y" * (number % 50) for number in range(2000)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "backwards.jsonl").write_bytes(jsonl(texts[::-1] + texts))
    dataset = {"name": "set", "max_bytes": 20_000, "filters": [{"type": "exact_duplicate"}]}
    kept = {}
    for name in ("rows", "backwards"):
        build_corpus(
            mixture(tmp_path / f"{name}.yaml", {**dataset, "source": str(tmp_path / f"{name}.jsonl")}),
            tmp_path / name)
        kept[name] = [row["text"] for row in documents(tmp_path / name)]
    assert 19_900 < sum(len(text.encode()) for text in kept["rows"]) <= 20_000
    assert sorted(kept["rows"]) == sorted(kept["backwards"])  # the texts decide, not their order
    numbers = [texts.index(text) for text in kept["rows"]]
    assert numbers == sorted(
        numbers) and 800 < sum(numbers) / len(numbers) < 1200  # order kept, evenly spread
    head = {**dataset, "cap_order": "head", "source": str(tmp_path / "rows.jsonl")}
    build_corpus(mixture(tmp_path / "head.yaml", head), tmp_path / "head")
    first = [row["text"] for row in documents(tmp_path / "head")]
    assert first == texts[:len(first)] and len("".join([*first, texts[len(first)]])) > 20_000


def test_same_inputs_same_bytes_and_a_second_run_does_nothing(tmp_path: Path, monkeypatch: Any,
                                                              capsys: Any) -> None:
    monkeypatch.setattr(corpus_format, "SHARD_BYTES", 50_000)
    config = small_mixture(tmp_path)
    build_corpus(config, tmp_path / "a")
    build_corpus(config, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert len(list((tmp_path / "a" / "shards").iterdir())) > 6
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.json*")}
    capsys.readouterr()
    build_corpus(config, tmp_path / "a")
    assert "nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.json*")}
    # one changed byte in the output is found and mended; one in the input gives another corpus
    shard = tmp_path / "a" / "shards" / "part-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"one 0", b"one O"))
    build_corpus(config, tmp_path / "a")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    (tmp_path / "one.jsonl").write_bytes((tmp_path / "one.jsonl").read_bytes() + jsonl(["one more"]))
    assert build_corpus(config, tmp_path / "a")["datasets"][0]["kept"] == 401


def test_parquet_shards_hold_the_same_documents(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(corpus_format, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(corpus_format, "GROUP_CHARACTERS", 20_000)
    monkeypatch.setattr(corpus_format, "READ_ROWS", 7)
    rows = [{"text": f"dated {number} {'y' * 300}", "when": datetime.date(2020, 1, 1 + number % 28), "n": number}
            for number in range(300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "dated.parquet")
    (tmp_path / "plain.jsonl").write_bytes(jsonl([f"plain {number}" for number in range(50)], k="\u00e9\u2028"))
    config = mixture(tmp_path / "mix.yaml",
                     {"name": "dated", "source": str(tmp_path / "dated.parquet"), "date_field": "when"},
                     {"name": "plain", "source": str(tmp_path / "plain.jsonl")})
    lines = build_corpus(config, tmp_path / "out")
    assert {Path(shard["path"]).suffix for shard in lines["shards"]} == {".jsonl"}
    wanted = documents(tmp_path / "out")
    assert wanted[29] == {"id": "dated/dated.parquet:30", "text": rows[29]["text"], "source": "dated",
                          "date": "2020-01-02", "meta": {"n": 29}}
    assert wanted[-1]["meta"] == {"k": "\u00e9\u2028"} and "date" not in wanted[-1]
    manifest = build_corpus(config, tmp_path / "out", shard_format="parquet")  # in place of the other
    assert len(manifest["shards"]) == len(lines["shards"]) > 2
    assert {path.suffix for path in (tmp_path / "out" / "shards").iterdir()} == {".parquet"}
    assert documents(tmp_path / "out") == wanted
    build_corpus(config, tmp_path / "again", shard_format="parquet")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
    shard = tmp_path / "out" / manifest["shards"][1]["path"]
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match=r"part-00001\.parquet: changed since it was made \(SHA-256"):
        documents(tmp_path / "out")
    build_corpus(config, tmp_path / "out", shard_format="parquet")
    assert documents(tmp_path / "out") == wanted
    with pytest.raises(DataError, match="--format=csv: known are jsonl, parquet"):
        build_corpus(config, tmp_path / "out", shard_format="csv")


def test_stopped_anywhere_and_run_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(corpus_format, "SHARD_BYTES", 50_000)
    config = small_mixture(tmp_path)
    build_corpus(config, tmp_path / "whole")
    wanted = files_of(tmp_path / "whole")
    read = []
    original = FileReader.__iter__

    def counting(self: FileReader) -> Iterator[Any]:
        read.append(self.dataset.name)
        return original(self)

    class Killed(BaseException):
        pass

    for step in range(0, 40, 3):  # die at the n-th rename, whatever it moves
        output = tmp_path / f"killed{step}"
        with monkeypatch.context() as patch:
            calls = {"left": step}
            replace = os.replace

            def dying(*arguments: Any, calls: dict[str, int] = calls, replace: Any = replace) -> None:
                if calls["left"] == 0:
                    raise Killed
                calls["left"] -= 1
                replace(*arguments)

            patch.setattr(os, "replace", dying)
            with pytest.raises(Killed):
                build_corpus(config, output)
        assert not (output / "manifest.json").exists()
        with monkeypatch.context() as patch:
            read.clear()
            patch.setattr(FileReader, "__iter__", counting)
            build_corpus(config, output)
        assert files_of(output) == wanted, step
        # the plan, then raw shard and marker: two renames a dataset, and it is not read again
        finished = max(step - 1, 0) // 2
        assert read == ["one", "two", "three"][finished:]


def test_kill_9_and_a_second_run_at_the_same_time(tmp_path: Path) -> None:
    config = small_mixture(tmp_path)
    build_corpus(config, tmp_path / "whole")
    command = [
        sys.executable, "-m", "data_pipeline.corpus", f"--config={config}", f"--output={tmp_path / 'out'}"
    ]
    slow = ("import sys, time, data_pipeline.corpus as c, data_pipeline.curation.corpus_format as f\n"
            "original = f.ShardWriter.write\n"
            "def write(self, *document):\n"
            "    original(self, *document)\n"
            "    print('writing', flush=True)\n"
            "    if sys.stdin.readline() == 'stay\\n':\n"
            "        time.sleep(600)\n"
            "f.ShardWriter.write = write\n"
            f"c.build_corpus({str(config)!r}, {str(tmp_path / 'out')!r})\n")
    process = subprocess.Popen([sys.executable, "-c", slow],
                               stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"go on\n" * 19 + b"stay\n")
    process.stdin.close()
    for _ in range(20):
        process.stdout.readline()
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and f"in use by process {process.pid}" in second.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert "| total" in done.stdout and "1,200" in done.stdout


def test_analyze_only_writes_nothing_and_limit_reads_little(tmp_path: Path) -> None:
    config = small_mixture(tmp_path)
    manifest = build_corpus(config, None, analyze_only=True)
    assert [row["kept"] for row in manifest["datasets"]] == [400, 400, 400]
    with pytest.raises(DataError, match="--output is missing"):
        build_corpus(config, None)
    limited = build_corpus(config, tmp_path / "out", limit_mb=0.01)
    assert [row["bytes"]
            for row in limited["datasets"]] <= [10_000] * 3 and limited["datasets"][0]["kept"] == 32
    for wrong in (0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="above 0"):
            build_corpus(config, tmp_path / "out", limit_mb=wrong)
    with pytest.raises(DataError, match="--workers=0: give 1 or more"):
        build_corpus(config, tmp_path / "out", workers=0)


@pytest.mark.parametrize("there", ["shards/mine.jsonl", ".cache/other/data", "decisions/mine.txt", "manifest.json"])
def test_what_others_made_is_not_removed(tmp_path: Path, there: str) -> None:
    """A corpus replaces its shards and tidies its cache: only where they are its own."""
    config, output = small_mixture(tmp_path), tmp_path / "out"
    mine = output / there
    mine.parent.mkdir(parents=True)
    mine.write_text('{"kind": "packed"}')
    with pytest.raises(DataError, match=f"{output}/{there.split('/')[0]}: is there already and was made by something"):
        build_corpus(config, output)
    assert mine.read_text() == '{"kind": "packed"}'
    (tmp_path / "other").mkdir()
    mine.rename(tmp_path / "other" / "notes.txt")  # beside a corpus anything else may be
    build_corpus(config, tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").exists()


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.jsonl", "{}\n".encode("utf-16"), "byte 0 of the line is 0xff; it looks like UTF-16"),
    ("a.txt", "caf\xe9".encode("latin-1"), r"byte 3 is 0xe9\)"),
    ("a.jsonl", gzip.compress(b"{}\n" * 9, mtime=0), "it looks like gzip: name the file .gz"),
    ("a.jsonl", b'{"text": ["a"]}\n', r"text is not a string \(list\)"),
])
def test_what_the_bytes_are_is_said_where_it_is_known(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    config = mixture(tmp_path / "mix.yaml", {"name": "set", "source": str(tmp_path / name), "on_error": "stop"})
    with pytest.raises(DataError, match=words):
        build_corpus(config, tmp_path / "out")


def test_an_output_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match=f"{output}: is no directory that can be written"):
            build_corpus(small_mixture(tmp_path), output)


def test_analyze_only_leaves_nothing_when_it_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    slow = ("import sys, time, data_pipeline.corpus as c\n"
            "c.Run.steps = lambda *_: print('curated', flush=True) or time.sleep(60)\n"
            f"sys.argv = ['corpus', '--config={small_mixture(tmp_path)}', '--analyze-only']\n"
            "c.command(c._main)\n")
    run = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                           env={**os.environ, "TMPDIR": str(tmp_path / "temporary")})
    assert run.stdout is not None and run.stdout.readline() == b"curated\n"
    assert list((tmp_path / "temporary").iterdir())
    run.terminate()
    assert run.wait(30) == 128 + signal.SIGTERM
    run.stdout.close()
    assert not list((tmp_path / "temporary").iterdir())


def test_the_account_catches_a_lost_row(tmp_path: Path, monkeypatch: Any) -> None:
    """A stage that forgets rows, anywhere, stops the run."""
    rows = jsonl(["a good text", "no", "a good text", "another"]) + b"broken\n"
    (tmp_path / "rows.jsonl").write_bytes(rows)
    config = mixture(tmp_path / "mix.yaml", {
        "name": "set", "source": str(tmp_path / "rows.jsonl"),
        "filters": [{"type": "length", "min_characters": 3}, {"type": "exact_duplicate"}]})
    row = build_corpus(config, tmp_path / "out")["datasets"][0]
    assert row["rows_in"] == 5 and row["kept"] == 2
    assert [(stage["stage"], stage["rows_in"], stage["kept"]) for stage in row["stages"]] == [
        ("read", 5, 4), ("length", 4, 3), ("exact-duplicate", 3, 2)]
    original = shards.sidecar_table

    def loses_the_last(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options).slice(0, 2)

    for module in (curate, whole):
        with monkeypatch.context() as patch:
            patch.setattr(module, "sidecar_table", loses_the_last)
            with pytest.raises(DataError, match="rows are lost"):
                build_corpus(config, tmp_path / module.__name__)


def test_a_variable_of_a_step_that_is_not_set_is_one_message(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a text"]))
    config = mixture(tmp_path / "mix.yaml", {"name": "a", "source": str(tmp_path / "a.jsonl")},
                     selection=[{"type": "dsir", "target": ["${NOT_SET_ANYWHERE}/target.jsonl"]}])
    monkeypatch.setattr(sys, "argv", ["corpus", f"--config={config}", f"--output={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as caught:
        command(corpus_main)
    assert caught.value.code == 1
    assert re.match("error: target: the environment has no variable NOT_SET_ANYWHERE .*export", capsys.readouterr().err)


def test_a_missing_or_changed_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no finished corpus there.*data_pipeline\.corpus --config"):
        corpus_format.read_manifest(tmp_path)
    build_corpus(small_mixture(tmp_path), tmp_path / "out")
    shard = tmp_path / "out" / "shards" / "part-00001.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"two 7 ", b"two 8 "))
    with pytest.raises(DataError, match=r"part-00001\.jsonl: changed since it was made"):
        documents(tmp_path / "out")
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        documents(tmp_path / "out")


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys: Any) -> None:
    with Progress("corpus") as progress:
        progress.update("code", 0.25, "1 MB")
        progress.update("code", 1.0, "4 MB", force=True)
        progress._next = time.monotonic() - 1
        progress.update("prose", None, "1 MB")
    assert capsys.readouterr().err == "corpus: code 100% 4 MB\ncorpus: prose 1 MB\n"
