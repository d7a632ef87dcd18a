"""The frozen tokenizer: exact round trip, and an identity that nothing slips past."""

import hashlib
import io
import json
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st
from packed_sets import make_texts, make_tokenizer

from nanollama.data.files import DataError
from nanollama.data.sentencepiece_tokenizer import freeze_sentencepiece, normalized_sha256
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import copy_tokenizer, load_tokenizer

HARD_TEXTS = ["", " ", "  a\n\n\t b ", "a\u2581b\u2581", "\u2581", "x\x00y", "<s></s><unk><pad> <0x41>",
              "\ufeff", "\ufffd", "h\u00e9llo \u65e5\u672c\u8a9e \U0001f600\u200d\u2028\r\n",
              "e\u0301 \u00e9 \ufb01 \uff21"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def check_round_trip(encode_decode: object, text: str) -> None:
    assert encode_decode(text) == text  # type: ignore[operator]


@hypothesis.given(st.text())
@hypothesis.example("\u2581a \u2581")
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(lambda t: tokenizer.decode(tokenizer.encode(t)), text)


def test_texts_that_break_other_tokenizers_come_back_exactly(tokenizer: Tokenizer) -> None:
    for text in [*HARD_TEXTS, *make_texts(20)]:
        check_round_trip(lambda t: tokenizer.decode(tokenizer.encode(t)), text)
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id} & set(
            tokenizer.encode(text))


def test_round_trip_check_catches_the_bare_model(tokenizer: Tokenizer) -> None:
    bare = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.directory / "tokenizer.model"))
    with pytest.raises(AssertionError):
        check_round_trip(lambda t: bare.decode(bare.encode(t)), "a\u2581b")


@pytest.mark.parametrize("threads", [1, 3])
def test_a_document_is_bos_its_text_and_eos(tokenizer: Tokenizer, threads: int) -> None:
    texts = [*HARD_TEXTS, *make_texts(20)]
    documents = tokenizer.encode_documents(texts, threads)
    assert len(documents) == len(texts)
    for text, ids in zip(texts, documents, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_documents([]) == []


def test_one_changed_byte_stops_with_both_hashes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy_tokenizer(tokenizer.directory, tmp_path / "t")
    model = tmp_path / "t" / "tokenizer.model"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path / "t")
    for part in (tokenizer.sha256, hashlib.sha256(data).hexdigest(), "data_pipeline.tokenizer"):
        assert part in str(error.value)


@pytest.mark.parametrize(("change", "problem"), [
    ({"vocab_size": 12}, "vocab_size is 12"), ({"pad_id": 0}, "pad_id is 0"), ({"kind": "words"}, "'words'"),
    ({"sha256": None}, "lacks sha256"),
])
def test_a_manifest_that_lies_is_refused(tokenizer: Tokenizer, tmp_path: Path, change: dict[str, object],
                                         problem: str) -> None:
    copy_tokenizer(tokenizer.directory, tmp_path / "t")
    manifest = {name: value for name, value in {**tokenizer.manifest, **change}.items() if value is not None}
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=problem):
        load_tokenizer(tmp_path / "t")


def test_a_missing_tokenizer_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file.*data_pipeline\.tokenizer"):
        load_tokenizer(tmp_path)


def test_require_names_both_hashes_and_the_mending(tokenizer: Tokenizer) -> None:
    tokenizer.require(tokenizer.sha256, "checkpoint 7", "")
    with pytest.raises(DataError) as error:
        tokenizer.require("f" * 64, "checkpoint 7", "Run: python -m something.")
    for part in ("checkpoint 7", "f" * 64, tokenizer.sha256, "Run: python -m something."):
        assert part in str(error.value)


def test_a_copy_is_the_same_and_another_one_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tokenizer.directory / "TOKENIZER_CARD.md").write_text("card")
    for _ in range(2):
        assert copy_tokenizer(tokenizer.directory, tmp_path / "run" / "tokenizer").sha256 == tokenizer.sha256
    assert (tmp_path / "run" / "tokenizer" / "TOKENIZER_CARD.md").read_text() == "card"
    other = make_tokenizer(tmp_path / "other", vocab_size=320)
    with pytest.raises(DataError, match=rf"{tokenizer.sha256}.*{other.sha256}"):
        copy_tokenizer(other.directory, tmp_path / "run" / "tokenizer")


def train(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(50, seed=3)), model_writer=model, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, **{"model_type": "bpe", "vocab_size": 320, **options})
    return model.getvalue()


def test_normalized_hash_ignores_how_the_model_was_trained() -> None:
    one, two, other = train(num_threads=1), train(num_threads=2), train(num_threads=1, vocab_size=330)
    assert hashlib.sha256(one).digest() != hashlib.sha256(two).digest()
    assert normalized_sha256(one) == normalized_sha256(two)
    assert normalized_sha256(one) != normalized_sha256(other)
    with pytest.raises(DataError, match=r"damaged|truncated"):
        normalized_sha256(b"\xff" + one)


def test_normalized_hash_is_that_of_the_protobuf_library() -> None:
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    from sentencepiece import sentencepiece_model_pb2

    model = train()
    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(model)
    message.ClearField("trainer_spec")
    assert normalized_sha256(model) == hashlib.sha256(message.SerializeToString()).hexdigest()


def test_a_model_without_pad_cannot_be_frozen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks special tokens"):
        freeze_sentencepiece(tmp_path, train(pad_id=-1), algorithm="bpe", corpus={})
