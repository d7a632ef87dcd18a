"""Perplexity: every token once, with the context that is stated, equal to a plain loop; and what is refused."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_sets import make_packed_set, make_texts, make_tokenizer
from test_train import settings

from evals import perplexity
from evals.documents import packed_rows, windows
from nanollama import train as front_door
from nanollama.config import ComputeConfig, ModelConfig, resolve
from nanollama.data.packed import PackedSet
from nanollama.generation.loading import LoadedModel, load_model
from nanollama.models.decoder import Decoder, head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained run beside its packed set and two text files."""
    folder = tmp_path_factory.mktemp("perplexity")
    tokenizer = make_tokenizer(folder / "tokenizer", 400)
    texts = make_texts(120, seed=3)
    make_packed_set(folder / "packed", tokenizer=tokenizer, record_length=64, documents=texts,
                    sources=("alpha", "beta", "gamma"))
    front_door.train(resolve(settings(folder, evaluation=dict(every=0))), folder / "run")
    (folder / "text.txt").write_text("".join(texts[:5]))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:5]))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder / "run")


def slow_nll(model: LoadedModel, ids: list[int]) -> np.ndarray:
    """-log p of ids[1:] in one forward pass, whole logits."""
    padded = np.zeros((1, 512), np.int32)  # one shape, one compilation; causality hides what follows
    padded[0, : len(ids) - 1] = ids[:-1]
    logp = np.asarray(_log_probs(model.config.model, model.params, padded))
    return -logp[0, np.arange(len(ids) - 1), ids[1:]]


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(config: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    decoder = Decoder(config, ComputeConfig(attention="reference"))
    hidden, _ = decoder.apply({"params": params}, tokens_BT, positions, jnp.zeros_like(positions))
    return jax.nn.log_softmax(hidden @ head(params), axis=-1)


def test_text_equals_a_plain_loop_over_windows(model: LoadedModel, folder: Path) -> None:
    window, stride = 32, 12
    found = perplexity.evaluate(model, folder / "text.txt", "", window, stride, 0)
    text = (folder / "text.txt").read_text()
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    total, done, start = 0.0, 0, 0
    while done < len(ids) - 1:
        nll = slow_nll(model, ids[start : start + window + 1])
        total += nll[done - start :].sum()
        done, start = start + len(nll), start + stride
    assert found["tokens"] == len(ids) - 1
    assert found["bytes"] == len(text.encode())
    assert found["words"] == len(text.split())
    assert found["nll_per_token"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found["perplexity_word"] == pytest.approx(math.exp(total / len(text.split())), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_documents_of_jsonl_are_scored_apart(model: LoadedModel, folder: Path) -> None:
    found = perplexity.evaluate(model, folder / "texts.jsonl", "", 512, 256, 0)
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    expected = sum(slow_nll(model, [model.tokenizer.bos_id, *model.tokenizer.encode(text)]).sum() for text in texts)
    assert found["nll_per_token"] * found["tokens"] == pytest.approx(expected, rel=1e-5)
    assert found["documents"] == 5


def test_packed_set_equals_its_documents_alone(model: LoadedModel, folder: Path) -> None:
    found = perplexity.evaluate(model, folder / "packed", "validation", 64, 64, 0)
    packed = PackedSet(folder / "packed")
    records = packed.split("validation")
    total, tokens = 0.0, 0
    for record in records.read(range(len(records))):
        ends = np.append(record.starts[1:], len(record.tokens))
        for start, end in zip(record.starts, ends, strict=True):
            nll = slow_nll(model, record.tokens[start:end].astype(int).tolist())
            total, tokens = total + nll.sum(), tokens + len(nll)
    assert found["tokens"] == tokens
    assert found["nll_per_token"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["bytes"] == sum(packed.source_count("validation", source, "bytes") for source in packed.sources)
    assert set(found["sources"]) == {"alpha", "beta", "gamma"}
    assert sum(part["tokens"] for part in found["sources"].values()) == tokens
    low, high = found["bits_per_byte_interval_95"]
    assert low < found["bits_per_byte"] < high


def test_longer_windows_join_the_records_of_a_document(model: LoadedModel, folder: Path) -> None:
    documents: dict = {}
    rows = list(packed_rows(folder / "packed", "validation", model.tokenizer, 128, 0, documents))
    one: dict = {}
    list(packed_rows(folder / "packed", "validation", model.tokenizer, 64, 0, one))
    assert documents == one
    assert max(row["positions"].max() for row in rows) > 64


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_every_token_is_predicted_once(model: LoadedModel, stride: int) -> None:
    text = "".join(make_texts(3, seed=9))
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    rows = list(windows([(0, text)], model.tokenizer, 16, stride, 0, {}))
    predicted = [int(token) for row in rows for token in row["targets"][row["weights"] > 0]]
    assert predicted == ids[1:]


def test_max_tokens_counts_only_what_was_read(model: LoadedModel, folder: Path) -> None:
    found = perplexity.evaluate(model, folder / "text.txt", "", 32, 16, 50)
    assert found["tokens"] == 50
    ids = model.tokenizer.encode((folder / "text.txt").read_text())[:50]
    assert found["bytes"] == len(model.tokenizer.decode(ids).encode())


def test_command_prints_a_table_and_writes_results(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status = perplexity.main([f"--checkpoint={folder / 'run'}", f"--data={folder / 'packed'}", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert status == 0
    assert f"{results['bits_per_byte']:.4f}" in printed
    assert "bos is not predicted" in printed
    assert results["checkpoint"]["step"] == 12
    assert str(folder) not in json.dumps(results), "no path of this machine"


@pytest.mark.parametrize(("content", "arguments", "message"), [
    (None, [], "no such file"),
    (b"", [], "no token to score"),
    (b"ok \xff", [], "not UTF-8 at byte 3"),
    (b"some text", ["--stride=-1"], "--stride"),
    (b"some text", ["--stride=600", "--window=512"], "--stride"),
])
def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes | None,
                   arguments: list[str], message: str) -> None:
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    assert perplexity.main([f"--checkpoint={folder / 'run'}", f"--data={data}", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_broken_jsonl_names_the_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    assert perplexity.main([f"--checkpoint={folder / 'run'}", f"--data={tmp_path / 'data.jsonl'}"]) == 2
    assert "data.jsonl:2: no field 'text'" in capsys.readouterr().err


def test_another_tokenizer_is_refused_with_both_hashes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = make_tokenizer(tmp_path / "tokenizer", 380)
    run_and_data = [f"--checkpoint={folder / 'run'}", f"--data={folder / 'text.txt'}"]
    assert perplexity.main([*run_and_data, f"--tokenizer={tmp_path / 'tokenizer'}"]) == 2
    error = capsys.readouterr().err
    assert other.sha256 in error
    assert load_model(folder / "run").tokenizer.sha256 in error
