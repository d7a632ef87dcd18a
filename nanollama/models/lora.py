"""Low-rank adapters (LoRA, arXiv:2106.09685): what of a model learns, and merging it into the rest. Pure functions.

With adapters, y = x W + s (x A) B: W is frozen, A starts random, B at zero, so that nothing changes before the first
step; s = alpha / rank, or alpha / sqrt(rank) (rank-stabilised, arXiv:2312.03732). `models.linear.adapter` declares A
and B beside W as `<name>_lora_a` and `<name>_lora_b`; rows of added tokens are `embedding_rows` and `head_rows`, a
difference to the last rows of the frozen table. A tree of parameters without such names learns as a whole.
"""

import fnmatch
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanollama.config import ConfigError, LoraConfig
from nanollama.data.strict import nearest

A, B = "_lora_a", "_lora_b"
NEW_ROWS = {"embedding": "embedding_rows", "head": "head_rows"}
DROPOUT_SEEDS = "dropout_seeds"  # of a batch: uint32 [B, T]


def scale(lora: LoraConfig) -> float:
    """s above."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rank_stabilised else lora.rank)


def is_target(name: str, lora: LoraConfig) -> bool:
    """Whether a pattern matches the name of a layer's parameter, "query"; one pattern for all layers."""
    return any(fnmatch.fnmatchcase(name, pattern.removeprefix("layers/")) for pattern in lora.targets)


def check_targets(lora: LoraConfig, adaptable: Iterable[str]) -> None:
    """Errors: ConfigError on a pattern that matches none of the names, with the nearest one."""
    names = sorted(adaptable)
    for pattern in lora.targets:
        if not any(is_target(name, LoraConfig(targets=(pattern,))) for name in names):
            fix = nearest(pattern.rpartition("/")[2], names)
            raise ConfigError("config.lora.targets", f"{pattern!r} matches no linear layer of this model", fix)


def is_learned(name: str) -> bool:
    """Whether a parameter of this name is an adapter's or holds new rows."""
    return name.endswith((A, B)) or name in NEW_ROWS.values()


def learned(tree: Any) -> Any:
    """What an optimizer updates: adapters and new rows where there are any, else everything.

    `tree`: parameters, or anything like them (shardings, logical axes). Branches without a leaf are left out.
    """
    return _select(tree, is_learned) or tree


def base(tree: Any) -> Any:
    """The rest of `learned`: the parameters of the model without adapters."""
    return _select(tree, lambda name: not is_learned(name))


def with_learned(tree: Any, new: Any) -> Any:
    """`tree` with the leaves of `new`, which is like `learned(tree)` (or adds such leaves), in their place."""
    if not isinstance(tree, Mapping) or not isinstance(new, Mapping):
        return new
    return {**tree, **{name: with_learned(tree.get(name, {}), value) for name, value in new.items()}}


def merge(params: Any, lora: LoraConfig | None) -> Any:
    """Parameters of a plain model that computes the same: adapters added to their weights, new rows to their table."""
    if lora is None:
        return params
    merged = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            merged[name] = merge(value, lora)
        elif not is_learned(name):
            merged[name] = merge_one(name, value, params.get, lora)
    return merged


def merge_one(name: str, weight: Any, find: Callable[[str], Any], lora: LoraConfig) -> Any:
    """One weight, merged; `find(name)` gives a parameter beside it, or None. NumPy in, NumPy out."""
    a, b, rows = find(name + A), find(name + B), find(NEW_ROWS.get(name, ""))
    if rows is not None:
        weight = weight + _filled_up(rows, weight.shape)
    if a is None:
        return weight
    merged = product(a * scale(lora), b, weight.shape)
    merged += weight  # NumPy: in place, so that no third copy of a large weight is made
    return merged


def product(a: Any, b: Any, shape: tuple[int, ...]) -> Any:
    """A B in the shape of their weight: [*stacked, *inputs, *outputs]."""
    stacked = a.ndim + b.ndim - 2 - len(shape)
    lead, rank = shape[:stacked], a.shape[-1]
    return (a.reshape(*lead, -1, rank) @ b.reshape(*lead, rank, -1)).reshape(shape)


def embedding(params: Mapping[str, Any]) -> jax.Array:
    """The input table [V, D], float32, with the new rows where there are any."""
    rows = params.get("embedding_rows")
    return params["embedding"] if rows is None else params["embedding"].at[-len(rows) :].add(rows)


def head(params: Mapping[str, Any]) -> jax.Array:
    """Output matrix [D, V], float32: its own, or the embedding's transpose where they are tied."""
    if "head" not in params:
        return embedding(params).T
    columns = params.get("head_rows")
    return params["head"] if columns is None else params["head"].at[:, -columns.shape[1] :].add(columns)


def with_dropout_seeds(
    batch: dict[str, jax.Array], lora: LoraConfig | None, seed: int, step: jax.Array
) -> dict[str, jax.Array]:
    """The batch and, where adapters have dropout, `dropout_seeds` of its tokens."""
    if lora is None or not lora.dropout:
        return batch
    return {**batch, DROPOUT_SEEDS: dropout_seeds(seed, step, batch["tokens"].shape)}


def dropout_seeds(seed: int, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32, one for each token of a global batch; independent of the keys that parameters are made with.

    A token keeps its seed wherever its row is sent, so that masks depend on neither micro-batches nor the mesh.
    """
    return jax.random.bits(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x10BA), step), shape)


class Dropout(NamedTuple):
    """What the masks of one layer are made from."""

    seeds_N: jax.Array  # uint32, of the tokens
    layer: jax.Array  # int32 scalar, its number in the model

    def mask(self, name: str, width: int, rate: float) -> jax.Array:
        """bool [N, width], False for a share `rate` of the inputs of the adapter of the weight `name`."""
        key = jax.random.fold_in(jax.random.key(zlib.crc32(name.encode())), self.layer)
        keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, self.seeds_N)
        return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (width,)))(keys_N)


def _select(tree: Any, wanted: Callable[[str], bool]) -> Any:
    chosen = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if below := _select(value, wanted):
                chosen[name] = below
        elif wanted(name):
            chosen[name] = value
    return chosen


def _filled_up(rows: Any, shape: tuple[int, ...]) -> Any:
    """Zeros before the rows, so that they meet the last ones of a table of this shape."""
    before = [(whole - part, 0) for whole, part in zip(shape, rows.shape, strict=True)]
    return (jnp if isinstance(rows, jax.Array) else np).pad(rows, before)
