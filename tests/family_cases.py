"""Small models of every dense family, weights from a seed, and rows to run them on. Without torch.

`tests/parity.py` compares these with transformers and writes tests/golden/families; `tests/test_families.py` checks
against what it wrote.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanollama.config import ComputeConfig, ModelConfig
from nanollama.export.weights import (
    Tensor,
    TensorInfo,
    adopt,
    check_tensors,
    nested,
    publish,
    published_tensors,
)
from nanollama.models.decoder import Decoder, head, init_cache
from nanollama.models.families import family_of
from nanollama.models.families.published import read_config
from nanollama.ops.losses import cross_entropy_sums

GOLDEN = Path(__file__).parent / "golden" / "families"
LENGTH, PROMPT, GREEDY = 64, 8, 64
_DENSE = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5)  # fmt: skip
_SHORT = dict(original_max_position_embeddings=32)  # half of a row: positions beyond the trained length are compared

# config.json of each; "as" is the transformers class where that is not the one of the model_type
CASES: dict[str, dict[str, Any]] = {
    "llama2": {**_DENSE, "model_type": "llama", "num_key_value_heads": 4, "rope_theta": 10_000.0},
    "llama3": {
        **_DENSE,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
        "rope_scaling": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **_SHORT),
    },
    "llama-linear": {**_DENSE, "model_type": "llama", "rope_scaling": dict(type="linear", factor=4.0)},
    "qwen2": {
        **_DENSE,
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen2-dynamic": {
        **_DENSE,
        "model_type": "qwen2",
        "max_position_embeddings": 32,
        "rope_scaling": dict(type="dynamic", factor=4.0),
    },
    "qwen3": {**_DENSE, "model_type": "qwen3", "head_dim": 32, "rope_theta": 1e6},
    "qwen3-yarn": {
        **_DENSE,
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_scaling": dict(rope_type="yarn", factor=4.0, **_SHORT),
    },
    "mistral": {**_DENSE, "model_type": "mistral", "sliding_window": 16},
    "minimind": {
        **_DENSE,
        "model_type": "minimind",
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "use_moe": False,
        "as": "llama",
    },
}
# Documents of each row by length; the rest of a row is padding.
LAYOUTS = {"padded": ((64,), (41,)), "packed": ((20, 44), (7, 30, 20))}


class Seeded:
    """Weights of a published model from a seed: a `weights.Source`."""

    where = "seed"

    def __init__(self, tensors: list[Tensor], seed: int = 7):
        rng, self.arrays = np.random.default_rng(seed), {}
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            values = rng.standard_normal(tensor.shape).astype(np.float32)
            if len(tensor.shape) == 2:
                self.arrays[tensor.name] = values * np.float32(0.1)
            else:  # biases around 0, norms around 1
                self.arrays[tensor.name] = values * np.float32(0.2) + np.float32("bias" not in tensor.name)
        self.tensors = {name: TensorInfo(array.shape, "float32") for name, array in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]


class Case(NamedTuple):
    """One model, ours."""

    name: str
    model: ModelConfig
    tensors: list[Tensor]
    weights: Seeded
    params: Any


class Results(NamedTuple):
    """What is compared: logits of real positions, gradients of the loss over both layouts, greedy tokens."""

    logits: dict[str, np.ndarray]  # layout -> [2, 64, V], 0 in padding
    gradients: dict[str, np.ndarray]  # by published name
    greedy: np.ndarray  # [PROMPT + GREEDY]


@functools.cache
def load(name: str) -> Case:
    config = {key: value for key, value in CASES[name].items() if key != "as"}
    our_name, family = family_of(config["model_type"], name)
    model = read_config(config, our_name, family, name)
    tensors = published_tensors(model, family)
    weights = Seeded(tensors)
    check_tensors(weights, tensors, model.tie_embeddings)
    params = nested({path: read() for path, read in adopt(weights, tensors, model).items()})
    return Case(name, model, tensors, weights, params)


def rows(layout: str, vocab_size: int) -> dict[str, np.ndarray]:
    """Batch of two rows as the loader makes them."""
    rng = np.random.default_rng(3)
    batch = {key: np.zeros((2, LENGTH), np.int32) for key in ("tokens", "targets", "positions", "first_key", "segment")}
    batch["weights"] = np.zeros((2, LENGTH), np.float32)
    for row, lengths in enumerate(LAYOUTS[layout]):
        batch["first_key"][row] = np.arange(LENGTH)
        start = 0
        for number, length in enumerate(lengths, 1):
            here = slice(start, start + length)
            tokens = rng.integers(0, vocab_size, length)
            batch["tokens"][row, here] = tokens
            batch["targets"][row, start : start + length - 1] = tokens[1:]
            batch["weights"][row, start : start + length - 1] = 1
            batch["positions"][row, here] = np.arange(length)
            batch["first_key"][row, here] = start
            batch["segment"][row, here] = number
            start += length
    return batch


def ours(case: Case, continued: np.ndarray | None = None) -> Results:
    """Logits, gradients and greedy tokens of our decoder, all in one program.

    continued: what another implementation made of the prompt; `greedy` is then the most likely token after each of
    its beginnings, which is the same thing as sampling it and needs no second program. None: sample it.
    """
    decoder = Decoder(case.model, ComputeConfig(scan_unroll=1))
    V, total = case.model.vocab_size, PROMPT + GREEDY
    layouts = [rows(layout, V) for layout in LAYOUTS]
    batch = {key: np.concatenate([layout[key] for layout in layouts]) for key in layouts[0]}
    batch = {key: np.pad(values, ((0, 1), (0, total - LENGTH))) for key, values in batch.items()}
    batch["tokens"][-1] = 0 if continued is None else continued
    batch["positions"][-1] = np.arange(total)

    @jax.jit
    def run(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            hidden, _ = decoder.apply({"params": params}, batch["tokens"], batch["positions"], batch["first_key"])
            sums = cross_entropy_sums(hidden, head(params), batch["targets"], batch["weights"], z_loss=0.0,
                                      chunk_tokens=64)  # fmt: skip
            return sums.total, hidden @ head(params)

        gradients, logits = jax.grad(loss, has_aux=True)(params)
        return logits, gradients

    logits, gradients = jax.device_get(run(case.params, batch))
    real = logits[:, :LENGTH] * (batch["segment"][:, :LENGTH, None] > 0)
    by_layout = {layout: real[2 * index : 2 * index + 2] for index, layout in enumerate(LAYOUTS)}
    by_name = {tensor.name: publish(_at(gradients, tensor.map.ours), tensor, "float32") for tensor in case.tensors}
    if continued is None:
        return Results(by_layout, by_name, _greedy(case, decoder))
    following = logits[-1, PROMPT - 1 : -1].argmax(-1)
    return Results(by_layout, by_name, np.concatenate([prompt(V), following]))


def _greedy(case: Case, decoder: Decoder) -> np.ndarray:
    total = PROMPT + GREEDY
    tokens = prompt(case.model.vocab_size)

    @jax.jit
    def step(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        hidden, cache = decoder.apply({"params": params}, tokens_BT, positions_BT, jnp.zeros_like(tokens_BT), cache)
        return jnp.argmax(hidden[:, -1] @ head(params), axis=-1), cache

    cache = init_cache(case.model, 1, total, jnp.float32)
    following, cache = step(case.params, tokens[None], np.arange(PROMPT)[None], cache)
    out = [*tokens, int(following[0])]
    while len(out) < total:
        following, cache = step(case.params, np.array([[out[-1]]]), np.array([[len(out) - 1]]), cache)
        out.append(int(following[0]))
    return np.array(out)


def prompt(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocab_size, PROMPT)


def _at(tree: Any, path: str) -> np.ndarray:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def gradient_error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest gradient."""
    return max(float(np.abs(found[n] - expected[n]).max() / np.abs(expected[n]).max()) for n in expected)


