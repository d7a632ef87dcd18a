"""The phases of a curriculum: each is packed by itself, and all of them hold the corpus."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from corpora import documents, mixture
from packed_sets import make_tokenizer

from data_pipeline.corpus import build_corpus
from data_pipeline.pack import _main as pack_main
from data_pipeline.pack import pack_phases
from nanollama.data.files import DataError
from nanollama.data.packed import PackedSet, verify

WORDS = ["easy words here", "harder words stand there", "the hardest of all words are these"]
OPTIONS: dict[str, Any] = {"record_length": 64, "validation_fraction": 0.1}


def build(folder: Path, **top: Any) -> Path:
    """A corpus of two datasets of 150 documents, whose field `hard` is 0, 1 or 2."""
    for name in ("one", "two"):
        rows = [{"text": f"{name} {number}: {WORDS[number % 3]}", "hard": number % 3} for number in range(150)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = mixture(folder / "mix.yaml", *(
        {"name": name, "source": str(folder / f"{name}.jsonl"), "mix_ratio": ratio,
         "filters": [{"type": "length", "min_characters": 20}]} for name, ratio in (("one", 0.8), ("two", 0.2))), **top)
    build_corpus(config, folder / "corpus")
    make_tokenizer(folder / "tokenizer")
    return folder / "corpus"


def test_a_set_for_each_phase_of_a_curriculum(tmp_path: Path, capsys: Any) -> None:
    corpus = build(tmp_path, selection=[{"type": "curriculum", "attribute": "hard", "phases": 3}])
    texts = {row["id"]: row["text"] for row in documents(corpus)}
    made = pack_phases(corpus, tmp_path / "tokenizer", tmp_path / "packed", **OPTIONS)
    seen: list[str] = []
    for number, (name, sets) in enumerate(made.items()):
        assert name == f"phase-{number}" and list(sets) == [""]
        verify(tmp_path / "packed" / name)
        table = pyarrow.parquet.read_table(tmp_path / "packed" / name / "docs.parquet")
        found = table.column("doc_id").to_pylist()
        assert len(found) > 80 and all(texts[doc].endswith(WORDS[number]) for doc in found)
        rows = sets[""]["rows"]["one"]
        assert rows["rows_in"] == rows["kept"] + sum(rows["dropped"].values())
        seen += found
    assert sorted(seen) == sorted(texts) and len(made) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pack", f"--corpus={corpus}", f"--tokenizer={tmp_path / 'tokenizer'}",
                                    f"--output={tmp_path / 'each'}", "--record-length=64", "--per-phase",
                                    "--per-dataset", "--workers=1"])
        pack_main()
    told = capsys.readouterr().out
    assert told.count("config.data.sets") == 3 and "in this order" in told
    assert f"{{'path': '{tmp_path}/each/phase-2/two', 'weight': 0.2}}" in told
    assert PackedSet(tmp_path / "each" / "phase-2" / "two").manifest["sources"] == ["two"]


def test_a_corpus_without_phases_says_how_to_have_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"belong to no phases.*type: curriculum"):
        pack_phases(build(tmp_path), tmp_path / "tokenizer", tmp_path / "packed", **OPTIONS)
