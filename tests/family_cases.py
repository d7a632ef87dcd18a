"""Small models of every family, weights from a seed, and rows to run them on. Without torch.

`tests/parity.py` compares these with transformers and writes tests/golden/families; `tests/test_families.py` checks
against what it wrote.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from nanollama.config import ComputeConfig, ModelConfig
from nanollama.export.weights import (
    Tensor,
    TensorInfo,
    adopt,
    check_tensors,
    parameter_shapes,
    publish,
    published_tensors,
)
from nanollama.models.decoder import Decoder, head, init_cache
from nanollama.models.families import FAMILIES, family_of
from nanollama.models.families.published import Exported, read_config, write_config
from nanollama.ops.losses import cross_entropy_sums

GOLDEN = Path(__file__).parent / "golden" / "families"
LENGTH, PROMPT, GREEDY = 64, 8, 64
_DENSE = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5)  # fmt: skip
_SHORT = dict(original_max_position_embeddings=32)  # half of a row: positions beyond the trained length are compared

_SPARSE = {**_DENSE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_LATENT = dict(num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=20,
               moe_intermediate_size=24, n_shared_experts=2, num_experts_per_tok=2)  # fmt: skip

# config.json of each
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
    },
    "mixtral": {**_SPARSE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2-moe": {
        **_SPARSE,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "qwen3-moe": {
        **_SPARSE,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "deepseek-v2-lite": {
        **_SPARSE,
        **_LATENT,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "rope_scaling": dict(rope_type="yarn", factor=4.0, mscale=0.707, mscale_all_dim=0.707, **_SHORT),
    },
    "deepseek-v2": {
        **_SPARSE,
        **_LATENT,
        "model_type": "deepseek_v2",
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 1,  # two experts are always in the two best groups: only one group limits them
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
        "first_k_dense_replace": 0,
    },
    "deepseek-v3": {
        **_SPARSE,
        **_LATENT,
        "model_type": "deepseek_v3",
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "rope_scaling": dict(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5, **_SHORT),
    },
    "deepseek-v3-halves": {
        **_SPARSE,
        **_LATENT,
        "model_type": "deepseek_v3",
        "rope_interleave": False,
        "q_lora_rank": None,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "first_k_dense_replace": 1,
    },
    # the next two are compared as what they are written as: transformers has no code for them
    "deepseek-moe": {
        **_SPARSE,
        "model_type": "deepseek",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "minimind-moe": {
        **_SPARSE,
        "model_type": "minimind",
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "use_moe": True,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
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
            if len(tensor.shape) == 2:  # routers larger, so that their choices matter and do not hang on rounding
                large = "gate.weight" in tensor.name
                self.arrays[tensor.name] = values * np.float32(0.5 if large else 0.1)
            else:  # biases around 0, norms around 1
                self.arrays[tensor.name] = values * np.float32(0.2) + np.float32("bias" not in tensor.name)
        self.tensors = {name: TensorInfo(array.shape, "float32") for name, array in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]


class Case(NamedTuple):
    """One model, ours."""

    name: str
    model: ModelConfig
    tensors: list[Tensor]  # of the family's own format
    weights: Seeded  # by their names
    params: Any
    config: dict[str, Any]  # what transformers is given: the config.json,
    given: dict[str, np.ndarray]  # and the weights; another family's where the own one needs its own code
    compared: list[tuple[Tensor, float]]  # those of them that have a gradient of ours, and their factor


class Results(NamedTuple):
    """What is compared: logits of real positions, gradients of the loss over both layouts, greedy tokens."""

    logits: dict[str, np.ndarray]  # layout -> [2, 64, V], 0 in padding
    gradients: dict[str, np.ndarray]  # by published name
    greedy: np.ndarray  # [PROMPT + GREEDY]


@functools.cache
def load(name: str) -> Case:
    config = CASES[name]
    our_name, family = family_of(config["model_type"], name)
    model = read_config(config, our_name, family, name)
    tensors = published_tensors(model, family)
    weights = Seeded(tensors)
    check_tensors(weights, tensors, model.tie_embeddings)
    shapes = parameter_shapes(model)
    whole = {path: parts.whole(shapes[path]) for path, parts in adopt(weights, tensors, model).items()}
    params = unflatten_dict(whole, sep="/")
    exported = Exported(model) if family.exported is None else family.exported(model)
    given, written = weights.arrays, tensors
    if family.exported is not None:
        config = write_config(exported.model, FAMILIES[exported.model.family])
        written = published_tensors(exported.model, FAMILIES[exported.model.family])
        given = {t.name: _given(params, t, exported.factors) for t in written}
    factors = [(t, exported.factors.get(t.map.ours, 1.0)) for t in written if not t.map.ours.endswith("router_bias")]
    compared = [(tensor, factor) for tensor, factor in factors if factor]
    return Case(name, model, tensors, weights, params, config, given, compared)


def _given(params: Any, tensor: Tensor, factors: Mapping[str, float]) -> np.ndarray:
    factor = factors.get(tensor.map.ours, 1.0)
    if not factor:
        return np.zeros(tensor.shape, np.float32)
    return np.ascontiguousarray(publish(_at(params, tensor.map.ours)[tensor.at], tensor, "float32", factor))


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
    by_name = {tensor.name: publish(_at(gradients, tensor.map.ours)[tensor.at], tensor, "float32", 1 / factor)
               for tensor, factor in case.compared}  # fmt: skip
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


