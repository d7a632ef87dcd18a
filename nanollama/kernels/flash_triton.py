"""The flash kernels as Triton compiles them, for any GPU: which program instances there are, and which blocks they see.

Same functions as `flash_mosaic`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanollama.kernels import flash_programs, intervals
from nanollama.kernels.flash_programs import Settings, Tile


def forward(
    settings: Settings, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, first_key_BT: jax.Array,
    start_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output [B, T, H, J] and logsumexp [B, H, T], base 2. Lengths are whole tiles."""
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
    return out_BTHJ, lse_BHT


def q_gradient(
    settings: Settings, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, first_key_BT: jax.Array,
    start_B: jax.Array, out_gradient_BTHJ: jax.Array, lse_BHT: jax.Array, delta_BHT: jax.Array,
) -> jax.Array:  # fmt: skip
    """[B, T, H, K]; delta is the sum over J of the output times its gradient."""
    B, T, H, K = q_BTHK.shape
    S, G, J = v_BSGJ.shape[1:]
    R = H // G
    tile = settings.tiles.q_gradient
    last = T // tile.queries - 1

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tile.queries, None, width), lambda i, h, b: (b, last - i, h, 0))

    statistic = pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, last - i))
    gradient_BTHK: jax.Array = pl.pallas_call(
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
    return gradient_BTHK


def kv_gradient(
    settings: Settings, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, first_key_BT: jax.Array,
    start_B: jax.Array, out_gradient_BTHJ: jax.Array, lse_BHT: jax.Array, delta_BHT: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """[B, S, G, K] and [B, S, G, J]."""
    B, T, H, K = q_BTHK.shape
    S, G, J = v_BSGJ.shape[1:]
    R = H // G
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
    return k_gradient_BSGK, v_gradient_BSGJ


def _how(tile: Tile, settings: Settings) -> dict[str, Any]:
    """Triton's parameters, always: without them versions of JAX disagree on which compiler to use."""
    return dict(
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=settings.interpret,
    )
