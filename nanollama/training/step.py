"""One optimizer step as one compiled program, over a mesh.

Owns accumulation, exact token weighting and the step's metrics. Losses and gradients are summed over tokens and
divided once, by the weight of the whole global batch: cutting the batch into micro-batches or over devices changes
nothing but rounding. Knows nothing of files, loaders or the loop. `training.elastic` offers the same functions with
the same bits on any number of devices.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanollama.config import Config, ConfigError
from nanollama.data.files import DataError
from nanollama.models.decoder import LAYERS, Decoder
from nanollama.models.lora import learned, with_dropout_seeds, with_learned
from nanollama.objectives import next_token
from nanollama.ops.losses import LossSums
from nanollama.ops.moe import MoeSums, updated_bias
from nanollama.ops.order import after
from nanollama.ops.rounding import add_rounded, widened
from nanollama.parallel import backend, context
from nanollama.parallel.mesh import BATCH_AXES, batch_sharding, batch_shards
from nanollama.training.schedules import make_schedule
from nanollama.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch], tuple[jax.Array, LossSums]]

KEYS = ("tokens", "targets", "weights", "positions", "first_key")  # of a batch; all [B, T]


def make_train_step(
    config: Config,
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
) -> Any:
    """`step(state, batch) -> (state, metrics)`, jitted: the state is donated and keeps its shardings.

    batch: as `put_batch` returns it. metrics: scalars on the device, see `update`. Errors: ConfigError when the
    rows do not divide over devices and micro-batches.
    """
    context.check_length(config.data.sequence_length, mesh.shape["context"])
    check_rows(config, mesh.shape)
    gradient = make_gradient(config, decoder, mesh, shardings)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = with_dropout_seeds(batch, config.lora, config.seed, state.step)
        gradients, sums = gradient(state.params, batch)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(state, gradients, sums, optimizer, schedule, config.loss.bias_update_rate)

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def compile_step(train_step: Any, state: TrainState, batch: Batch) -> Any:
    """`make_train_step`'s step as a program for these shapes, before it runs: see `backend.give_back_memory`."""
    program = train_step.lower(state, batch).compile()
    backend.give_back_memory()
    return program


def put_batch(arrays: Mapping[str, np.ndarray], config: Config, mesh: Mesh) -> Batch:
    """Rows of this process, cut over the mesh's batch axes; other keys than KEYS stay on the host.

    Errors: DataError when no token of them has a weight: their mean loss would be 0 / 0.
    """
    del config  # the elastic twin needs it
    check_weights(arrays)
    where = batch_sharding(mesh)
    with jax.transfer_guard("allow"):  # with several processes JAX does not count this as explicit, though it is
        return {key: jax.make_array_from_process_local_data(where, np.asarray(arrays[key])) for key in KEYS}


def check_weights(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse a batch without a loss token, on the host, before it costs a step."""
    if not np.any(arrays["weights"]):
        raise DataError(
            f"a batch of {arrays['weights'].shape} tokens has no token with a loss weight above 0. Look at the "
            "loss bits of the packed set, or at its padding."
        )


def check_rows(config: Config, sizes: Mapping[str, int]) -> None:
    """Rows must divide into micro-batches, and each micro-batch's rows over the devices; `sizes`: as `batch_shards`."""
    rows, micro_batches, devices = config.batch.global_rows, config.batch.micro_batches, batch_shards(sizes)
    if rows % (micro_batches * devices):
        raise ConfigError(
            "config.batch.global_rows",
            f"{rows} is not divisible by micro_batches={micro_batches} x {'*'.join(BATCH_AXES)}={devices}",
            f"Use a multiple of {micro_batches * devices}, or fewer micro-batches.",
        )


def make_gradient(
    config: Config, decoder: Decoder, mesh: Mesh, shardings: TrainState
) -> Callable[[Any, Batch], tuple[Any, LossSums]]:
    """`gradient(params, batch) -> (gradients of the summed loss, sums)`, to be traced inside a jitted step."""
    # With pipeline stages all micro-batches go through in one pass, one behind the other.
    through, apart = (config.batch.micro_batches, 1) if mesh.shape["stage"] > 1 else (0, config.batch.micro_batches)
    loss = functools.partial(next_token.loss_sums, decoder=decoder, loss=config.loss, micro_batches=through)

    def gradient(params: Any, batch: Batch) -> tuple[Any, LossSums]:
        if not config.data.mask_documents:  # said when compiling, so that backends without documents may be used
            batch = {key: x_BT for key, x_BT in batch.items() if key != "first_key"}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sum_gradients(loss, params, batch, apart, shardings.params)

    return gradient


def sum_gradients(loss: Loss, params: Any, batch: Batch, micro_batches: int, shardings: Any) -> tuple[Any, LossSums]:
    """Gradients of the summed loss, float32, like `learned(params)`, and the sums; one micro-batch in memory at a time.

    Micro-batch m holds rows m::micro_batches, so that rows cut over devices stay where they are.
    """
    gradient = gradient_of(loss)

    def pinned(gradients: Any) -> Any:  # without it a gradient can lose an axis of its parameter's sharding
        return jax.lax.with_sharding_constraint(gradients, learned(shardings))

    if micro_batches == 1:
        gradients, sums = gradient(params, batch)
        return pinned(gradients), sums

    def accumulate(carry: tuple[Any, LossSums], micro_batch: Batch) -> tuple[tuple[Any, LossSums], None]:
        gradients, sums = gradient(params, micro_batch)
        return (pinned(jax.tree.map(jnp.add, carry[0], gradients)), carry[1] + sums), None

    micro = {key: split_rows(x_BT, micro_batches) for key, x_BT in batch.items()}
    shapes = jax.eval_shape(loss, params, jax.tree.map(lambda x_MBT: x_MBT[0], micro))[1]
    zeros = pinned(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), learned(params)))
    (gradients, sums), _ = jax.lax.scan(
        accumulate,
        (zeros, jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)),
        micro,
    )
    return gradients, sums


