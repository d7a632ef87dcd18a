"""The gradient of a look-up in a table of rows: per row, the sum over all tokens that looked it up. Pure; no mesh.

The obvious scatter-add has no order on a GPU. Told to be deterministic, XLA makes a loop of one iteration a token of it
(jax 0.10.1), or sorts every single number (0.12.0.1). Here only ids are sorted, and equal ones are summed as a tree.
"""

from typing import Any

import jax
import jax.numpy as jnp


def sums_by_id(values_ND: jax.Array, ids_N: jax.Array, size: int) -> jax.Array:
    """[size, D] float32: row i sums the values whose id is i, in one fixed order; ids outside [0, size) count nowhere.

    No two values are written to one row, so no compiler has to order them.
    """
    order_N = jnp.argsort(ids_N, stable=True)
    ids_N, values_ND = ids_N[order_N], values_ND[order_N].astype(jnp.float32)
    changes = ids_N[1:] != ids_N[:-1]
    edge = jnp.ones(1, bool)
    first_N, last_N = jnp.concatenate([edge, changes]), jnp.concatenate([changes, edge])
    sums_ND, _ = jax.lax.associative_scan(_after, (values_ND, first_N[:, None]))
    inside_N = last_N & (ids_N >= 0) & (ids_N < size)
    nowhere_N = size + jnp.arange(len(ids_N))
    row_N = jnp.where(inside_N, ids_N, nowhere_N)
    empty = jnp.zeros((size, values_ND.shape[1]), jnp.float32)
    return empty.at[row_N].set(sums_ND, mode="drop", unique_indices=True)


def _after(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    """Sums that begin anew where a run of equal ids does."""
    (sum_left, first_left), (sum_right, first_right) = left, right
    return jnp.where(first_right, sum_right, sum_left + sum_right), first_left | first_right
