"""tokenizer.json: frozen, read and made of SentencePiece models; chat templates in their sandbox."""

import base64
import dataclasses
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hub_tokenizers import freeze

from nanollama.chat import Conversation
from nanollama.data.chat_template import render
from nanollama.data.files import DataError
from nanollama.data.tokenizer_folder import copy_tokenizer, load_tokenizer
from nanollama.generation.engine import Delta
from nanollama.generation.sampling import SamplingConfig

TEXTS = ["Hello, world! 123 times.", "  two  spaces  ", "def f(x):\n\treturn x**2\n", "日本語 🙂 é", "<|end|>", ""]


@pytest.fixture(autouse=True)
def _needs_tokenizers() -> None:
    pytest.importorskip("tokenizers", reason="needs the extra [hub-tokenizers]")


def test_frozen_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = freeze(tmp_path / "one", chat_template="{{ messages }}", stop_ids=[257])
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (258, 256, 256, -1)
    assert tokenizer.stop_ids == [256, 257]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 256 not in tokenizer.encode("<|end|>")
    assert tokenizer.encode_markup("a<|end|>")[-1] == 256
    (document,) = tokenizer.encode_documents(["ab"])
    assert document.dtype == np.uint32
    assert list(document) == [*tokenizer.encode("ab"), 256]
    copy = copy_tokenizer(tmp_path / "one", tmp_path / "two")
    assert (copy.sha256, copy.chat_template) == (tokenizer.sha256, "{{ messages }}")
    begun = freeze(tmp_path / "begun", bos="<|begin|>")
    assert begun.encode_documents(["ab"])[0][0] == 257


def test_changed_or_wrong_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks '<\|stop\|>', its eos token"):
        freeze(tmp_path / "wrong", eos="<|stop|>")
    freeze(tmp_path / "one")
    path = tmp_path / "one" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|begin|>", "<|Begin|>"))
    with pytest.raises(DataError, match="changed after it was frozen"):
        load_tokenizer(tmp_path / "one")


@pytest.mark.parametrize(("kind", "options"), [
    ("bpe", dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)),
    ("bpe", dict(normalization_rule_name="nmt_nfkc")),
    ("unigram", dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)),
])  # fmt: skip
def test_sentencepiece_as_tokenizer_json(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    import tokenizers

    from nanollama.export.sentencepiece_json import tokenizer_json_of_sentencepiece

    text = Path(sentencepiece.__file__).read_text(encoding="utf-8").splitlines()[:800]
    (tmp_path / "text").write_text("\n".join(text))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=500, model_type=kind, pad_id=3,
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False, **options)  # fmt: skip
    model = (tmp_path / "m.model").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    made = tokenizers.Tokenizer.from_buffer(tokenizer_json_of_sentencepiece(model, add_bos=True))
    made.encode_special_tokens = True
    for line in [*text, *TEXTS]:
        ids = made.encode(line, add_special_tokens=False).ids
        assert ids == processor.encode(line), line
        assert made.decode(ids) == processor.decode(ids), line
    assert made.encode("a", add_special_tokens=True).ids[0] == processor.bos_id()


def test_chat_template_runs_in_a_sandbox() -> None:
    template = ("{% for m in messages %}{% generation %}<{{ m['role'] }}>{{ m.content }}{% endgeneration %}{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}{{ tools | tojson }}")  # fmt: skip
    messages = [{"role": "user", "content": "é <b>"}]
    assert render(template, messages, add_generation_prompt=True, tools=["ü"]) == '<user>é <b><assistant>["ü"]'
    with pytest.raises(DataError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", messages, add_generation_prompt=False)
    with pytest.raises(DataError, match="unsafe"):
        render("{{ messages.__class__.__mro__ }}", messages, add_generation_prompt=False)
    with pytest.raises(DataError, match="chat template"):
        render("{% for %}", messages, add_generation_prompt=False)


class Echo:
    """An engine that answers every prompt with the same words, and keeps the prompts."""

    context_length = 1000

    def __init__(self, answer: list[int]):
        self.answer, self.prompts = answer, []

    def stream(self, prompts: Any, sampling: Any, **options: Any) -> Any:
        self.prompts += prompts
        yield Delta(0, self.answer, [0.0] * len(self.answer), "stop")


def test_conversation_fills_the_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}A:{% endif %}"
    tokenizer = freeze(tmp_path / "t", chat_template=template)
    engine, shown = Echo([*tokenizer.encode("yes"), tokenizer.eos_id]), []
    chat = Conversation(engine, tokenizer, SamplingConfig(), 10, shown.append)
    for line in ("one <|end|>", "", "two", "/again"):
        assert chat.handle(line)
    first = tokenizer.encode_markup("user:one <|end|>A:")
    both = tokenizer.encode_markup("user:one <|end|>assistant:yes<|end|>user:two<|end|>A:")
    assert engine.prompts == [first, both, both]  # what the person wrote as a special token is gone
    assert first.count(tokenizer.eos_id) == 1
    assert "".join(shown) == "yes\n" * 3
    chat.handle("/reset")
    chat.handle("one ")
    assert engine.prompts[-1] == first


