"""Pipeline parallelism: the layers cut into stages, micro-batches passing through them one behind the other (GPipe).

One program for all devices: a buffer holds what each stage works on, cut over the mesh axis `stage`. A tick computes
all stages at once and hands each result to the next stage. Of M + S - 1 ticks the first and last S - 1 leave some
stages idle (they compute something nobody reads), so many micro-batches are better (arXiv:1811.06965). Knows nothing
of models.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nanollama.parallel.mesh import constrain

Stage = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]  # (weights, x, context) -> (x, extras)


def stages() -> int:
    """Devices along `stage` in the mesh of the program being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get("stage", 1)


def run(stage: Stage, weights: Any, x_MBTD: jax.Array, context_M: Any) -> tuple[jax.Array, Any]:
    """Each micro-batch through all stages, in order: ([M, B, T, D], extras [M, S, ...]).

    weights: [S, ...] per leaf; context_M: what a stage reads of its micro-batch, [M, ...] per leaf.
    """
    count, S = x_MBTD.shape[0], stages()
    on_all = jax.vmap(stage, spmd_axis_name="stage")

    def tick(buffer_SBTD: jax.Array, time: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        entering = x_MBTD[jnp.minimum(time, count - 1)]
        inputs = jnp.concatenate([entering[None], buffer_SBTD[:-1]])
        inputs = constrain(inputs, "stage", "batch", None, "activation_embed")
        micro_S = jnp.clip(time - jnp.arange(S), 0, count - 1)  # the micro-batch at each stage
        outputs, extras = on_all(weights, inputs, jax.tree.map(lambda x: x[micro_S], context_M))
        outputs = constrain(outputs, "stage", "batch", None, "activation_embed")
        return outputs, (outputs[-1], extras)

    empty = jnp.zeros((S, *x_MBTD.shape[1:]), x_MBTD.dtype)
    _, (leaving, extras) = jax.lax.scan(tick, empty, jnp.arange(count + S - 1))

    def of_micro_batches(x: jax.Array) -> jax.Array:  # stage s had micro-batch m at tick s + m
        return jnp.stack([x[s : s + count, s] for s in range(S)], axis=1)

    return leaving[S - 1 :], jax.tree.map(of_micro_batches, extras)
