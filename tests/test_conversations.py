"""Rows of conversations: every layout gives the turns, and a row that is none says why."""

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.sources import open_source, read_all
from data_pipeline.sources.conversations import LAYOUTS, Conversation, read_conversation, text_of
from data_pipeline.sources.dataset import DatasetConfig
from data_pipeline.text.documents import Bad, BadText, Document


def read(rows: str, layout: str, row: dict[str, Any], **fields: str) -> Conversation:
    names = {field: name for field, (name, _) in LAYOUTS[rows][layout].items()}
    return read_conversation(row, rows, layout, names | fields)


def told(turns: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in turns]


ASKED = [("user", "2 + 2?"), ("assistant", "4")]
CHATS = [
    ("messages", {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}),
    ("instruction", {"instruction": "2 + 2?", "input": "", "output": "4"}),
    ("transcript", {"text": "\n\nHuman: 2 + 2?\n\nAssistant: 4"}),
    ("transcript", {"text": "USER: 2 + 2?\n\n\nASSISTANT: 4 <|endoftext|>"}),
]


@pytest.mark.parametrize(("layout", "row"), CHATS)
def test_layouts_of_a_chat(layout: str, row: dict[str, Any]) -> None:
    read_row = read("chat", layout, row)
    assert told(read_row.turns) == ASKED
    assert text_of(read_row) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"


def test_system_prompts_inputs_and_renamed_fields() -> None:
    row = {"query": "Add.", "context": "2, 2", "response": "4", "sys": "Be brief."}
    turns = read("chat", "instruction", row, instruction="query", input="context", output="response",
                 system="sys").turns
    assert told(turns) == [("system", "Be brief."), ("user", "Add.\n\n2, 2"), ("assistant", "4")]
    glaive = {"system": "SYSTEM: You have tools", "chat": "USER: a\n\n\nASSISTANT: b\n\n\nFUNCTION RESPONSE: {}"}
    assert [role for role, _ in told(read("chat", "transcript", glaive, transcript="chat").turns)] == [
        "system", "user", "assistant", "tool"]


def test_tools_and_thoughts() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "ask"}, {"type": "text", "value": "wait"}],
         "tool_calls": [{"name": "weather"}]},
        {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."}]
    assert told(read("chat", "messages", {"messages": messages}).turns) == [
        ("user", "weather?"),
        ("assistant", '<|start_thought|>ask<|end_thought|>wait<|tool_call|>{"name": "weather"}'),
        ("tool", "<|tool_response|>rain"), ("assistant", "It rains.")]


PREFERENCES = [
    ("messages", {"prompt": "2 + 2?", "chosen": [{"role": "user", "content": "2 + 2?"},
                                                 {"role": "assistant", "content": "4"}],
                  "rejected": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}]}),
    ("messages", {"prompt": [{"role": "user", "content": "2 + 2?"}], "chosen": [{"role": "assistant", "content": "4"}],
                  "rejected": [{"role": "assistant", "content": "5"}]}),
    ("messages", {"prompt": [{"role": "user", "content": "2 + 2?"}],
                  "chosen": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
                  "rejected": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
                  "rejected": {"from": "gpt", "value": "5"}}),
    ("pairs", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}),
    ("ranked", {"prompt": "2 + 2?", "response_0": "5", "response_1": "4", "better_response_id": 1}),
    ("ranked", {"prompt": "2 + 2?", "response_0": "4", "response_1": "5", "better_response_id": 0}),
    ("transcript", {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}),
]


@pytest.mark.parametrize(("layout", "row"), PREFERENCES)
def test_layouts_of_a_preference(layout: str, row: dict[str, Any]) -> None:
    pair = read("preference", layout, row)
    assert (told(pair.turns), told(pair.chosen), told(pair.rejected)) == (
        [("user", "2 + 2?")], [("assistant", "4")], [("assistant", "5")])
    assert len(pair.sides) == 2


