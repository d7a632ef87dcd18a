"""The corpus in stages: each done once, in any process, stopped anywhere; lost and stale parts are found."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl
import pytest
from corpora import documents, files_of, jsonl, mixture
from killing import kill_when

from data_pipeline import filters
from data_pipeline.corpus import build_corpus
from data_pipeline.curation import corpus_format, curate, download, whole
from data_pipeline.explain import Corpus, describe
from data_pipeline.filters.base import Batch, Judgement, Parameters, keep_all
from data_pipeline.mixture import compile_plan
from data_pipeline.sources.files import FileReader
from data_pipeline.text.documents import text_digest
from nanollama.data.files import DataError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wise", "owls", "watch"]


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    made = [" ".join(rng.choices(WORDS, k=rng.randrange(5, 60))) for _ in range(count)]
    for index in range(5, count, 7):  # some texts come twice, some with a word more
        made[index] = made[index - 3] + (" again" if index % 2 else "")
    return made


def staged_mixture(tmp_path: Path, **top: Any) -> Path:
    """Three datasets of several raw shards, filters, duplicates within and across them."""
    for number, name in enumerate(("one", "two", "three")):
        lines = jsonl(texts(number % 2, 300), n=number, year=2000 + number) + b"broken\n"
        (tmp_path / f"{name}.jsonl").write_bytes(lines)
    section = {"deduplication": [{"type": "exact"}], **top}
    return mixture(tmp_path / "mix.yaml", *(
        {"name": name, "source": str(tmp_path / f"{name}.jsonl"), "max_loss": 1.0,
         "filters": [{"type": "length", "min_characters": 60}]} for name in ("one", "two", "three")), **section)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(corpus_format, "SHARD_BYTES", 15_000)


@pytest.mark.usefixtures("small_shards")
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    config = staged_mixture(tmp_path)
    one = build_corpus(config, tmp_path / "one_worker", workers=1)
    build_corpus(config, tmp_path / "two_workers", workers=2)
    files = files_of(tmp_path / "one_worker")
    assert files == files_of(tmp_path / "two_workers")
    assert len(one["shards"]) >= 5 and sum("decisions/" in name for name in files) > 20
    assert one["datasets"][2]["kept"] == 0 and one["datasets"][0]["dropped"]["broken JSON"] == 1
    wanted = {text for text in texts(0, 300) + texts(1, 300) if len(text) >= 60}
    assert sorted(row["text"] for row in documents(tmp_path / "one_worker")) == sorted(wanted)


@pytest.mark.usefixtures("small_shards")
def test_one_step_at_a_time_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = staged_mixture(tmp_path)
    build_corpus(config, tmp_path / "whole")
    calls: list[str] = []
    count(monkeypatch, calls)
    done: list[tuple[str, list[str]]] = []
    for step in ("download", "curate", "select", "sample", "full"):
        calls.clear()
        told = build_corpus(config, tmp_path / "steps", step=step)
        done.append((step, sorted(set(calls))))
        assert (tmp_path / "steps" / "manifest.json").exists() == (step == "full")
        assert json.loads((tmp_path / "steps" / "plan.json").read_text()) == compile_plan(config)
        assert told["datasets"][0]["rows_in"] == 301
    assert done == [("download", ["read"]), ("curate", ["exact", "length"]), ("select", []), ("sample", []),
                    ("full", [])]
    assert files_of(tmp_path / "steps") == files_of(tmp_path / "whole")
    with pytest.raises(DataError, match="--step=clean: known are download"):
        build_corpus(config, tmp_path / "steps", step="clean")


def count(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Note what is really done: reading, each filter's judging, each step's features."""
    read, judge, features = FileReader.__iter__, filters.LengthFilter.judge, whole.make_features

    def reading(self: FileReader) -> Iterator[Any]:
        calls.append("read")
        return read(self)

    def judging(self: Any, batch: Batch) -> Judgement:
        calls.append("length")
        return judge(self, batch)

    def making(task: Any) -> None:
        calls.append(task.plan.type)
        features(task)

    monkeypatch.setattr(FileReader, "__iter__", reading)
    monkeypatch.setattr(filters.LengthFilter, "judge", judging)
    monkeypatch.setattr(whole, "make_features", making)


