"""Flash attention on GPU with interval masks (arXiv:2205.14135): forward, dQ and dK/dV, lowered through Triton.

All three visit only the tiles that the intervals allow (`intervals`), so a packed row costs the sum of its documents'
squares, forward and backward. KV heads are never repeated: dK and dV of a KV head are summed over its queries' heads
inside one program. Statistics are base 2; output and logsumexp carry names for remat policies.

Letters as in `nanollama.models.decoder`; J is the values' head dim, R = H / G query heads share a KV head. Head dims
are sums of powers of two from 16 up (80 = 64 + 16), which Triton can tile. Knows nothing of meshes or models.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanollama.kernels import flash_programs, intervals
from nanollama.kernels.flash_programs import SMALLEST_TILE, Tile, Tiles

DEFAULT_TILES = Tiles()
OUTPUT_NAME, LSE_NAME = "attention_output", "attention_lse"  # what remat = "names" saves


def flash_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGJ: jax.Array,
    first_key_BT: jax.Array,
    start_B: jax.Array,
    *,
    scale: float,
    tiles: Tiles = DEFAULT_TILES,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention [B, T, H, J] in q's dtype: query t of row b sees keys [first_key[b, t], start[b] + t].

    Any lengths: rows are padded to whole tiles. `interpret` runs the same kernels as XLA operations on any device.
    Errors: ValueError when `why_not` has a reason.
    """
    reason = why_not(q_BTHK.shape[3], v_BSGJ.shape[3])
    if reason:
        raise ValueError(f"flash_attention: {reason}")
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    tiles = fit(tiles, T, S)
    more_T = -T % max(tile.queries for tile in tiles.each())
    more_S = -S % max(tile.keys for tile in tiles.each())
    own_key_BT = start_B[:, None] + jnp.arange(T, T + more_T, dtype=jnp.int32)  # added queries see themselves
    first_key_BT = jnp.concatenate([first_key_BT.astype(jnp.int32), own_key_BT.astype(jnp.int32)], axis=1)
    q_BTHK, k_BSGK, v_BSGJ = _pad(q_BTHK, more_T), _pad(k_BSGK, more_S), _pad(v_BSGJ, more_S)
    settings = _Settings(scale, tiles, interpret)
    return _attend(settings, q_BTHK, k_BSGK, v_BSGJ, first_key_BT, start_B.astype(jnp.int32))[:, :T]


def why_not(key_dim: int, value_dim: int) -> str:
    """Why the kernel cannot take these head dims; empty where it can."""
    for dim in (key_dim, value_dim):
        if dim % SMALLEST_TILE or not 0 < dim <= 256:
            return f"head dim {dim} is not a multiple of {SMALLEST_TILE} up to 256"
    return ""


def fit(tiles: Tiles, queries: int, keys: int) -> Tiles:
    """Tiles no longer than the rows need."""

    def fitted(tile: Tile) -> Tile:
        return dataclasses.replace(
            tile, queries=min(tile.queries, _power_of_two(queries)), keys=min(tile.keys, _power_of_two(keys))
        )

    return Tiles(*map(fitted, tiles.each()))


def _power_of_two(length: int) -> int:
    return max(SMALLEST_TILE, 1 << (length - 1).bit_length())


def _pad(x_BTHK: jax.Array, more: int) -> jax.Array:
    return jnp.pad(x_BTHK, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x_BTHK


@dataclasses.dataclass(frozen=True)
class _Settings:
    scale: float
    tiles: Tiles
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _Settings, q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, start: jax.Array
) -> jax.Array:
    return _attend_forward(settings, q, k, v, first_key, start)[0]