def test_gguf_tokenizer_is_refused_by_its_key() -> None:
    from nanollama.export.gguf_tokenizer import tokenizer_json_of_gguf

    base = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}
    assert json.loads(tokenizer_json_of_gguf(base, "x"))["model"]["merges"] == [["a", "b"]]
    with pytest.raises(DataError, match=r"tokenizer.ggml.pre is 'tekken'"):
        tokenizer_json_of_gguf({**base, "tokenizer.ggml.pre": "tekken"}, "x")
    with pytest.raises(DataError, match=r"tokenizer.ggml.model is 'llama'"):
        tokenizer_json_of_gguf({**base, "tokenizer.ggml.model": "llama"}, "x")


# --- tiktoken files ---


def tiktoken_ids(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """The slow twin: what tiktoken does to one piece of text."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [(ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1)]
        if not pairs or min(pairs)[0] == 1 << 30:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def tiktoken_file() -> tuple[bytes, dict[bytes, int]]:
    """300 tokens: bytes, and pieces learned by counting pairs, as such files are made."""
    text = "the then there hello help lo low lower 日本 日 abab ababab"
    words = [word.encode() for word in text.split()]
    ranks = {bytes([byte]): byte for byte in range(256)}
    texts = [[bytes([byte]) for byte in word] for word in words]
    while len(ranks) < 300:
        counts: dict[bytes, int] = {}
        for text in texts:
            for left, right in itertools.pairwise(text):
                counts[left + right] = counts.get(left + right, 0) + 1
        new = max((pair for pair in counts if pair not in ranks), key=lambda pair: (counts[pair], pair), default=None)
        if new is None:
            ranks[b"\x00" + len(ranks).to_bytes(2, "big")] = len(ranks)  # no text has it
            continue
        ranks[new] = len(ranks)
        for text in texts:
            at = 0
            while at < len(text) - 1:
                if text[at] + text[at + 1] == new:
                    text[at : at + 2] = [new]
                at += 1
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    return b"\n".join(lines) + b"\n", ranks


def test_tiktoken_files_encode_as_tiktoken_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanollama.export import tiktoken_file as files
    from nanollama.export.import_tokenizer import import_tokenizer

    data, ranks = tiktoken_file()
    monkeypatch.setitem(files.KINDS, "llama3", dataclasses.replace(files.KINDS["llama3"], size=300))
    (tmp_path / "small.tiktoken").write_bytes(data)
    frozen = import_tokenizer(tmp_path / "small.tiktoken", tmp_path / "out", kind="llama3")
    assert (frozen.vocab_size, frozen.bos_id, frozen.eos_id) == (556, 300, 301)
    assert frozen.stop_ids == [301, 309, 308]
    cut = frozen._plain.pre_tokenizer  # type: ignore[attr-defined]
    for text in [*TEXTS, "the lowest thereabouts ababababa", "hellohelp 12345 日本日本", "\x00\x01"]:
        pieces = [text.encode()[slice(*_bytes_of(text, span))] for _, span in cut.pre_tokenize_str(text)]
        assert frozen.encode(text) == [number for piece in pieces for number in tiktoken_ids(ranks, piece)], text
        assert frozen.decode(frozen.encode(text)) == text


def _bytes_of(text: str, span: tuple[int, int]) -> tuple[int, int]:
    return len(text[: span[0]].encode()), len(text[: span[1]].encode())


def test_damaged_tiktoken_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nanollama.export.import_tokenizer import main

    data, _ = tiktoken_file()
    lines = data.splitlines()
    for name, damaged, message in (
        ("cut", b"\n".join(lines[:-3]), "297 ranks; llama3 has 128000"),
        ("torn", data.replace(lines[7], b"!!! 7"), "torn:8: not a base64 token"),
        ("twice", data + lines[3], "twice:301: a token that line 4 has too"),
        ("gap", data.replace(lines[-1], lines[-1].replace(b" 299", b" 400")), "ranks are not 0 to 299"),
    ):
        (tmp_path / name).write_bytes(damaged)
        assert main([f"--source={tmp_path / name}", f"--output={tmp_path / 'out'}", "--kind=llama3"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(data)[:-30])
    for arguments, message in (
        (["cut.gz", "--kind=llama3"], "truncated or no gzip"),
        (["torn"], "needs --kind"),
        (["none"], "no such file"),
    ):
        source, *more = arguments
        assert main([f"--source={tmp_path / source}", f"--output={tmp_path / 'out'}", *more]) == 2
        assert message in capsys.readouterr().err
