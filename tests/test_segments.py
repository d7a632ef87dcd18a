"""Text encoded through its distinct segments: the very ids of SentencePiece, and refused where they would not be."""

import io
import itertools

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st
from packed_sets import make_texts

from nanollama.data import segments
from nanollama.data.protobuf import fields
from nanollama.data.segments import SegmentTable, segments_are_independent, side_by_side

# white space in pieces, code, repeated signs and letters that the vocabulary lacks
TEXTS = [*make_texts(60, seed=3), *("def f(x):\n        return x  # so\n\n\n\t\tif (a<=b):\r\n" for _ in range(30)),
         *("a  b   c\n  d ...... \n\n====\n" for _ in range(30))]
HARD = ["", " ", "   ", "a", " a", "a ", "\n\n \n", "x\x00y", "1234 12.5e-7",
        "h\u00e9llo \u65e5\u672c\u8a9e \U0001f600\u200d\u2028\r\n",
        "e\u0301 \u00a0\u3000 \ufb01", "<s> <0x41></s>", "\u00e9" * 50, " " * 3000, "ab" * 3000]
OURS: dict[str, object] = {"model_type": "bpe", "vocab_size": 420, "normalization_rule_name": "identity",
                           "add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True,
                           "split_digits": True, "allow_whitespace_only_pieces": True}


def train(**options: object) -> tuple[sentencepiece.SentencePieceProcessor, bytes]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, hard_vocab_limit=False,
                                             minloglevel=2, **{**OURS, **options})
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), model.getvalue()


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    made, model = train()
    assert segments_are_independent(made, model)
    return made


def check(table: SegmentTable, processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> None:
    assert [ids.tolist() for ids in table.encode(texts)] == processor.encode(texts)


@hypothesis.given(st.lists(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])) |
                           st.text("ab =.\n1\u00e9\u65e5", max_size=40), max_size=5))
def test_any_text_has_the_ids_that_sentencepiece_gives(processor: sentencepiece.SentencePieceProcessor,
                                                       texts: list[str]) -> None:
    check(SegmentTable(processor), processor, texts)


@pytest.mark.parametrize("options", [{}, {"split_by_whitespace": False}, {"split_by_unicode_script": False},
                                     {"user_defined_symbols": ["a  b", "return x"]}])
def test_the_ids_are_those_of_any_vocabulary(options: dict[str, object]) -> None:
    made, model = train(**options)
    assert segments_are_independent(made, model)
    table = SegmentTable(made)
    for _ in range(2):  # the second time every segment is known
        check(table, made, [*HARD, *TEXTS])


def test_the_check_catches_a_cut_where_a_merge_would_cross(processor: sentencepiece.SentencePieceProcessor) -> None:
    table = SegmentTable(processor)
    piece = next(piece for piece in map(processor.id_to_piece, range(300, 420)) if piece.isalpha() and len(piece) > 1)
    table._side_by_side[ord(piece[0]) * 256 + ord(piece[1])] = False
    with pytest.raises(AssertionError):
        check(table, processor, TEXTS)


def test_what_is_remembered_is_bounded(processor: sentencepiece.SentencePieceProcessor,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "KEPT_SEGMENTS", 5)
    table = SegmentTable(processor)
    for text in TEXTS[:60]:
        check(table, processor, [text])
    assert len(table._numbers) < 5 + 200


@pytest.mark.parametrize("options", [
    {"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"},
    {"byte_fallback": False}])
def test_a_model_whose_segments_depend_on_one_another_is_refused(options: dict[str, object]) -> None:
    made, model = train(**options)
    assert not segments_are_independent(made, model)
    if options != {"byte_fallback": False}:  # and rightly: its ids are others
        assert SegmentTable(made).encode(["a  b e\u0301 \ufb01"])[0].tolist() != made.encode("a  b e\u0301 \ufb01")


def test_pairs_are_those_of_the_pieces(processor: sentencepiece.SentencePieceProcessor) -> None:
    pairs = np.flatnonzero(side_by_side(processor).reshape(256, 256)[:, :0x80].reshape(-1))
    expected = set()
    for token in range(processor.vocab_size()):
        if not (processor.is_control(token) or processor.is_byte(token) or processor.is_unknown(token)):
            piece = processor.id_to_piece(token).replace("\u2581", " ").encode()
            expected |= {(a, b) for a, b in itertools.pairwise(piece) if b < 0x80}
    assert {(int(pair) // 128, int(pair) % 128) for pair in pairs} == expected
    assert expected


@pytest.mark.parametrize("message", [b"\x0a\x05abc", b"\x0b", b"\x08\xff", b"\x09abc"])
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged|truncated"):
        list(fields(message))


def test_fields_of_every_wire_type_are_read() -> None:
    message = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x1d\x00\x00\x80\x3f" + b"\x21" + bytes(8)
    found = list(fields(message))
    assert [(field.number, field.value) for field in found] == [(1, 150), (2, b"abc"), (3, b"\x00\x00\x80\x3f"),
                                                                (4, bytes(8))]
    assert b"".join(field.encoded for field in found) == message
