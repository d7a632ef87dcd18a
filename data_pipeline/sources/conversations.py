"""Rows of conversations, preferences and prompts, in the layouts that public datasets use, as lists of turns.

Owns the layouts, the names of roles, what makes a row unusable, and the plain ChatML text of a conversation.
Knows nothing of files, loss masks or training.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.text.documents import BadText
from nanollama.data.chat_template import render

# {rows: {layout: {field: (its usual name, whether a row must have it)}}}
LAYOUTS: dict[str, dict[str, dict[str, tuple[str, bool]]]] = {
    "chat": {
        # a list of {role, content}, as OpenAI's API and most sets since 2024 have it
        "messages": {"messages": ("messages", True), "system": ("system", False)},
        # a list of {from, value}, as ShareGPT had it
        "sharegpt": {"messages": ("conversations", True), "system": ("system", False)},
        # one question, one answer, as Alpaca has it
        "instruction": {"instruction": ("instruction", True), "input": ("input", False),
                        "output": ("output", True), "system": ("system", False)},
        # one string with "Human: ... Assistant: ..." or "USER: ... ASSISTANT: ..."
        "transcript": {"transcript": ("text", True), "system": ("system", False)},
    },
    "preference": {
        # chosen and rejected are whole lists of {role, content}, or only their last turns after `prompt`
        "messages": {"chosen": ("chosen", True), "rejected": ("rejected", True), "prompt": ("prompt", False)},
        # the conversation so far, and two ways for it to go on
        "sharegpt": {"messages": ("conversations", True), "chosen": ("chosen", True), "rejected": ("rejected", True)},
        # three strings
        "pairs": {"prompt": ("prompt", True), "chosen": ("chosen", True), "rejected": ("rejected", True),
                  "system": ("system", False)},
        # two answers and the number (0 or 1) of the better one
        "ranked": {"prompt": ("prompt", True), "first": ("response_0", True), "second": ("response_1", True),
                   "better": ("better_response_id", True)},
        # two whole dialogues as strings, as Anthropic's HH-RLHF has it
        "transcript": {"chosen": ("chosen", True), "rejected": ("rejected", True)},
    },
    "prompt": {
        "messages": {"messages": ("messages", True), "answer": ("ground_truth", False)},
        "instruction": {"instruction": ("instruction", True), "input": ("input", False), "answer": ("answer", False)},
        "transcript": {"transcript": ("transcript", True)},
    },
}
ROLES = {"system": "system", "developer": "system", "human": "user", "user": "user", "prompter": "user",
         "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
         "function_call": "function_call", "tool": "tool", "observation": "tool", "function": "tool",
         "function response": "tool", "environment": "tool", "ipython": "tool"}
THOUGHT, THOUGHT_END = "<|start_thought|>", "<|end_thought|>"
TOOL_CALL, TOOL_RESPONSE = "<|tool_call|>", "<|tool_response|>"
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
_SPEAKER = re.compile(r"(?:\A|\n\s*)(Human|Assistant|USER|ASSISTANT|FUNCTION RESPONSE|SYSTEM): ?")

Turn = dict[str, str]  # {"role": system | user | assistant | tool, "content"}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a row says: the turns, and for preferences the two endings."""

    turns: tuple[Turn, ...]  # of a preference: the prompt
    chosen: tuple[Turn, ...] = ()
    rejected: tuple[Turn, ...] = ()

    @property
    def sides(self) -> tuple[tuple[Turn, ...], ...]:
        """Each list of turns that a model would read: one, or two of a preference."""
        return (self.turns + self.chosen, self.turns + self.rejected) if self.chosen else (self.turns,)


def read_conversation(row: Mapping[str, Any], rows: str, layout: str, names: Mapping[str, str]) -> Conversation:
    """The conversation in `row`. `names`: {field of the layout: name in the row}. Raises BadText."""
    values: dict[str, Any] = {}
    for field, (_, needed) in LAYOUTS[rows][layout].items():
        value = row.get(names[field]) if names[field] else None  # "": the rows have no such field
        if value is None and needed:
            raise BadText(f"no field {names[field]!r}")
        values[field] = value
    if rows == "preference":
        return _preference(values, layout)
    turns = _turns(values, layout)
    if rows == "prompt":
        while turns and turns[-1]["role"] == "assistant":  # what to answer is the model's own
            turns = turns[:-1]
        return Conversation(_checked(turns, "user"))
    return Conversation(_checked(turns, "assistant"))


def text_of(conversation: Conversation) -> str:
    """The conversation as ChatML, a preference's two sides one after the other."""
    return "".join(render(CHATML, side, add_generation_prompt=False) for side in conversation.sides)


