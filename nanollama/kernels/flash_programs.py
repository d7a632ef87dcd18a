"""What one program instance of each flash kernel computes; `flash_triton` says which instances there are.

Refs are blocks in the GPU's memory; what is loaded from them is a tile, in registers and shared memory. Lower case
letters are a tile's: q queries, k keys. Head dims are loaded in parts that are powers of two.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

SMALLEST_TILE = 16  # side of a matrix product in Triton
_LOG2_E = math.log2(math.e)
_MASKED = -1e30  # finite, so that exp2(masked - max) is 0 and never NaN


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel cuts the scores, powers of two, and how it is compiled.

    Mosaic GPU: four warps are a warpgroup, of which one only loads; the others share the tile's rows.
    """

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2  # loads that may be under way


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tile of each of the three kernels."""

    forward: Tile = Tile(128, 64, 4, 2)
    q_gradient: Tile = Tile(64, 64, 4, 2)
    kv_gradient: Tile = Tile(64, 64, 4, 2)

    def each(self) -> tuple[Tile, Tile, Tile]:
        return self.forward, self.q_gradient, self.kv_gradient


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static in a call of the kernels."""

    scale: float
    tiles: Tiles
    interpret: bool
    compiler: str = "triton"  # or "mosaic"


def forward_kernel(
    bounds_ref: Any, start_ref: Any, first_key_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any,
    lse_ref: Any, *, tile: Tile, scale: float, last: int,
) -> None:  # fmt: skip
    """One tile of queries of one head. Online softmax: o, the running maximum m and sum l, all base 2."""
    first_row = (last - pl.program_id(0)) * tile.queries
    query_q = start_ref[...] + first_row + jnp.arange(tile.queries)
    first_key_q = first_key_ref[...]
    key_parts, value_parts = _parts(q_ref.shape[-1]), _parts(v_ref.shape[-1])
    q = [q_ref[:, part] for part in key_parts]

    def visit(number: jax.Array, carry: Any, masked: bool) -> Any:
        out, highest_q, sum_q = carry
        keys = pl.ds(number * tile.keys, tile.keys)
        scores_qk = _sum_of_products(q, [k_ref[keys, part].T for part in key_parts]) * (scale * _LOG2_E)
        if masked:  # after scaling: a fused multiply-subtract of a huge number and its own maximum is not 0
            key_k = number * tile.keys + jnp.arange(tile.keys)
            seen = (key_k[None] >= first_key_q[:, None]) & (key_k[None] <= query_q[:, None])
            scores_qk = jnp.where(seen, scores_qk, _MASKED)
        now_q = jnp.maximum(highest_q, scores_qk.max(axis=1))
        weights_qk = jnp.exp2(scores_qk - now_q[:, None])
        shrink_q = jnp.exp2(highest_q - now_q)
        low_qk = weights_qk.astype(v_ref.dtype)
        out = [o * shrink_q[:, None] + _product(low_qk, v_ref[keys, part])
               for o, part in zip(out, value_parts, strict=True)]  # fmt: skip
        return out, now_q, sum_q * shrink_q + weights_qk.sum(axis=1)

    initial = (
        [jnp.zeros((tile.queries, part.size), jnp.float32) for part in value_parts],
        jnp.full((tile.queries,), _MASKED, jnp.float32),
        jnp.zeros((tile.queries,), jnp.float32),
    )
    out, highest_q, sum_q = _over_tiles(bounds_ref, visit, initial)
    sum_q = jnp.where(sum_q == 0, 1.0, sum_q)  # only of queries that were added to fill a tile
    for o, part in zip(out, value_parts, strict=True):
        out_ref[:, part] = (o / sum_q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = highest_q + jnp.log2(sum_q)


def q_gradient_kernel(
    bounds_ref: Any, start_ref: Any, first_key_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_gradient_ref: Any,
    lse_ref: Any, delta_ref: Any, q_gradient_ref: Any, *, tile: Tile, scale: float, last: int,
) -> None:  # fmt: skip
    """One tile of queries of one head: dS = P (dO V^T - delta), dQ = scale dS K."""
    first_row = (last - pl.program_id(0)) * tile.queries
    query_q = start_ref[...] + first_row + jnp.arange(tile.queries)
    first_key_q, lse_q, delta_q = first_key_ref[...], lse_ref[...], delta_ref[...]
    key_parts, value_parts = _parts(q_ref.shape[-1]), _parts(v_ref.shape[-1])
    q = [q_ref[:, part] for part in key_parts]
    out_gradient = [out_gradient_ref[:, part] for part in value_parts]

    def visit(number: jax.Array, q_gradient: Any, masked: bool) -> Any:
        keys = pl.ds(number * tile.keys, tile.keys)
        k = [k_ref[keys, part] for part in key_parts]
        scores_qk = _sum_of_products(q, [part.T for part in k])
        weights_qk = jnp.exp2(scores_qk * (scale * _LOG2_E) - lse_q[:, None])
        if masked:
            key_k = number * tile.keys + jnp.arange(tile.keys)
            seen = (key_k[None] >= first_key_q[:, None]) & (key_k[None] <= query_q[:, None])
            weights_qk = jnp.where(seen, weights_qk, 0.0)
        weights_gradient_qk = _sum_of_products(out_gradient, [v_ref[keys, part].T for part in value_parts])
        scores_gradient_qk = (weights_qk * (weights_gradient_qk - delta_q[:, None])).astype(k_ref.dtype)
        return [g + _product(scores_gradient_qk, part) for g, part in zip(q_gradient, k, strict=True)]

    initial = [jnp.zeros((tile.queries, part.size), jnp.float32) for part in key_parts]
    q_gradient = _over_tiles(bounds_ref, visit, initial)
    for gradient, part in zip(q_gradient, key_parts, strict=True):
        q_gradient_ref[:, part] = (gradient * scale).astype(q_gradient_ref.dtype)


def kv_gradient_kernel(
    bounds_ref: Any, start_ref: Any, first_key_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_gradient_ref: Any,
    lse_ref: Any, delta_ref: Any, k_gradient_ref: Any, v_gradient_ref: Any, *, tile: Tile, scale: float, heads: int,
) -> None:  # fmt: skip
    """One tile of keys of one KV head, over all its query heads: dV = P^T dO, dK = scale dS^T Q.

    Scores are computed transposed, [k, q], so that no product needs its left side transposed.
    """
    key_k = pl.program_id(0) * tile.keys + jnp.arange(tile.keys)
    start = start_ref[...]
    key_parts, value_parts = _parts(k_ref.shape[-1]), _parts(v_ref.shape[-1])
    k, v = [k_ref[:, part] for part in key_parts], [v_ref[:, part] for part in value_parts]

    def of_head(head: jax.Array, carry: Any) -> Any:
        def visit(number: jax.Array, carry: Any, masked: bool) -> Any:
            k_gradient, v_gradient = carry
            rows = pl.ds(number * tile.queries, tile.queries)
            q = [q_ref[rows, head, part] for part in key_parts]
            out_gradient = [out_gradient_ref[rows, head, part] for part in value_parts]
            lse_q, delta_q = lse_ref[head, rows], delta_ref[head, rows]
            scores_kq = _sum_of_products(k, [part.T for part in q])
            weights_kq = jnp.exp2(scores_kq * (scale * _LOG2_E) - lse_q[None])
            if masked:
                query_q = start + number * tile.queries + jnp.arange(tile.queries)
                seen = (key_k[:, None] >= first_key_ref[rows][None]) & (key_k[:, None] <= query_q[None])
                weights_kq = jnp.where(seen, weights_kq, 0.0)
            low_kq = weights_kq.astype(q_ref.dtype)
            v_gradient = [g + _product(low_kq, part) for g, part in zip(v_gradient, out_gradient, strict=True)]
            weights_gradient_kq = _sum_of_products(v, [part.T for part in out_gradient])
            scores_gradient_kq = (weights_kq * (weights_gradient_kq - delta_q[None])).astype(q_ref.dtype)
            k_gradient = [g + _product(scores_gradient_kq, part) for g, part in zip(k_gradient, q, strict=True)]
            return k_gradient, v_gradient

        return _over_tiles(bounds_ref, visit, carry)

    initial = tuple([jnp.zeros((tile.keys, part.size), jnp.float32) for part in parts]
                    for parts in (key_parts, value_parts))  # fmt: skip
    k_gradient, v_gradient = jax.lax.fori_loop(0, heads, of_head, initial)
    for gradient, part in zip(k_gradient, key_parts, strict=True):
        k_gradient_ref[:, part] = (gradient * scale).astype(k_gradient_ref.dtype)
    for gradient, part in zip(v_gradient, value_parts, strict=True):
        v_gradient_ref[:, part] = gradient.astype(v_gradient_ref.dtype)


def _over_tiles(bounds_ref: Any, visit: Callable[..., Any], initial: Any) -> Any:
    """Visit the tiles of a bounds row: compare at both ends, not between, where the mask covers tiles whole."""
    low, whole_low, whole_high, high = (bounds_ref[i] for i in range(4))
    carry = jax.lax.fori_loop(low, whole_low, functools.partial(visit, masked=True), initial)
    carry = jax.lax.fori_loop(whole_low, whole_high, functools.partial(visit, masked=False), carry)
    return jax.lax.fori_loop(whole_high, high, functools.partial(visit, masked=True), carry)


def _parts(dim: int) -> list[Any]:
    """Slices of a head dim, each a power of two, the largest first."""
    parts, low = [], 0
    for bit in reversed(range(dim.bit_length())):
        if dim >> bit & 1:
            parts.append(pl.ds(low, 1 << bit))
            low += 1 << bit
    return parts


def _sum_of_products(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> jax.Array:
    total = _product(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total += _product(a, b)
    return total


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)
