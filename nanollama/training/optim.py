"""Optimizers as one optax chain: clip, precondition (Adam or Muon), decay weights, scale by the learning rate.

Owns which parameter is treated how. It is decided by the logical axes a model declares, never by the number of
dimensions: parameters are stacked, so a norm's scale is [L, D] and a query projection [L, D, H, K].

    axes hold            weight decay   with config.optimizer.name = "muon"
    "norm"               no             Adam
    "vocab"              yes            Adam (embedding and head: rows are looked up, not multiplied as a matrix)
    "router"             yes            Adam (the router, and the gate of a shared expert: one row per expert)
    "embed", else        yes            Muon: "embed" is one side of each layer's matrix, what remains is the other;
    "latent", no "embed" yes            Muon of latent attention's matrices out of a latent: that is the one side
    "rank" (adapters)    yes            Muon: A and B of each layer, "rank" is one side
    "added" (new rows)   yes            Adam
    others (biases)      no             Adam

Each expert's matrix is one of its own for Muon, as each layer's is.

Knows nothing of meshes and of the loop.
"""

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from nanollama.config import Config, OptimizerConfig
from nanollama.models.lora import learned
from nanollama.training.schedules import make_schedule
from nanollama.training.state import logical_axes

Axes = tuple[str, ...]

# RMS of a Muon update, so that it matches AdamW's and one learning rate serves both: arXiv:2502.16982, section 2.2.
MUON_UPDATE_RMS = 0.2
_BATCH_AXES = ("layers", "expert")  # one matrix each
_IN_MATRICES = {"embed", "latent", "rank"}  # each matrix has one of these axes; norms and biases have none


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The run's optimizer, with its schedule inside; its state counts its own steps."""
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)
    return build_optimizer(config.optimizer, schedule, learned(logical_axes(config.model, config.lora)))


def build_optimizer(config: OptimizerConfig, schedule: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    """As `make_optimizer`, for parameters with the logical axes of the tree `axes` (leaves: tuples of names)."""
    is_decayed = _map_axes(lambda names: bool(_IN_MATRICES & set(names)), axes)  # neither norms nor biases
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _muon(config, axes) if config.name == "muon" else _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.momentum_dtype)


def _muon(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Muon (Nesterov momentum, five Newton-Schulz steps) for each layer's matrices, Adam for the rest."""
    labels = _map_axes(lambda names: "muon" if is_matrix(names) else "adam", axes)

    def dimensions(updates: Any) -> Any:  # optax hides the other group's arrays behind MaskedNodes
        return jax.tree.map(
            lambda names, x: x if isinstance(x, optax.MaskedNode) else matrix_sides(names),
            axes,
            updates,
            is_leaf=_is_axes,
        )

    muon = optax.chain(
        scale_by_muon(
            beta=config.muon_momentum, weight_dimension_numbers=dimensions, mu_dtype=config.momentum_dtype
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_match_rms, updates, dimensions(updates))),
    )
    return optax.partition({"muon": muon, "adam": _adam(config)}, labels)


def is_matrix(names: Axes) -> bool:
    """Whether Muon treats a parameter with these logical axes."""
    return bool(_IN_MATRICES & set(names)) and not {"vocab", "added", "norm", "router"} & set(names)


def matrix_sides(names: Axes) -> MuonDimensionNumbers:
    """Which axes of a stacked, unflattened weight make up the two sides of one layer's matrix."""
    sides = [i for i, name in enumerate(names) if name not in _BATCH_AXES]
    one = names.index(next(name for name in ("rank", "embed", "latent") if name in names))
    return MuonDimensionNumbers(reduction_axis=(one,), output_axis=tuple(i for i in sides if i != one))


def _match_rms(update: jax.Array, sides: MuonDimensionNumbers) -> jax.Array:
    """An orthogonal [m, n] matrix has an RMS of 1 / sqrt(max(m, n))."""
    m, n = (math.prod(update.shape[axis] for axis in side) for side in sides)
    return update * (MUON_UPDATE_RMS * max(m, n) ** 0.5)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _map_axes(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=_is_axes)
