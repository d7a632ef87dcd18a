"""The training state, born sharded: no device ever holds more of it than its share.

Owns how parameters and optimizer state come to be, and where each array lives. Fresh parameters depend on the
seed and on each parameter's name and shape only: the same bits on any mesh. Knows nothing of data or the loop.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from nanollama.config import ComputeConfig, Config, LoraConfig, ModelConfig
from nanollama.models import lora as loras
from nanollama.models.decoder import Decoder, init_params
from nanollama.parallel.mesh import sharding


@flax.struct.dataclass
class TrainState:
    """All that a resumed run needs; the position in the data is the step."""

    step: jax.Array  # int32 scalar: updates done
    params: Any  # plain nested dict; float32, or matrices as config.optimizer.parameter_dtype says
    opt_state: Any  # of `models.lora.learned(params)`: all of them, or the adapters


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(fresh state on `mesh`, the shardings of its arrays), from `config.seed`."""
    shardings = state_shardings(config, optimizer, mesh)
    init = jax.jit(functools.partial(_fresh, config, optimizer), out_shardings=shardings)
    return init(jax.device_put(config.seed)), shardings  # an explicit copy: the loop forbids the others


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """The state's shapes and types, with shardings where `mesh` is given (what a restore asks for). No memory."""
    abstract = jax.eval_shape(functools.partial(_fresh, config, optimizer), 0)
    if mesh is None:
        return abstract
    return jax.tree.map(
        lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where),
        abstract,
        state_shardings(config, optimizer, mesh),
    )


def state_shardings(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where every array of the state lives.

    Parameters by `parallel.mesh.RULES`; what the optimizer keeps for a parameter, found by its name and shape,
    beside it; the rest (scalars) everywhere. In elastic mode all of it is on the first device.
    """
    abstract = abstract_state(config, optimizer)
    if config.determinism == "elastic":
        first = SingleDeviceSharding(mesh.devices.flat[0])
        return jax.tree.map(lambda _: first, abstract)
    everywhere: Sharding = NamedSharding(mesh, PartitionSpec())
    of_params = jax.tree.map(
        lambda array, axes: sharding(axes, array.shape, mesh), abstract.params, logical_axes(config.model, config.lora)
    )
    by_name = {
        (_names(path), array.shape): where
        for (path, array), where in zip(
            jax.tree_util.tree_leaves_with_path(abstract.params), jax.tree.leaves(of_params), strict=True
        )
    }

    def beside_parameter(path: Any, array: jax.ShapeDtypeStruct) -> Sharding:
        names = _names(path)
        tails = ((names[start:], array.shape) for start in range(len(names)))
        return next((by_name[tail] for tail in tails if tail in by_name), everywhere)

    of_optimizer = jax.tree_util.tree_map_with_path(beside_parameter, abstract.opt_state)
    return TrainState(everywhere, of_params, of_optimizer)  # type: ignore[arg-type]


def logical_axes(model: ModelConfig, lora: LoraConfig | None = None) -> Any:
    """Tree like the parameters; each leaf is the tuple of logical axis names, "layers" first where stacked."""
    specs = nn.get_partition_spec(_boxed_parameters(model, lora))
    return jax.tree.map(tuple, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def _fresh(config: Config, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = nn.meta.unbox(init_params(Decoder(config.model, config.compute, config.lora), seed))
    opt_state = optimizer.init(loras.learned(params))  # while float32: both moments would take their dtype
    return TrainState(jnp.zeros((), jnp.int32), stored(params, config), opt_state)


def stored(params: Any, config: Config) -> Any:
    """Parameters in the dtype they are kept in: the matrices' is `config.optimizer.parameter_dtype`."""

    def cast(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        is_matrix = bool({"embed", "latent"} & set(axes)) and "rank" not in axes  # adapters are small
        return array.astype(config.optimizer.parameter_dtype) if is_matrix else array

    return jax.tree.map(cast, params, logical_axes(config.model, config.lora))


def fresh_adapters(config: Config, optimizer: optax.GradientTransformation, seed: int) -> Any:
    """What learns of a fresh state; jitted, the rest is never computed."""
    return loras.learned(_fresh(config, optimizer, seed).params)


@functools.lru_cache(maxsize=8)
def _boxed_parameters(model: ModelConfig, lora: LoraConfig | None = None) -> Any:
    """Errors: ConfigError when a target of `lora` is no layer of the model."""

    def trace(lora: LoraConfig | None) -> Any:
        # The compute settings change neither names, shapes nor axes: take the ones that trace fastest.
        decoder = Decoder(model, ComputeConfig(scan_unroll=1), lora)
        return jax.eval_shape(functools.partial(init_params, decoder), 0)

    if lora is not None:
        stacks = [part for part in trace(LoraConfig(targets=("*",))).values() if isinstance(part, dict)]
        found = {name.removesuffix(loras.A) for stack in stacks for name in stack if name.endswith(loras.A)}
        loras.check_targets(lora, found)
    return trace(lora)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