def _attend_forward(
    settings: _Settings,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGJ: jax.Array,
    first_key_BT: jax.Array,
    start_B: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Output, and what the backward pass reads; named here, inside the rule, or a policy could not save them."""
    B, T, H, K = q_BTHK.shape
    S, G, J = v_BSGJ.shape[1:]
    tile, R = settings.tiles.forward, H // G
    bounds_BQ4 = intervals.key_tiles(first_key_BT, start_B, S, tile.queries, tile.keys)
    last = T // tile.queries - 1

    def rows(width: int) -> pl.BlockSpec:  # the longest tiles first: causal rows grow, and the last to start end last
        return pl.BlockSpec((None, tile.queries, None, width), lambda i, h, b: (b, last - i, h, 0))

    out_BTHJ, lse_BHT = pl.pallas_call(
        functools.partial(flash_programs.forward_kernel, tile=tile, scale=settings.scale, last=last),
        grid=(last + 1, H, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, h, b: (b, last - i, 0)),
            pl.BlockSpec((None,), lambda i, h, b: (b,)),
            pl.BlockSpec((None, tile.queries), lambda i, h, b: (b, last - i)),
            rows(K),
            pl.BlockSpec((None, S, None, K), lambda i, h, b: (b, 0, h // R, 0)),
            pl.BlockSpec((None, S, None, J), lambda i, h, b: (b, 0, h // R, 0)),
        ],
        out_specs=[rows(J), pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, last - i))],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, H, J), q_BTHK.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ],
        name="flash_forward",
        **_how(tile, settings),
    )(bounds_BQ4, start_B, first_key_BT, q_BTHK, k_BSGK, v_BSGJ)
    out_BTHJ, lse_BHT = checkpoint_name(out_BTHJ, OUTPUT_NAME), checkpoint_name(lse_BHT, LSE_NAME)
    return out_BTHJ, (q_BTHK, k_BSGK, v_BSGJ, first_key_BT, start_B, out_BTHJ, lse_BHT)


def _attend_backward(
    settings: _Settings, residuals: tuple[jax.Array, ...], out_gradient_BTHJ: jax.Array
) -> tuple[Any, ...]:
    q_BTHK, k_BSGK, v_BSGJ, first_key_BT, start_B, out_BTHJ, lse_BHT = residuals
    B, T, H, K = q_BTHK.shape
    S, G, J = v_BSGJ.shape[1:]
    R = H // G
    delta_BHT = jnp.einsum("bthj,bthj->bht", out_gradient_BTHJ, out_BTHJ, preferred_element_type=jnp.float32)
    tile = settings.tiles.q_gradient
    last = T // tile.queries - 1

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tile.queries, None, width), lambda i, h, b: (b, last - i, h, 0))

    statistic = pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, last - i))
    q_gradient_BTHK = pl.pallas_call(
        functools.partial(flash_programs.q_gradient_kernel, tile=tile, scale=settings.scale, last=last),
        grid=(last + 1, H, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, h, b: (b, last - i, 0)),
            pl.BlockSpec((None,), lambda i, h, b: (b,)),
            pl.BlockSpec((None, tile.queries), lambda i, h, b: (b, last - i)),
            rows(K),
            pl.BlockSpec((None, S, None, K), lambda i, h, b: (b, 0, h // R, 0)),
            pl.BlockSpec((None, S, None, J), lambda i, h, b: (b, 0, h // R, 0)),
            rows(J),
            statistic,
            statistic,
        ],
        out_specs=rows(K),
        out_shape=jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype),
        name="flash_q_gradient",
        **_how(tile, settings),
    )(
        intervals.key_tiles(first_key_BT, start_B, S, tile.queries, tile.keys),
        start_B, first_key_BT, q_BTHK, k_BSGK, v_BSGJ, out_gradient_BTHJ, lse_BHT, delta_BHT,
    )  # fmt: skip

    tile = settings.tiles.kv_gradient
    group = pl.BlockSpec((None, R, T), lambda i, g, b: (b, g, 0))

    def keys(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tile.keys, None, width), lambda i, g, b: (b, i, g, 0))

    k_gradient_BSGK, v_gradient_BSGJ = pl.pallas_call(
        functools.partial(flash_programs.kv_gradient_kernel, tile=tile, scale=settings.scale, heads=R),
        grid=(S // tile.keys, G, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, g, b: (b, i, 0)),
            pl.BlockSpec((None,), lambda i, g, b: (b,)),
            pl.BlockSpec((None, T), lambda i, g, b: (b, 0)),
            pl.BlockSpec((None, T, R, K), lambda i, g, b: (b, 0, g, 0)),
            keys(K),
            keys(J),
            pl.BlockSpec((None, T, R, J), lambda i, g, b: (b, 0, g, 0)),
            group,
            group,
        ],
        out_specs=[keys(K), keys(J)],
        out_shape=[jax.ShapeDtypeStruct(k_BSGK.shape, k_BSGK.dtype), jax.ShapeDtypeStruct(v_BSGJ.shape, v_BSGJ.dtype)],
        name="flash_kv_gradient",
        **_how(tile, settings),
    )(
        intervals.query_tiles(first_key_BT, start_B, S, tile.queries, tile.keys),
        start_B, first_key_BT, q_BTHK, k_BSGK, v_BSGJ, out_gradient_BTHJ, lse_BHT, delta_BHT,
    )  # fmt: skip
    return q_gradient_BTHK, k_gradient_BSGK, v_gradient_BSGJ, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _how(tile: Tile, settings: _Settings) -> dict[str, Any]:
    """Triton's parameters, always: without them versions of JAX disagree on which compiler to use."""
    return dict(
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=settings.interpret,
    )
