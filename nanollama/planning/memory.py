"""Bytes a train step needs on one device, by our own formula: no devices, no compiler.

State and gradients are exact, from shapes and shardings. What the forward pass keeps for the backward pass is counted
by tracing the real model (so it follows the code), at the size one device sees. The rest (what is alive while one
layer is computed, the loss's logits, gathered weights) are sums of array sizes. `docs/decisions.md` has how far this
is from what XLA's compilers say.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from nanollama.config import BatchConfig, ComputeConfig, Config, LossConfig, ModelConfig
from nanollama.models.decoder import Decoder, init_params
from nanollama.objectives import next_token
from nanollama.parallel.mesh import batch_shards
from nanollama.planning.stand_in import flash_memory
from nanollama.training.optim import make_optimizer
from nanollama.training.state import abstract_state, state_shardings

Sizes = Mapping[str, int]  # mesh axis -> devices along it


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int  # kept from the forward pass for the backward pass
    workspace: int  # alive while one layer, or the loss, is computed

    @property
    def arguments(self) -> int:
        """What comes into the step."""
        return self.parameters + self.optimizer + self.batch

    @property
    def temporaries(self) -> int:
        return self.gradients + self.activations + self.workspace

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries

    def largest(self, count: int = 3) -> list[tuple[str, int]]:
        """The largest parts, by name."""
        parts = sorted(dataclasses.asdict(self).items(), key=lambda part: -part[1])
        return [(name, size) for name, size in parts[:count]]


def estimate(config: Config, sizes: Sizes, *, kernel: bool = True) -> Memory:
    """The formula. `kernel`: attention is a fused kernel; False counts the scores of XLA's blocks too (CPU)."""
    parameters, optimizer = state_bytes(config, sizes)
    rows = rows_on_device(config, sizes)
    local = _local(config, sizes)
    T = config.data.sequence_length // sizes.get("context", 1)
    flying = config.batch.micro_batches if sizes.get("stage", 1) > 1 else 1  # a pipeline's are all alive at its end
    fixed, per_row = kept_bytes(local, config.compute, config.loss, T)
    layer = kept_bytes(local, dataclasses.replace(config.compute, remat="none"), config.loss, T)[1]
    layer = layer * rows // local.num_layers
    elastic = config.determinism == "elastic"
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=5 * 4 * rows * config.batch.micro_batches * T,
        gradients=(3 if elastic else 1) * parameters,  # accumulating adds in place
        activations=fixed // sizes.get("fsdp", 1) + per_row * rows * flying,
        workspace=_workspace(local, config.compute, rows, T, layer, sharded=sizes.get("fsdp", 1) > 1, kernel=kernel),
    )


def rows_on_device(config: Config, sizes: Sizes) -> int:
    """Rows that a device computes at one time."""
    return max(config.batch.global_rows // (config.batch.micro_batches * batch_shards(sizes)), 1)


def state_bytes(config: Config, sizes: Sizes) -> tuple[int, int]:
    """(parameters, optimizer state) on one device, exactly."""
    same = dataclasses.replace(config, name="", batch=BatchConfig(1), compute=ComputeConfig(scan_unroll=1))
    return _state_bytes(same, tuple(sizes.items()))


@functools.lru_cache(maxsize=64)
def _state_bytes(config: Config, axes: tuple[tuple[str, int], ...]) -> tuple[int, int]:
    sizes, optimizer = dict(axes), make_optimizer(config)
    abstract = abstract_state(config, optimizer)
    if config.determinism == "elastic":
        return _bytes(abstract.params), _bytes(abstract.opt_state)
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    shardings = state_shardings(config, optimizer, mesh)

    def on_one(array: Any, where: Any) -> int:
        return math.prod(where.shard_shape(array.shape)) * array.dtype.itemsize

    parameters = jax.tree.map(on_one, abstract.params, shardings.params)
    state = jax.tree.map(on_one, abstract.opt_state, shardings.opt_state)
    return sum(jax.tree.leaves(parameters)), sum(jax.tree.leaves(state))


@functools.lru_cache(maxsize=256)
def kept_bytes(model: ModelConfig, compute: ComputeConfig, loss: LossConfig, length: int) -> tuple[int, int]:
    """(whatever the batch, per row of `length`) bytes that the loss's forward pass keeps for its backward pass.

    Traced at one and at two rows; `model` is what one device sees of it.
    """
    decoder = Decoder(model, dataclasses.replace(compute, scan_unroll=1))
    boxed = jax.eval_shape(functools.partial(init_params, decoder), 0)
    params = jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda leaf: hasattr(leaf, "names"))

    def kept(rows: int) -> int:
        integers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "positions", "first_key"), integers)
        batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)

        def residuals(params: Any, batch: Any) -> Any:
            return jax.vjp(lambda p: next_token.loss_sums(p, batch, decoder=decoder, loss=loss)[0], params)[1]

        with flash_memory():
            jaxpr = jax.make_jaxpr(residuals)(params, batch).jaxpr
        inputs = set(jaxpr.invars)
        outputs = {var for var in jaxpr.outvars if hasattr(var, "aval") and not hasattr(var, "val")}
        return sum(_size(var.aval) for var in outputs if var not in inputs)

    one, two = kept(1), kept(2)
    return max(2 * one - two, 0), two - one


def _workspace(
    m: ModelConfig, compute: ComputeConfig, rows: int, T: int, layer: int, *, sharded: bool, kernel: bool
) -> int:
    """The larger of what a layer's backward pass and the loss's chunks hold, and weights gathered for them."""
    itemsize = jnp.dtype(compute.dtype).itemsize
    chunk = min(compute.loss_chunk_tokens, rows * T)
    head = m.hidden_size * m.vocab_size * 4  # gradient of the output matrix, float32, before it is cut over fsdp
    loss = chunk * m.vocab_size * (4 + itemsize) + head + rows * T * m.hidden_size * itemsize
    decoder = Decoder(m, ComputeConfig(scan_unroll=1))
    layers = _bytes(jax.eval_shape(functools.partial(init_params, decoder), 0)["layers"])
    gathered = 2 * layers // m.num_layers + head if sharded else 0
    block = min(max(64, T // 16), 256)
    scores = 0 if kernel else 4 * rows * m.num_heads * block * T * 4
    return max(loss, layer + layer // 2 + scores) + gathered


def _local(config: Config, sizes: Sizes) -> ModelConfig:
    """The model as one device sees it: heads, feed-forward and vocabulary cut over `tensor`, layers over `stage`."""
    tensor, stage = sizes.get("tensor", 1), sizes.get("stage", 1)
    m = config.model
    cut: dict[str, Any] = {
        "num_heads": m.num_heads // tensor,
        "intermediate_size": m.intermediate_size // tensor,
        "vocab_size": m.vocab_size // tensor,
        "num_layers": m.num_layers // stage,
    }
    if m.num_kv_heads % tensor == 0:
        cut["num_kv_heads"] = m.num_kv_heads // tensor
    return dataclasses.replace(m, **cut)


def _bytes(tree: Any) -> int:
    return sum(_size(leaf) for leaf in jax.tree.leaves(tree))


def _size(array: Any) -> int:
    return math.prod(array.shape) * (array.dtype.itemsize if hasattr(array.dtype, "itemsize") else 4)
