"""Which tiles of a score matrix hold anything: bounds from intervals, computed by XLA once per call.

Query t of row b sees keys [first_key[b, t], start[b] + t]. Kernels work on tiles of q queries x k keys; a tile that
no pair of the mask falls into is never visited, and one that it covers whole needs no comparison. Letters: Q and P
count tiles of queries and of keys.
"""

import jax
import jax.numpy as jnp

# Of each tile of queries: key tiles [low, high) hold something, and of these [whole_low, whole_high) are whole.
# Of each tile of keys: the same with queries and keys exchanged.
LOW, WHOLE_LOW, WHOLE_HIGH, HIGH = range(4)


def last_query(first_key_BT: jax.Array, length: int) -> jax.Array:
    """[B, length]: the last query (row index) whose interval begins at or before each key; -1 where none does.

    With causality this is the last query that sees the key, for any first keys, rising or not.
    """
    B, T = first_key_BT.shape
    rows_B1 = jnp.arange(B)[:, None]
    begun_BS = (
        jnp.full((B, length), -1, jnp.int32)
        .at[rows_B1, first_key_BT]
        .max(jnp.arange(T, dtype=jnp.int32)[None], mode="drop")
    )
    return jax.lax.cummax(begun_BS, axis=1)


def key_tiles(first_key_BT: jax.Array, start_B: jax.Array, length: int, q: int, k: int) -> jax.Array:
    """[B, Q, 4] int32: the key tiles each tile of queries visits. T is a multiple of q, `length` (of keys) of k."""
    B, T = first_key_BT.shape
    first_BQq = first_key_BT.reshape(B, T // q, q)
    first_query_BQ = start_B[:, None] + jnp.arange(0, T, q)
    high = -(-jnp.minimum(first_query_BQ + q, length) // k)
    low = jnp.minimum(first_BQq.min(axis=2) // k, high)
    whole_low = jnp.clip(-(-first_BQq.max(axis=2) // k), low, high)
    whole_high = jnp.clip((first_query_BQ + 1) // k, whole_low, high)
    return jnp.stack([low, whole_low, whole_high, high], axis=-1).astype(jnp.int32)


def query_tiles(first_key_BT: jax.Array, start_B: jax.Array, length: int, q: int, k: int) -> jax.Array:
    """[B, P, 4] int32: the query tiles each tile of keys visits. T is a multiple of q, `length` (of keys) of k."""
    B, T = first_key_BT.shape
    count = T // q
    first_P = jnp.arange(0, length, k)
    first_row_BP = first_P - start_B[:, None]  # the query that is the tile's first key
    low = jnp.clip(first_row_BP // q, 0, count)
    last_BP = last_query(first_key_BT, length).reshape(B, length // k, k).max(axis=2)
    high = jnp.clip(last_BP // q + 1, low, count)
    whole_low = jnp.clip(-(-(first_row_BP + k - 1) // q), low, high)
    # every query up to and in a query tile must see the key tile's first key
    begun_BQ = jax.lax.cummax(first_key_BT.reshape(B, count, q).max(axis=2), axis=1)
    whole_high = jnp.clip(jnp.sum(begun_BQ[:, None] <= first_P[:, None], axis=2), whole_low, high)
    return jnp.stack([low, whole_low, whole_high, high], axis=-1).astype(jnp.int32)