def _turns(values: Mapping[str, Any], layout: str) -> tuple[Turn, ...]:
    """The turns of a chat or prompt row."""
    system = _content(values.get("system"))
    first = ({"role": "system", "content": system},) if system else ()
    if layout in ("messages", "sharegpt"):
        return first + _messages(values["messages"])
    if layout == "transcript":
        return first + _transcript(_string(values["transcript"]))
    question = "\n\n".join(part for part in (_content(values["instruction"]), _content(values.get("input"))) if part)
    answer = _content(values.get("output"))
    return (*first, {"role": "user", "content": question},
            *([{"role": "assistant", "content": answer}] if answer else []))


def _preference(values: Mapping[str, Any], layout: str) -> Conversation:
    if layout == "ranked":
        if values["better"] not in (0, 1) or isinstance(values["better"], bool):
            raise BadText("the better answer is neither 0 nor 1")
        answers = (values["first"], values["second"])
        values = {"prompt": values["prompt"], "chosen": answers[values["better"]],
                  "rejected": answers[1 - values["better"]]}
        layout = "pairs"
    if layout == "pairs":
        prompt = _turns({"instruction": values["prompt"], "system": values.get("system")}, "instruction")
        sides = [_messages([{"role": "assistant", "content": values[side]}]) for side in ("chosen", "rejected")]
    elif layout == "sharegpt":
        prompt = _messages(values["messages"])
        sides = [_messages([values[side]]) for side in ("chosen", "rejected")]
    else:
        read = _messages if layout == "messages" else lambda value: _transcript(_string(value))
        whole = [read(values[side]) for side in ("chosen", "rejected")]
        if layout == "messages" and isinstance(values.get("prompt"), list):
            prompt, sides = _messages(values["prompt"]), whole
            sides = [side[len(prompt):] if side[:len(prompt)] == prompt else side for side in sides]
        else:
            shared = _shared(*whole)
            prompt, sides = whole[0][:shared], [side[shared:] for side in whole]
    if any(not any(turn["content"].strip() for turn in side) for side in sides):
        raise BadText("a side of the preference is empty")
    if sides[0] == sides[1]:
        raise BadText("chosen and rejected are the same")
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise BadText("a side does not end with the assistant")
    return Conversation(_checked(prompt, "user"), *sides)


def _shared(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """Turns at the beginning that both have, but for the last of each."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    return count


def _messages(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise BadText("the messages are no list")
    turns: list[Turn] = []
    for message in value:
        if not isinstance(message, Mapping):
            raise BadText("a message is no object")
        given = message.get("role", message.get("from"))
        role = ROLES.get(str(given).lower())
        if role is None:
            raise BadText(f"unknown role {str(given)[:40]!r}")
        content = _content(message.get("content", message.get("value")))
        if role == "function_call":
            role, content = "assistant", TOOL_CALL + content
        for call in message.get("tool_calls") or ():
            content += TOOL_CALL + json.dumps(call, ensure_ascii=False)
        turns.append({"role": role, "content": TOOL_RESPONSE + content if role == "tool" else content})
    return tuple(turns)


def _transcript(text: str) -> tuple[Turn, ...]:
    parts = _SPEAKER.split(text.replace("<|endoftext|>", ""))
    if len(parts) < 3:
        raise BadText("no speaker in the transcript")
    turns = [{"role": ROLES[name.lower()], "content": said.strip()}
             for name, said in zip(parts[1::2], parts[2::2], strict=True)]
    if parts[0].strip():  # before the first speaker
        turns.insert(0, {"role": "system", "content": parts[0].strip()})
    return tuple({**turn, "content": TOOL_RESPONSE + turn["content"]} if turn["role"] == "tool" else turn
                 for turn in turns)


def _content(value: Any) -> str:
    """The text of a content: a string, or a list of parts."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(map(_part, value))
    return _string(value)


def _part(part: Any) -> str:
    if not isinstance(part, Mapping):
        raise BadText("a part of a content is no object")
    value = part.get("text", part.get("value", ""))
    kind = str(part.get("type", "text"))
    if kind in ("tool_call", "function_call"):
        return TOOL_CALL + (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if kind == "reasoning":
        return THOUGHT + _string(value) + THOUGHT_END
    if kind == "text":
        return _string(value)
    raise BadText(f"a content part of kind {kind[:40]!r}")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise BadText("a content is not a string")
    return value


def _checked(turns: tuple[Turn, ...], wanted: str) -> tuple[Turn, ...]:
    if not any(turn["role"] == wanted and turn["content"].strip() for turn in turns):
        raise BadText(f"no turn of the {wanted}")
    return turns


@functools.cache
def needed_names(rows: str, layout: str) -> tuple[str, ...]:
    """Fields that a row of the layout must have."""
    return tuple(field for field, (_, needed) in LAYOUTS[rows][layout].items() if needed)
