"""Special tokens added after training: same ids as before, new ones behind, and a model with rows for them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hub_tokenizers import freeze as freeze_hub
from packed_sets import make_texts, make_tokenizer
from test_initial import MODEL, OLD, random_run

from nanollama.config import ConfigError
from nanollama.data.added_tokens import CHAT_TOKENS, add_tokens
from nanollama.data.files import DataError
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import copy_tokenizer
from nanollama.export.add_tokens import extend
from nanollama.export.add_tokens import main as command
from nanollama.export.sentencepiece_json import tokenizer_json_of_sentencepiece
from nanollama.generation.engine import Engine
from nanollama.models.decoder import head
from nanollama.ops.losses import cross_entropy_reference, cross_entropy_sums, token_log_probs
from nanollama.training.checkpoint import restore_params

TURN = "<|im_start|>user\nhello<|im_end|>"


@pytest.fixture(params=["sentencepiece", "tokenizer.json"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return make_tokenizer(tmp_path / "source", OLD)
    pytest.importorskip("tokenizers", reason="needs the extra [hub-tokenizers]")
    return freeze_hub(tmp_path / "source")


def test_old_ids_stay_and_new_ones_follow(source: Tokenizer, tmp_path: Path) -> None:
    added = add_tokens(source, tmp_path / "added", chat_template="{{ messages }}")
    first = source.vocab_size
    assert added.vocab_size % 8 == 0
    assert added.vocab_size >= first + len(CHAT_TOKENS)
    assert [added.token_id(token) for token in CHAT_TOKENS] == list(range(first, first + len(CHAT_TOKENS)))
    assert added.manifest["parent"] == {"sha256": source.sha256, "vocab_size": first}
    assert added.sha256 != source.sha256
    for text in [*make_texts(5), TURN, "<s>", ""]:
        assert added.encode(text) == source.encode(text), "what people write is never a special token"
        assert added.decode(added.encode(text)) == text
    start, end = added.token_id("<|im_start|>"), added.token_id("<|im_end|>")
    assert added.encode_markup(TURN) == [start, *source.encode("user\nhello"), end]
    assert added.decode(added.encode_markup(TURN)) == "user\nhello"
    assert added.stop_ids == [*source.stop_ids, end]
    assert added.without_special("a<|im_<|im_end|>end|>b") == "ab", "what is left must not read as one again"
    assert [list(x) for x in added.encode_documents(["a b"])] == [list(x) for x in source.encode_documents(["a b"])]
    assert added.chat_template == "{{ messages }}"
    copy = copy_tokenizer(added.directory, tmp_path / "copy")
    assert copy.encode_markup(TURN) == added.encode_markup(TURN)


def test_what_cannot_be_added_is_refused(source: Tokenizer, tmp_path: Path) -> None:
    piece = source.piece(source.encode("e")[0])
    for tokens, message in (((piece,), "ordinary piece"), (("<|x|>", "<|x|>"), "there twice"), (("",), "empty")):
        with pytest.raises(DataError, match=message):
            add_tokens(source, tmp_path / "added", tokens)
    added = add_tokens(source, tmp_path / "added")
    with pytest.raises(DataError, match="has all of"):
        add_tokens(added, tmp_path / "again")
    more = add_tokens(added, tmp_path / "more", ("<|im_end|>", "<|extra|>"))
    assert more.token_id("<|im_end|>") == added.token_id("<|im_end|>")
    assert more.token_id("<|extra|>") == added.vocab_size


def test_exported_as_tokenizer_json(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [hub-tokenizers]")
    added = add_tokens(make_tokenizer(tmp_path / "source", OLD), tmp_path / "added")
    file = tokenizer_json_of_sentencepiece((added.directory / "tokenizer.model").read_bytes(), add_bos=False)
    theirs = tokenizers.Tokenizer.from_buffer(file)
    assert theirs.encode(TURN, add_special_tokens=False).ids == added.encode_markup(TURN)
    assert theirs.get_vocab_size() == added.vocab_size


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_rows_start_at_the_mean(tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = dataclasses.replace(MODEL, tie_embeddings=tied, vocab_size=OLD + 4)  # four ids that no text has
    random_run(tmp_path / "base", make_tokenizer(tmp_path / "tokenizer", OLD), model)
    assert command([f"--checkpoint={tmp_path / 'base'}", f"--output={tmp_path / 'out'}"]) == 0
    assert f"{OLD}  <|im_start|>" in capsys.readouterr().out
    (old, _), (new, metadata) = restore_params(tmp_path / "base"), restore_params(tmp_path / "out")
    fields = metadata["config"]["model"]
    assert (fields["vocab_size"], fields["vocab_padding"]) == (OLD + 8, 512 - OLD - 8)
    mean = np.asarray(old["embedding"])[:OLD].mean(axis=0)
    assert np.array_equal(new["embedding"][:OLD], old["embedding"][:OLD])
    np.testing.assert_allclose(new["embedding"][OLD : OLD + 8], np.tile(mean, (8, 1)), atol=1e-7)
    assert not np.any(new["embedding"][OLD + 8 :])
    assert ("head" in new) is not tied
    if not tied:
        np.testing.assert_allclose(new["head"][:, OLD], np.asarray(old["head"])[:, :OLD].mean(axis=1), atol=1e-7)
    assert np.array_equal(new["layers"]["up"], old["layers"]["up"])
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())["imported"]
    assert set(lineage["parent"]) == {"path", "step", "hash"}


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, vocab_size=OLD - 8)
    random_run(tmp_path / "base", make_tokenizer(tmp_path / "tokenizer", OLD), model)
    with pytest.raises((DataError, ConfigError), match=f"{OLD} ids, the model's vocab_size is {OLD - 8}"):
        extend(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- rows that pad the vocabulary: never predicted, whatever their weights are ---


@pytest.fixture(scope="module")
def padded() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return dict(
        hidden=rng.normal(size=(2, 8, 16)).astype(np.float32),
        head=np.concatenate([rng.normal(size=(16, 40)), np.full((16, 8), 3.0)], axis=1).astype(np.float32),
        targets=rng.integers(0, 40, (2, 8)),
        weights=np.ones((2, 8), np.float32),
    )


def test_padding_has_no_probability_and_no_gradient(padded: dict[str, Any]) -> None:
    def loss(arrays: tuple[Any, Any], vocabulary: int | None, function: Any = cross_entropy_sums, **more: Any) -> Any:
        return function(*arrays, padded["targets"], padded["weights"], z_loss=1e-3, vocabulary=vocabulary, **more)

    arrays, real = (padded["hidden"], padded["head"]), (padded["hidden"], padded["head"][:, :40])
    expected = loss(real, None, cross_entropy_reference)
    for found in (loss(arrays, 40, chunk_tokens=6), loss(arrays, 40, cross_entropy_reference)):
        np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-5)
    assert abs(float(loss(arrays, None, chunk_tokens=6).nll) / float(expected.nll) - 1) > 0.01, "it would be seen"
    gradients = jax.grad(lambda arrays: loss(arrays, 40, chunk_tokens=6).total)(arrays)
    twins = jax.grad(lambda arrays: loss(arrays, None, cross_entropy_reference).total)(real)
    np.testing.assert_allclose(gradients[0], twins[0], atol=1e-5)
    np.testing.assert_allclose(gradients[1][:, :40], twins[1], atol=1e-5)
    assert not np.any(gradients[1][:, 40:])
    logp = token_log_probs(*arrays, padded["targets"], chunk_tokens=6, vocabulary=40)
    np.testing.assert_allclose(-logp.sum(), expected.nll, rtol=1e-5)


def test_sampling_never_sees_padding(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, vocab_size=OLD, vocab_padding=112)
    random_run(tmp_path / "run", None, model)
    params, _ = restore_params(tmp_path / "run")
    params["head"] = params["head"].at[:, OLD:].set(0.0)
    (plain,) = Engine(params, model, context_length=32).generate([[1, 5, 7]], max_new_tokens=4)
    stripped = {**params, "head": params["head"][:, :OLD], "embedding": params["embedding"][:OLD]}
    (same,) = Engine(stripped, MODEL, context_length=32).generate([[1, 5, 7]], max_new_tokens=4)
    assert plain.tokens == same.tokens
    np.testing.assert_allclose(plain.log_probs, same.log_probs, atol=1e-5)
    assert head(params).shape == (32, 512)
