"""tokenizer.json: frozen, read and made of SentencePiece models; chat templates in their sandbox."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from nanollama.chat import Conversation
from nanollama.data.chat_template import render
from nanollama.data.files import DataError
from nanollama.data.tokenizer import Tokenizer, copy_tokenizer
from nanollama.generation.engine import Delta
from nanollama.generation.sampling import SamplingConfig

TEXTS = ["Hello, world! 123 times.", "  two  spaces  ", "def f(x):\n\treturn x**2\n", "日本語 🙂 é", "<|end|>", ""]


def byte_level(tokens: list[str]) -> bytes:
    """A byte-level BPE without merges, with special tokens after the bytes."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens)
    return tokenizer.to_str().encode()


def freeze(folder: Path, **changes: Any) -> Tokenizer:
    from nanollama.data.hub_tokenizer import freeze_tokenizer_json

    values: dict[str, Any] = dict(bos=None, eos="<|end|>", pad=None, chat_template=None, corpus={})
    return freeze_tokenizer_json(folder, byte_level(["<|end|>", "<|begin|>"]), **{**values, **changes})


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
        Tokenizer.load(tmp_path / "one")


@pytest.mark.parametrize(("kind", "options"), [
    ("bpe", dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)),
    ("bpe", dict(normalization_rule_name="nmt_nfkc")),
    ("unigram", dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)),
])  # fmt: skip
def test_sentencepiece_as_tokenizer_json(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    import tokenizers

    from nanollama.export.tokenizer_json import tokenizer_json

    text = Path(sentencepiece.__file__).read_text(encoding="utf-8").splitlines()[:800]
    (tmp_path / "text").write_text("\n".join(text))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=500, model_type=kind, pad_id=3,
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False, **options)  # fmt: skip
    model = (tmp_path / "m.model").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    made = tokenizers.Tokenizer.from_buffer(tokenizer_json(model, add_bos=True))
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
    from nanollama.export.gguf_tokenizer import tokenizer_json_of

    base = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}
    assert json.loads(tokenizer_json_of(base, "x"))["model"]["merges"] == [["a", "b"]]
    with pytest.raises(DataError, match=r"tokenizer.ggml.pre is 'tekken'"):
        tokenizer_json_of({**base, "tokenizer.ggml.pre": "tekken"}, "x")
    with pytest.raises(DataError, match=r"tokenizer.ggml.model is 'llama'"):
        tokenizer_json_of({**base, "tokenizer.ggml.model": "llama"}, "x")