def gradient_of(loss: Loss) -> Callable[[Any, Batch], tuple[Any, LossSums]]:
    """`(params, batch) -> (gradients of what learns, sums)`."""

    def of_learned(new: Any, params: Any, batch: Batch) -> tuple[jax.Array, LossSums]:
        return loss(with_learned(params, new), batch)

    def gradient(params: Any, batch: Batch) -> tuple[Any, LossSums]:
        new = widened(learned(params))  # gradients take their dtype
        (_, sums), gradients = jax.value_and_grad(of_learned, has_aux=True)(new, params, batch)
        return gradients, sums

    return gradient


def split_rows(x_BT: Any, micro_batches: int) -> Any:
    """[B, T] -> [M, B / M, T], micro-batch m holding rows m::M."""
    return x_BT.reshape(-1, micro_batches, *x_BT.shape[1:]).swapaxes(0, 1)


def update(
    state: TrainState,
    gradient_sums: Any,
    sums: LossSums,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    bias_update_rate: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """Divide once, step the optimizer, then the selection biases (`ops.moe.updated_bias`). Metrics, float32 scalars:

    loss (nats per token), z_loss, total (their sum, what is minimised), accuracy, weight (loss tokens), grad_norm
    (before clipping), update_norm, learning_rate (used for this update), finite (bool: all of these are); of models
    with experts also those of `expert_metrics`, and `expert_load` [L, E].
    """
    gradients = jax.tree.map(lambda g: g / sums.weight, gradient_sums)
    before = learned(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, widened(before))
    update_norm = optax.tree.norm(updates)
    ready = jax.tree.map(lambda u: after(u, update_norm), updates)  # the norm reads parameters that this overwrites
    params = with_learned(state.params, add_rounded(before, ready, state.step))
    metrics = {
        "loss": sums.nll / sums.weight,
        "z_loss": sums.z / sums.weight,
        "total": sums.total / sums.weight,
        "accuracy": sums.correct / sums.weight,
        "weight": sums.weight,
        "grad_norm": optax.tree.norm(gradients),
        "update_norm": update_norm,
        "learning_rate": schedule(state.step),
    }
    if sums.moe is not None:
        metrics |= expert_metrics(sums.moe, sums.weight)
        if "router_bias" in before.get(LAYERS, {}):  # not while only adapters learn
            bias_LE = updated_bias(params[LAYERS]["router_bias"], sums.moe.load_LE, bias_update_rate)
            params = {**params, LAYERS: {**params[LAYERS], "router_bias": bias_LE}}
    metrics["finite"] = jnp.all(jnp.isfinite(jnp.stack(list(metrics.values()))))
    if sums.moe is not None:
        metrics["expert_load"] = expert_load(sums.moe)
    return TrainState(state.step + 1, params, opt_state), metrics


def expert_metrics(sums: MoeSums, weight: jax.Array) -> Metrics:
    """balance_loss (1 per layer when loads are even) and router_z_loss, both before their coefficients; expert_load_max
    and expert_load_min (of any expert of any layer, as a multiple of even loads); dropped (assignments)."""
    share_LE = expert_load(sums)
    return {
        "balance_loss": sums.balance / weight,
        "router_z_loss": sums.z / weight,
        "expert_load_max": share_LE.max(),
        "expert_load_min": share_LE.min(),
        "dropped": sums.dropped,
    }


def expert_load(sums: MoeSums) -> jax.Array:
    """Assignments of each expert as a multiple of its layer's mean, [L, E] over the layers with experts."""
    return sums.load_LE / jnp.maximum(sums.load_LE.mean(axis=1, keepdims=True), 1.0)
