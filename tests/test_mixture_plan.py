"""The plan of a mixture says what will happen, and counting says what did."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpora import jsonl, mixture

from data_pipeline.mixture import compile_plan, count_rows, counts_table, describe, trainer_sets
from data_pipeline.mixtures.load import MixtureError, load_mixture
from nanollama.data.files import DataError


def two(tmp_path: Path, **top: Any) -> Path:
    return mixture(
        tmp_path / "mix.yaml",
        {"name": "big", "source": "org/big", "format": "huggingface", "subset": "en", "mix_ratio": 0.75,
         "estimated_tokens": 1_000_000, "filters": [{"type": "length", "min_characters": 7}], "licence": "MIT"},
        {"name": "small", "source": "org/small", "format": "huggingface", "revision": "abc", "mix_ratio": 0.25,
         "estimated_tokens": 20_000, "sampling": {"rate": 0.5}, "max_bytes": 1_000_000, "licence": "MIT"},
        metadata={"phase": "test", "description": "two", "total_tokens": 400_000, "steps": 100}, **top)


def test_the_plan(tmp_path: Path) -> None:
    plan = compile_plan(two(tmp_path, deduplication=[{"type": "minhash"}], decontamination=[
        {"type": "decontaminate", "sets": ["gsm8k"]}], filters=[{"type": "exact_duplicate"}]))
    big, small = plan["datasets"]
    assert (big["training_tokens"], big["epochs"]) == (300_000, pytest.approx(0.3))
    assert (small["available_tokens"], small["epochs"]) == (10_000, pytest.approx(10))
    assert [item["type"] for item in big["filters"]] == ["exact_duplicate", "length"]
    assert [(step["section"], step["type"]) for step in plan["steps"]] == [
        ("deduplication", "minhash"), ("decontamination", "decontaminate")]
    assert trainer_sets(plan, "x") == [{"path": "x/big", "weight": 0.75}, {"path": "x/small", "weight": 0.25}]
    text = describe(plan)
    for words in ("4,000 tokens a step", "org/big (en)", "huggingface -> exact_duplicate() -> length(min_characters 7",
                  "a sample of 50.0% -> at most 1.0 MB", "1. deduplication: minhash(", "p_i = mix_ratio_i",
                  "small is repeated 10.0 times", "without a revision, so a later run may get other text: big.",
                  plan["sha256"][:16]):
        assert words in text, words
    json.dumps(plan)


def test_the_hash_is_the_meaning(tmp_path: Path) -> None:
    first = compile_plan(two(tmp_path))["sha256"]
    (tmp_path / "mix.yaml").write_text("# a comment\n" + (tmp_path / "mix.yaml").read_text())
    assert compile_plan(tmp_path / "mix.yaml")["sha256"] == first
    assert compile_plan(two(tmp_path, deduplication=[{"type": "exact"}]))["sha256"] != first


def test_too_many_epochs_are_refused_where_the_file_says_so(tmp_path: Path) -> None:
    text = two(tmp_path).read_text().replace('{"rate": 0.5}', '{"rate": 0.5, "max_epochs": 9.5}')
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(MixtureError, match=r"datasets\[1\].sampling.max_epochs: 9.5, but .* 10.00 epochs"):
        load_mixture(tmp_path / "mix.yaml")
    (tmp_path / "mix.yaml").write_text(text.replace("9.5", "10"))
    assert load_mixture(tmp_path / "mix.yaml").datasets[1].sampling.max_epochs == 10


def test_counting(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a" * 40, "short", "a" * 40, "b" * 40, None]))
    chats = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * n}]}
             for n in range(3)]
    (tmp_path / "c.json").write_text(json.dumps(chats))
    config = mixture(
        tmp_path / "mix.yaml",
        {"name": "text", "source": str(tmp_path / "a.jsonl"),
         "filters": [{"type": "length", "min_characters": 10}, {"type": "exact_duplicate"}]},
        {"name": "chat", "source": str(tmp_path / "c.json"), "format": "json", "rows": "chat", "layout": "messages"})
    counts = count_rows(load_mixture(config))
    assert (counts["text"].rows, counts["text"].kept, counts["text"].bytes, counts["text"].tokens) == (5, 2, 80, 20)
    assert counts["text"].dropped == {"missing text": 1, "shorter than 10 characters": 1, "exact duplicate": 1}
    assert (counts["chat"].rows, counts["chat"].kept, counts["chat"].turns) == (3, 2, 4)
    assert counts["chat"].dropped == {"no turn of the assistant": 1}
    assert "| chat    |       3 |    2 |     4 |" in counts_table(counts, measured=False)
    with pytest.raises(DataError, match="chat: none of 1 rows is kept"):
        count_rows(load_mixture(config), most=1)  # the first chat is the one without an answer


def test_command_line(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "data_pipeline.mixture", "plan", str(two(tmp_path)),
                          f"--output={tmp_path / 'plan.json'}"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored == compile_plan(tmp_path / "mix.yaml")
    assert stored["sha256"][:16] in ran.stdout
    broken = mixture(tmp_path / "mix.yaml", {"name": "x", "source": "a.jsonl", "fromat": "jsonl"})
    ran = subprocess.run([sys.executable, "-m", "data_pipeline.mixture", "plan", str(broken)], capture_output=True,
                         text=True, timeout=60)
    assert ran.returncode == 1 and "'format'" in ran.stderr and "Traceback" not in ran.stderr