@pytest.mark.usefixtures("small_shards")
def test_a_change_redoes_what_depends_on_it_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = staged_mixture(tmp_path)
    build_corpus(config, tmp_path / "out")
    calls: list[str] = []
    count(monkeypatch, calls)
    value = json.loads(config.read_text())
    value["datasets"][1]["filters"].append({"type": "length", "max_characters": 200})
    config.write_text(json.dumps(value))
    build_corpus(config, tmp_path / "out")
    shards = len(pyarrow_files(tmp_path / "out" / "decisions" / "two", "01-length"))
    assert shards > 1 and calls.count("length") == shards and "read" not in calls and "exact" in calls
    # the same as made from nothing: nothing stale is left behind, nothing of the old run is used
    monkeypatch.undo()
    monkeypatch.setattr(download, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(corpus_format, "SHARD_BYTES", 15_000)
    build_corpus(config, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def pyarrow_files(folder: Path, name: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*.parquet") if path.name.startswith(name))


@pytest.mark.usefixtures("small_shards")
def test_a_part_lost_between_steps_is_made_again_and_a_changed_one_is_named(tmp_path: Path) -> None:
    config = staged_mixture(tmp_path)
    build_corpus(config, tmp_path / "whole")
    output = tmp_path / "out"
    build_corpus(config, output, step="curate")
    raw = sorted((output / ".cache" / "raw").rglob("*.parquet"))
    raw[1].unlink()  # a shard that disappears between steps
    pyarrow_files(output / "decisions" / "two", "00-length")[0].unlink()
    build_corpus(config, output)
    assert files_of(output) == files_of(tmp_path / "whole")
    shutil.rmtree(output / "shards")
    for path in raw:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 255
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"0000\d\.parquet: changed since it was made .*Delete it"):
        build_corpus(config, output)
    for path in raw:
        path.unlink()
    build_corpus(config, output)
    assert files_of(output) == files_of(tmp_path / "whole")


def test_a_source_changed_under_way_is_read_again(tmp_path: Path) -> None:
    config = staged_mixture(tmp_path)
    build_corpus(config, tmp_path / "out", step="curate")
    (tmp_path / "one.jsonl").write_bytes(jsonl(["a new text, long enough to pass the filter of sixty characters here"]))
    build_corpus(config, tmp_path / "out")
    assert [row["text"][:10] for row in documents(tmp_path / "out") if row["source"] == "one"] == ["a new text"]
    (tmp_path / "one.jsonl").unlink()
    with pytest.raises(DataError, match="dataset one: no file at"):
        build_corpus(config, tmp_path / "out")


def test_killed_at_any_moment_gives_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 of a run with two workers, when it has written some of its files; then it goes on to the same bytes."""
    config = staged_mixture(tmp_path)
    program = ("import sys, data_pipeline.corpus as c\n"
               "from data_pipeline.curation import corpus_format as f, download as d\n"
               "d.SHARD_BYTES, f.SHARD_BYTES = 10_000, 15_000\n"
               "if __name__ == '__main__': c.build_corpus(sys.argv[1], sys.argv[2], workers=2)\n")
    script = tmp_path / "run.py"
    script.write_text(program)

    def start(output: Path) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen([sys.executable, str(script), str(config), str(output)], stderr=subprocess.DEVNULL,
                                env={**os.environ, "PYTHONPATH": path})

    assert start(tmp_path / "whole").wait() == 0
    wanted = files_of(tmp_path / "whole")
    out = tmp_path / "out"
    for files in (len(wanted) // 5, len(wanted) // 2):
        kill_when(lambda least=files: len(list(out.rglob("*"))) >= least,
                  lambda: start(out), lambda: shutil.rmtree(out))
    assert start(out).wait() == 0
    assert files_of(out) == wanted


def test_a_capped_head_reads_on_until_its_filters_leave_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"row {number} " + ("long " * 20 if number % 5 == 0 else "") for number in range(4000)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(lines))
    config = mixture(tmp_path / "mix.yaml", {
        "name": "set", "source": str(tmp_path / "rows.jsonl"), "max_bytes": 20_000, "cap_order": "head",
        "filters": [{"type": "length", "min_characters": 50}]})
    manifest = build_corpus(config, tmp_path / "out")
    kept = [row["text"] for row in documents(tmp_path / "out")]
    assert kept == [line for line in lines if len(line) >= 50][:len(kept)]
    assert 19_800 < sum(map(len, kept)) <= 20_000
    assert manifest["datasets"][0]["rows_in"] < 3000  # and no further than needed
    for number in range(4):  # the same in files that are parts of their own
        (tmp_path / f"part{number}.jsonl").write_bytes(jsonl(lines[number * 1000:number * 1000 + 1000]))
    monkeypatch.setattr("data_pipeline.sources.files.PART_BYTES", 1)
    parts = mixture(tmp_path / "parts.yaml", {**json.loads(config.read_text())["datasets"][0],
                                              "source": str(tmp_path / "part*.jsonl")})
    assert build_corpus(parts, tmp_path / "parts")["datasets"][0]["inputs"]["count"] == 4
    assert [row["text"] for row in documents(tmp_path / "parts")] == kept
    # what an earlier run read further, for a stricter filter, is not taken: the bytes are those of a fresh run
    value = json.loads(config.read_text())
    value["datasets"][0]["filters"] = []
    config.write_text(json.dumps(value))
    build_corpus(config, tmp_path / "out")
    build_corpus(config, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@dataclasses.dataclass(frozen=True)
class Shout(Parameters):
    """Rewrites: upper case; leaves nothing of texts that start with "gone"."""

    type: Literal["shout"] = "shout"
    version: ClassVar[int] = 1

    def judge(self, batch: Batch) -> Judgement:
        new = batch.text.str.to_uppercase()
        new = pl.select(pl.when(batch.text.str.starts_with("gone")).then(pl.lit(" ")).otherwise(new)).to_series()
        return Judgement(keep_all(batch), {"letters": batch.text.str.len_chars()}, new)


def test_texts_that_filters_rewrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(filters.FILTERS, "shout", Shout)
    curate._made.cache_clear()
    (tmp_path / "rows.jsonl").write_bytes(jsonl(["small letters", "ALREADY LARGE", "gone soon", "Small Letters"]))
    (tmp_path / "module.py").write_text('"""Prose that is made from code."""')
    config = mixture(tmp_path / "mix.yaml", {
        "name": "set", "source": str(tmp_path / "rows.jsonl"),
        "filters": [{"type": "shout"}, {"type": "exact_duplicate"}, {"type": "length", "min_characters": 3}]},
        {"name": "prose", "source": str(tmp_path / "module.py"), "format": "docstrings"})
    row = build_corpus(config, tmp_path / "out")["datasets"][0]
    assert row["dropped"] == {"empty after shout": 1, "exact duplicate": 1}  # duplicates of the new text
    found = documents(tmp_path / "out")
    assert [one["text"] for one in found] == ["SMALL LETTERS", "ALREADY LARGE", "Prose that is made from code."]
    assert row["bytes"] == 26 and row["characters"] == 26
    assert found[0]["meta"] == {"attributes": {"letters": 13}, "derived_from": text_digest(b"small letters").hex()}
    assert found[1]["meta"] == {"attributes": {"letters": 13}}
    # the new texts are content of the cache: when they are lost, the filter is asked again, never left out
    shutil.rmtree(tmp_path / "out" / ".cache" / "texts")
    (tmp_path / "out" / "manifest.json").unlink()
    build_corpus(config, tmp_path / "out")
    assert documents(tmp_path / "out") == found


def test_a_step_that_forgets_documents_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = staged_mixture(tmp_path)
    step = whole._made("deduplication", '{"type":"exact"}')
    resolve = type(step).resolve
    monkeypatch.setattr(type(step), "resolve", lambda self, files, work: (
        table.slice(1) for table in resolve(self, files, work)))
    with pytest.raises(DataError, match=r"step exact judged .*rows are lost"):
        build_corpus(config, tmp_path / "out")


def test_a_source_that_a_step_empties_stops_the_run(tmp_path: Path) -> None:
    value = json.loads(staged_mixture(tmp_path).read_text())
    del value["datasets"][2]["max_loss"]
    (tmp_path / "mix.yaml").write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"dataset three: \d+ of 301 rows are dropped .*exact duplicate: .*max_loss"):
        build_corpus(tmp_path / "mix.yaml", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_share_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl([f"document {number}" for number in range(1000)]))
    config = mixture(tmp_path / "mix.yaml", {"name": "set", "source": str(tmp_path / "rows.jsonl"),
                                             "sampling": {"rate": 0.05}})
    row = build_corpus(config, tmp_path / "out")["datasets"][0]
    assert 30 <= row["kept"] <= 70
    assert row["dropped"] == {"not sampled": 1000 - row["kept"]}  # no loss: it was asked for
    assert (tmp_path / "out" / "dropped.jsonl").read_bytes() == b""


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(jsonl(["one text"]))
    config = mixture(tmp_path / "mix.yaml", {"name": "set", "source": str(tmp_path / "files" / "*.jsonl")})
    build_corpus(config, tmp_path / "out")
    assert [row["id"] for row in documents(tmp_path / "out")] == ["set/caf\\xe9.jsonl:1"]


def test_every_step_takes_shards_of_no_documents(tmp_path: Path) -> None:
    """One dataset loses all it has to its filter; the steps over the whole corpus see its empty shards."""
    value = json.loads(staged_mixture(tmp_path).read_text())
    value["datasets"][1]["filters"] = [{"type": "length", "min_characters": 10_000}]
    (tmp_path / "bench.yaml").write_text(f"sets: [{{name: own, path: {tmp_path}/items.jsonl, fields: [text]}}]")
    few = " ".join(texts(0, 20)[9].split()[3:12])
    (tmp_path / "items.jsonl").write_bytes(jsonl([texts(0, 20)[2], few, "far too short"]))
    value |= {"deduplication": [{"type": "exact"}, {"type": "minhash"}, {"type": "simhash"}],
              "decontamination": [{"type": "decontaminate", "benchmarks": str(tmp_path / "bench.yaml")}],
              "selection": [{"type": "dsir", "target": ["one"]}, {"type": "quality", "attribute": "n"},
                            {"type": "temporal"}, {"type": "curriculum", "attribute": "n"}]}
    (tmp_path / "mix.yaml").write_text(json.dumps(value))
    manifest = build_corpus(tmp_path / "mix.yaml", tmp_path / "out")
    assert [row["kept"] for row in manifest["datasets"]][1] == 0 and manifest["datasets"][0]["kept"] > 20
    assert manifest["datasets"][0]["dropped"]["contaminated by own"] >= 2
    assert [step["type"] for step in manifest["steps"]] == [
        "exact", "minhash", "simhash", "decontaminate", "dsir", "quality", "temporal", "curriculum"]
    assert manifest["steps"][3]["summary"]["sets"]["own"]["status"] == "used"
    card = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert re.search(r"own +\|  +2 \|  +1 \|  +1 \|  +1 \|\n\| total +\|  +2 \|", card)
    corpus = Corpus(tmp_path / "out")
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    ids = {row["id"] for row in documents(tmp_path / "out")} | {f"{row['dataset']}/{row['id']}" for row in dropped}
    details = {reason: [row["detail"] for row in dropped if row["reason"] == reason]
               for reason in ("exact duplicate", "near duplicate", "contaminated by own", "shorter than 60 characters")}
    assert all(detail.removeprefix("of ") in ids for detail in details["exact duplicate"] + details["near duplicate"])
    assert details["exact duplicate"] and details["near duplicate"]
    assert set(details["shorter than 60 characters"]) == {""}
    assert all(re.match("own/[01]: [a-z ]{20}", detail) for detail in details["contaminated by own"])
    told = [describe(corpus.explain(f"{row['dataset']}/{row['id']}")) for row in dropped
            if row["reason"] == "contaminated by own"]
    assert any(re.search(r"^  hit +whole: own/1 \(text\), ", text, re.MULTILINE) for text in told)
