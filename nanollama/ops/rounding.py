"""Stochastic rounding of float32 to bfloat16: what nearest rounding would lose is kept on average.

An update smaller than half a unit in the last place of a bfloat16 parameter (1/512 of it) never changes it when
rounded to nearest; rounded up with the probability of the remainder it does, as often as it should (arXiv:2010.06192).
"""

from typing import Any

import jax
import jax.numpy as jnp


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16 above or below x float32, the nearer the likelier; the same bits for the same key. NaN and inf stay."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def add_rounded(parameters: Any, updates: Any, step: jax.Array) -> Any:
    """parameters + updates, each in its parameter's dtype; bfloat16 ones rounded by a key of the step and leaf."""
    leaves, structure = jax.tree.flatten(parameters)
    step_key = jax.random.fold_in(jax.random.key(0), step)
    added = []
    for number, (parameter, update) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        total = parameter.astype(jnp.float32) + update
        if parameter.dtype == jnp.bfloat16:
            total = round_stochastically(total, jax.random.fold_in(step_key, number))
        added.append(total.astype(parameter.dtype))
    return jax.tree.unflatten(structure, added)


def widened(parameters: Any) -> Any:
    """The parameters in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), parameters)
