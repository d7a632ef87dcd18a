"""Flash attention on GPU with interval masks (arXiv:2205.14135): forward, dQ and dK/dV.

All three visit only the tiles that the intervals allow (`intervals`), so a packed row costs the sum of its documents'
squares, forward and backward. KV heads are never repeated: dK and dV of a KV head are summed over its queries' heads
inside one program. Statistics are base 2; output and logsumexp carry names for remat policies.

Two sets of programs compute the same: Triton's (`flash_triton`), for any GPU, and Mosaic GPU's (`flash_mosaic`), for
Hopper. Letters as in `nanollama.models.decoder`; J is the values' head dim, R = H / G query heads share a KV head.
Knows nothing of meshes or models.
"""

import dataclasses
import functools
import importlib
import math
import re
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanollama.kernels.flash_programs import SMALLEST_TILE, Settings, Tile, Tiles

DEFAULT_TILES = Tiles()
OUTPUT_NAME, LSE_NAME = "attention_output", "attention_lse"  # what remat = "names" saves
MOSAIC_JAX = (0, 11)  # its interface changes with every release
MOSAIC_DIMS, MOSAIC_ROWS = (64, 128), 64


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
    compiler: str = "triton",
) -> jax.Array:
    """Softmax attention [B, T, H, J] in q's dtype: query t of row b sees keys [first_key[b, t], start[b] + t].

    Any lengths: rows are padded to whole tiles. compiler: "triton" or "mosaic". `interpret` runs the same kernels on
    any device, Triton's as XLA operations, Mosaic's in JAX's simulation of a GPU, which is slow.
    Errors: ValueError when `why_not` or `why_not_mosaic` has a reason, or a tile is not one of the compiler's.
    """
    dims = q_BTHK.shape[3], v_BSGJ.shape[3]
    reason = why_not(*dims) if compiler == "triton" else why_not_mosaic(*dims)
    if reason:
        raise ValueError(f"flash_attention: {reason}")
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if compiler == "triton":
        tiles = fit(tiles, T, S)
    else:
        check_mosaic(tiles)
    more_T = -T % math.lcm(*(tile.queries for tile in tiles.each()))
    more_S = -S % math.lcm(*(tile.keys for tile in tiles.each()))
    own_key_BT = start_B[:, None] + jnp.arange(T, T + more_T, dtype=jnp.int32)  # added queries see themselves
    first_key_BT = jnp.concatenate([first_key_BT.astype(jnp.int32), own_key_BT.astype(jnp.int32)], axis=1)
    q_BTHK, k_BSGK, v_BSGJ = _pad(q_BTHK, more_T), _pad(k_BSGK, more_S), _pad(v_BSGJ, more_S)
    settings = Settings(scale, tiles, interpret, compiler)
    return _attend(settings, q_BTHK, k_BSGK, v_BSGJ, first_key_BT, start_B.astype(jnp.int32))[:, :T]


def why_not(key_dim: int, value_dim: int) -> str:
    """Why Triton's programs cannot take these head dims; empty where they can.

    A head dim is a sum of powers of two from 16 up (80 = 64 + 16), which Triton can tile.
    """
    for dim in (key_dim, value_dim):
        if dim % SMALLEST_TILE or not 0 < dim <= 256:
            return f"head dim {dim} is not a multiple of {SMALLEST_TILE} up to 256"
    return ""


def why_not_mosaic(key_dim: int, value_dim: int, dtype: Any = None, kind: str = "") -> str:
    """Why Mosaic GPU's programs cannot take these head dims, this dtype and kind of device, or this version of JAX."""
    if jax.__version_info__ < MOSAIC_JAX:
        needed = ".".join(map(str, MOSAIC_JAX))
        return f"it is written for Mosaic GPU as JAX {needed} has it, and this is JAX {jax.__version__}"
    if kind and not re.search(r"\bG?H\d+", kind):
        return f"it is for Hopper (H100, H200, GH200), and this program is for {kind}"
    for dim in (key_dim, value_dim):
        if dim not in MOSAIC_DIMS:
            return f"head dim {dim} is neither of {MOSAIC_DIMS}"
    if dtype is not None and jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {jnp.dtype(dtype)}"
    return ""


def check_mosaic(tiles: Tiles) -> None:
    """Errors: ValueError where warpgroups cannot share a tile's rows: dK and dV's are keys, the others' queries."""
    shared_rows = (tiles.forward.queries, tiles.q_gradient.queries, tiles.kv_gradient.keys)
    for tile, rows in zip(tiles.each(), shared_rows, strict=True):
        sides = (rows / max(tile.warps // 4 - 1, 1), tile.queries, tile.keys)
        if tile.warps not in (8, 12, 16) or any(side % MOSAIC_ROWS for side in sides):
            raise ValueError(
                f"flash_attention: {tile} is no tile of Mosaic GPU: it takes 8, 12 or 16 warps, of which all but four "
                f"share its rows in parts of whole {MOSAIC_ROWS}, and both sides are multiples of {MOSAIC_ROWS}"
            )


def fit(tiles: Tiles, queries: int, keys: int) -> Tiles:
    """Tiles no longer than the rows need; Triton's."""

    def fitted(tile: Tile) -> Tile:
        return dataclasses.replace(
            tile, queries=min(tile.queries, _power_of_two(queries)), keys=min(tile.keys, _power_of_two(keys))
        )

    return Tiles(*map(fitted, tiles.each()))


def _power_of_two(length: int) -> int:
    return max(SMALLEST_TILE, 1 << (length - 1).bit_length())


def _pad(x_BTHK: jax.Array, more: int) -> jax.Array:
    return jnp.pad(x_BTHK, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x_BTHK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, start: jax.Array
) -> jax.Array:
    return _attend_forward(settings, q, k, v, first_key, start)[0]


def _attend_forward(
    settings: Settings,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGJ: jax.Array,
    first_key_BT: jax.Array,
    start_B: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Output, and what the backward pass reads; named here, inside the rule, or a policy could not save them."""
    inputs = (q_BTHK, k_BSGK, v_BSGJ, first_key_BT, start_B)
    out_BTHJ, lse_BHT = _programs(settings).forward(settings, *inputs)
    out_BTHJ, lse_BHT = checkpoint_name(out_BTHJ, OUTPUT_NAME), checkpoint_name(lse_BHT, LSE_NAME)
    return out_BTHJ, (*inputs, out_BTHJ, lse_BHT)


def _attend_backward(
    settings: Settings, residuals: tuple[jax.Array, ...], out_gradient_BTHJ: jax.Array
) -> tuple[Any, ...]:
    *inputs, out_BTHJ, lse_BHT = residuals
    delta_BHT = jnp.einsum("bthj,bthj->bht", out_gradient_BTHJ, out_BTHJ, preferred_element_type=jnp.float32)
    programs, more = _programs(settings), (out_gradient_BTHJ, lse_BHT, delta_BHT)
    q_gradient_BTHK = programs.q_gradient(settings, *inputs, *more)
    k_gradient_BSGK, v_gradient_BSGJ = programs.kv_gradient(settings, *inputs, *more)
    return q_gradient_BTHK, k_gradient_BSGK, v_gradient_BSGJ, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _programs(settings: Settings) -> ModuleType:
    """Mosaic GPU's module only when it is asked for: versions of JAX without its interface cannot import it."""
    return importlib.import_module(f"nanollama.kernels.flash_{settings.compiler}")