def test_prompts_lose_the_answer() -> None:
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
           "ground_truth": "4"}
    assert told(read("prompt", "messages", row).turns) == [("user", "2 + 2?")]


MISTAKES = [
    ("chat", "messages", {}, "no field 'messages'"),
    ("chat", "messages", {"messages": "hello"}, "no list"),
    ("chat", "messages", {"messages": ["hello"]}, "no object"),
    ("chat", "messages", {"messages": [{"role": "king", "content": "x"}]}, "unknown role 'king'"),
    ("chat", "messages", {"messages": [{"role": "user", "content": "x"}]}, "no turn of the assistant"),
    ("chat", "messages", {"messages": [{"role": "user", "content": 5}]}, "not a string"),
    ("chat", "messages", {"messages": [{"role": "user", "content": [{"type": "image", "text": ""}]}]}, "'image'"),
    ("chat", "instruction", {"instruction": "x", "output": " "}, "no turn of the assistant"),
    ("chat", "transcript", {"text": "just prose"}, "no speaker"),
    ("preference", "pairs", {"prompt": "x", "chosen": "y", "rejected": "y"}, "the same"),
    ("preference", "pairs", {"prompt": "x", "chosen": "y", "rejected": ""}, "empty"),
    ("preference", "pairs", {"prompt": "", "chosen": "y", "rejected": "z"}, "no turn of the user"),
    ("preference", "ranked", {"prompt": "x", "response_0": "y", "response_1": "z", "better_response_id": 2}, "0 nor 1"),
    ("preference", "transcript", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}, "assistant"),
]


@pytest.mark.parametrize(("rows", "layout", "row", "words"), MISTAKES)
def test_a_row_that_is_none(rows: str, layout: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadText, match=words):
        read(rows, layout, row)


@pytest.mark.parametrize("form", ["jsonl", "json.gz", "parquet"])
def test_conversations_from_files(tmp_path: Path, form: str) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "!"}], "n": n}
            for n in range(3)] + [{"messages": [], "n": 3}]
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    dataset = DatasetConfig("set", str(path), 1.0, format=form.removesuffix(".gz"),  # type: ignore[arg-type]
                            rows="chat", layout="messages")
    items = list(read_all(open_source(dataset)))
    assert [item.meta for item in items if isinstance(item, Document)] == [{"n": n, "turns": 2} for n in range(3)]
    assert [item.text for item in items if isinstance(item, Document)][2] == (
        "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n!<|im_end|>\n")
    assert [item.reason for item in items if isinstance(item, Bad)] == ["no turn of the assistant"]


def test_preferences_from_a_folder_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    fake = types.ModuleType("datasets")

    def load_dataset(path: str, **keywords: Any) -> Any:
        asked.append((path, keywords))
        yield {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "kind": "x"}

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    dataset = DatasetConfig("hh", "org/hh", 1.0, format="huggingface", data_dir="harmless-base", rows="preference",
                            layout="transcript")
    source = open_source(dataset)
    assert "harmless-base" in source.parts()[0].inputs()[0].path
    [item] = list(read_all(source))
    assert isinstance(item, Document) and item.meta == {"kind": "x", "turns": 4}
    assert item.text.count("<|im_start|>assistant") == 2 and item.text.index("b<|im_end|>") < item.text.index("c<|im")
    assert asked == [("org/hh", {"name": None, "split": "train", "streaming": True, "revision": None,
                                 "data_dir": "harmless-base"})]


@pytest.mark.parametrize(("content", "reason"), [(b"{}", "not a JSON list"), (b"[1]", "not a JSON object"),
                                                 (b"[{", "broken JSON"), (b"\xff", "broken JSON")])
def test_broken_json_lists(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    items = list(read_all(open_source(DatasetConfig("set", str(tmp_path / "rows.json"), 1.0, format="json"))))
    assert [item.reason for item in items if isinstance(item, Bad)] == [reason]
