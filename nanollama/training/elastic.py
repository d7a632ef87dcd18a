"""The train step of `determinism='elastic'`: the same bits on 1, 2, 4 or 8 devices, and over changes between them.

Owns the rules that make it so. Floating-point sums depend on their order, and compiled programs on their shapes;
so nothing here that rounds may depend on the number of devices:
  - the batch is always cut into `config.batch.micro_batches` micro-batches; each is computed whole on one device by
    the same program, in which devices do not speak to each other (one compilation serves them all);
  - gradients are added pair by pair in one fixed binary tree over the micro-batch index, by a program that does
    nothing but add, so it does not matter on which device a pair meets;
  - one program on the first device updates the state, which lives there; parameters are copied to the others.
On CPU the thread pool must be pinned as well (`parallel.backend.start(elastic=True)`). The price beside the plain
step: parameters and gradients are copied instead of one all-reduce, and parameters are whole on every device.

Same functions and signatures as `training.step`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from nanollama.config import Config, ConfigError
from nanollama.models.decoder import Decoder
from nanollama.models.lora import DROPOUT_SEEDS, dropout_seeds
from nanollama.objectives import next_token
from nanollama.training.schedules import make_schedule
from nanollama.training.state import TrainState
from nanollama.training.step import KEYS, Batch, Metrics, check_weights, gradient_of, split_rows, update

Turns = list[Batch]  # turn j: [devices, rows, T], device d computing micro-batch d * turns + j


def make_train_step(
    config: Config,
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
) -> Callable[[TrainState, Turns], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)` as `training.step.make_train_step`; batch from this `put_batch`.

    Errors: ConfigError when the devices do not divide the micro-batches.
    """
    check_devices(config, mesh)
    del shardings  # the whole state is on the first device
    loss = functools.partial(next_token.loss_sums, decoder=decoder, loss=config.loss)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)

    gradient_on_each = on_each_device(gradient_of(loss), mesh)
    rate = config.loss.bias_update_rate
    step = functools.partial(update, optimizer=optimizer, schedule=schedule, bias_update_rate=rate)
    apply = jax.jit(step, donate_argnums=0)

    def train_step(state: TrainState, batch: Turns) -> tuple[TrainState, Metrics]:
        if config.lora is not None and config.lora.dropout:
            batch = _with_dropout_seeds(batch, config, state.step, mesh)
        gradients, sums = _sum_over(gradient_on_each, state.params, batch, mesh)
        return apply(state, gradients, sums)

    return train_step


def put_batch(arrays: Mapping[str, np.ndarray], config: Config, mesh: Mesh) -> Turns:
    """Micro-batch m = rows m::micro_batches, on the device that computes it. Errors: as `training.step.put_batch`."""
    check_devices(config, mesh)
    check_weights(arrays)
    turns = config.batch.micro_batches // mesh.size
    where = NamedSharding(mesh, PartitionSpec("data"))
    stacked = {key: split_rows(arrays[key], config.batch.micro_batches) for key in KEYS}
    return [jax.device_put({key: x_MBT[turn::turns] for key, x_MBT in stacked.items()}, where) for turn in range(turns)]


def _with_dropout_seeds(batch: Turns, config: Config, step: jax.Array, mesh: Mesh) -> Turns:
    """Each token's seed beside it, the same as `training.step` gives it."""
    shape = (config.batch.global_rows, config.data.sequence_length)
    seeds = _seeds_of_turns(config.seed, step, shape, config.batch.micro_batches, len(batch))
    on_devices = jax.device_put(seeds, NamedSharding(mesh, PartitionSpec("data")))
    return [{**one, DROPOUT_SEEDS: seeds_DBT} for one, seeds_DBT in zip(batch, on_devices, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _seeds_of_turns(
    seed: int, step: jax.Array, shape: tuple[int, int], micro_batches: int, turns: int
) -> list[jax.Array]:
    seeds_MBT = split_rows(dropout_seeds(seed, step, shape), micro_batches)
    return [seeds_MBT[turn::turns] for turn in range(turns)]


def check_devices(config: Config, mesh: Mesh) -> None:
    """Every device must get the same number of micro-batches, from one process."""
    if jax.process_count() > 1:
        raise ConfigError(
            "config.determinism",
            f"'elastic' with {jax.process_count()} processes",
            "Elastic mode runs in one process: use 'same_mesh'.",
        )
    if config.batch.micro_batches % mesh.size:
        raise ConfigError(
            "config.batch.micro_batches",
            f"{config.batch.micro_batches} is not divisible by the {mesh.size} devices of the mesh",
            f"Use a multiple of {mesh.size}, or fewer devices (config.mesh.data).",
        )


def on_each_device(function: Callable[[Any, Batch], Any], mesh: Mesh) -> Callable[[Any, Batch], Any]:
    """jitted `program(params, [D, rows, T] batch) -> tree of [D, ...]`: device d computes slice d by itself."""

    def local(params: Any, batch: Batch) -> Any:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # inside, there is one device and no layout
            result = function(params, jax.tree.map(lambda x: x[0], batch))
        return jax.tree.map(lambda x: x[None], result)

    cut, whole = PartitionSpec("data"), PartitionSpec()
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(whole, cut), out_specs=cut, check_vma=False))


class TreeSum:
    """Adds `count` values in a fixed tree, whatever the order they come in: ((0 + 1) + (2 + 3)) + ... by index.

    Keeps a value only until its sibling comes: at most log2(count) + 1 when they come in order.
    """

    def __init__(self, count: int, add: Callable[[Any, Any], Any]):
        self._count, self._add = count, add
        self._waiting: dict[tuple[int, int], Any] = {}  # (level, index) -> sum of the leaves below
        self.total: Any = None  # once all values have come

    def put(self, index: int, value: Any) -> None:
        """Leaf `index`; completes every pair it makes complete."""
        level, width = 0, self._count
        while width > 1:
            sibling = index ^ 1
            if sibling < width:  # else it has none on this level, and moves up alone
                if (level, sibling) not in self._waiting:
                    self._waiting[level, index] = value
                    return
                other = self._waiting.pop((level, sibling))
                value = self._add(value, other) if index < sibling else self._add(other, value)
            level, index, width = level + 1, index // 2, (width + 1) // 2
        self.total = value


def _sum_over(program: Callable[[Any, Batch], Any], params: Any, batch: Turns, mesh: Mesh) -> Any:
    """Tree sum over micro-batches m of program(params, micro-batch m), on the first device."""
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    tree = TreeSum(mesh.size * len(batch), _add)
    for turn, stacked in enumerate(batch):
        leaves, structure = jax.tree.flatten(program(everywhere, stacked))
        for device in range(mesh.size):
            local = [leaf.addressable_shards[device].data for leaf in leaves]
            tree.put(device * len(batch) + turn, local)
    return jax.tree.unflatten(structure, _without_device_axis(tree.total))


@jax.jit
def _without_device_axis(leaves: list[jax.Array]) -> list[jax.Array]:
    return [leaf[0] for leaf in leaves]


@jax.jit
def _add_all(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return jax.tree.map(jnp.add, left, right)


def _add(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    """left + right, on the device of `left`."""
    return _add_all(left, jax.device_put(right, left[0].sharding))
