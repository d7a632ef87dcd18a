"""Masks as intervals (DESIGN law 13): causal, documents, window and padding in one integer per query."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first_key_BT", "query_start"],
    meta_fields=["window", "documents", "folded", "pieces"],
)
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Which keys each query sees: [first_key_BT[b, t], start + t], in key indices, and `window` of them at most.

    first_key_BT: where the query's document begins (its segment id, so to speak); a query of padding begins at
    itself. query_start: None when queries and keys are the same positions (training, start = 0); int32, a scalar or
    [B], when the queries are the last written part of a longer key cache.
    """

    first_key_BT: jax.Array
    query_start: jax.Array | None = None
    window: int = 0  # keys a query sees, its own included (arXiv:2004.05150); 0 = all
    documents: bool = True  # False promises that first_key_BT is 0 everywhere: plain causal attention
    folded: bool = False  # first_key_BT also holds a window, so it no longer tells documents apart
    pieces: bool = False  # rows are pieces of longer ones (`parallel.context`), whose keys attention must gather

    def first_keys(self, rows: slice = slice(None)) -> jax.Array:
        """[B, rows]: the first key of each query, windows included."""
        first_key_BT = self.first_key_BT[:, rows]
        return jnp.maximum(first_key_BT, self.query_keys(rows) - self.window + 1) if self.window else first_key_BT

    def query_keys(self, rows: slice = slice(None)) -> jax.Array:
        """[rows], or [B, rows] where rows start apart: the key index of each query's own position."""
        low, high, _ = rows.indices(self.first_key_BT.shape[1])
        index_T = jnp.arange(low, high)
        if self.query_start is None:
            return index_T
        return (
            jnp.asarray(self.query_start)[..., None] + index_T
            if jnp.ndim(self.query_start)
            else (self.query_start + index_T)
        )

    def starts(self) -> jax.Array:
        """[B] int32: the key index of each row's first query."""
        start: Any = 0 if self.query_start is None else self.query_start
        return jnp.broadcast_to(jnp.asarray(start, jnp.int32), (self.first_key_BT.shape[0],))


def slide(mask: MaskSpec, window: jax.Array | int) -> MaskSpec:
    """The mask of a layer whose queries see at most `window` keys; an array where layers of one program differ."""
    if isinstance(window, int):
        return dataclasses.replace(mask, window=min(window, mask.window or window))
    first_key_BT = jnp.maximum(mask.first_key_BT, mask.query_keys() - window + 1)
    return dataclasses.replace(mask, first_key_BT=first_key_BT, documents=True, folded=True)
