"""The flash kernels as Mosaic GPU compiles them, for Hopper: which blocks there are, and what each allocates.

Nothing here has run on a card yet; `docs/kernels.md` says what is proved without one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nanollama.kernels import intervals, mosaic_programs
from nanollama.kernels.flash_programs import Settings
from nanollama.kernels.mosaic_parts import Block, Ring, plgpu, shared


def forward(
    settings: Settings, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, first_key_BT: jax.Array,
    start_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output [B, T, H, J] and logsumexp [B, H, T], base 2. Lengths are whole tiles."""
    B, T, H, K = q_BTHK.shape
    S, G, J = v_BSGJ.shape[1:]
    tile, dtype = settings.tiles.forward, q_BTHK.dtype
    block = Block(tile, settings.scale, H // G, T // tile.queries - 1, settings.interpret)
    consumers, rows = block.consumers, tile.queries // block.consumers
    return _launch(
        mosaic_programs.forward,
        block,
        [jax.ShapeDtypeStruct((B, T, H, J), dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        [
            shared((consumers, rows, K), dtype),
            shared((consumers, rows), jnp.int32),
            shared((consumers, rows, J), dtype),
            shared((consumers, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=consumers),
            plgpu.Barrier(num_arrivals=consumers),
            Ring.scratch(block, ((tile.keys, K), dtype)),
            Ring.scratch(block, ((tile.keys, J), dtype)),
        ],
        (block.last + 1, B, H),
        "flash_forward",
    )(
        intervals.key_tiles(first_key_BT, start_B, S, rows, tile.keys),
        start_B, first_key_BT, q_BTHK, k_BSGK, v_BSGJ,
    )  # fmt: skip


def q_gradient(
    settings: Settings, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, first_key_BT: jax.Array,
    start_B: jax.Array, out_gradient_BTHJ: jax.Array, lse_BHT: jax.Array, delta_BHT: jax.Array,
) -> jax.Array:  # fmt: skip
    """[B, T, H, K]; delta is the sum over J of the output times its gradient."""
    B, T, H, K = q_BTHK.shape
    S, G, J = v_BSGJ.shape[1:]
    tile, dtype = settings.tiles.q_gradient, q_BTHK.dtype
    block = Block(tile, settings.scale, H // G, T // tile.queries - 1, settings.interpret)
    consumers, rows = block.consumers, tile.queries // block.consumers
    return _launch(
        mosaic_programs.q_gradient,
        block,
        jax.ShapeDtypeStruct(q_BTHK.shape, dtype),
        [
            shared((consumers, rows, K), dtype),
            shared((consumers, rows, J), dtype),
            shared((consumers, rows), jnp.int32),
            shared((consumers, rows), jnp.float32),
            shared((consumers, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=5, num_barriers=consumers),
            Ring.scratch(block, ((tile.keys, K), dtype)),
            Ring.scratch(block, ((tile.keys, J), dtype)),
        ],
        (block.last + 1, B, H),
        "flash_q_gradient",
    )(
        intervals.key_tiles(first_key_BT, start_B, S, rows, tile.keys),
        start_B, first_key_BT, q_BTHK, k_BSGK, v_BSGJ, out_gradient_BTHJ, lse_BHT, delta_BHT,
    )  # fmt: skip


def kv_gradient(
    settings: Settings, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, first_key_BT: jax.Array,
    start_B: jax.Array, out_gradient_BTHJ: jax.Array, lse_BHT: jax.Array, delta_BHT: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """[B, S, G, K] and [B, S, G, J]."""
    B, _, H, K = q_BTHK.shape
    S, G, J = v_BSGJ.shape[1:]
    tile, dtype = settings.tiles.kv_gradient, q_BTHK.dtype
    block = Block(tile, settings.scale, H // G, S // tile.keys - 1, settings.interpret)
    consumers, rows = block.consumers, tile.keys // block.consumers
    vectors = [((tile.queries,), kind) for kind in (jnp.int32, jnp.float32, jnp.float32)]
    return _launch(
        mosaic_programs.kv_gradient,
        block,
        [jax.ShapeDtypeStruct(k_BSGK.shape, dtype), jax.ShapeDtypeStruct(v_BSGJ.shape, dtype)],
        [
            shared((consumers, rows, K), dtype),
            shared((consumers, rows, J), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=consumers),
            Ring.scratch(block, ((tile.queries, K), dtype), ((tile.queries, J), dtype), *vectors),
        ],
        (block.last + 1, B, G),
        "flash_kv_gradient",
    )(
        intervals.query_tiles(first_key_BT, start_B, S, tile.queries, rows),
        start_B, first_key_BT, q_BTHK, k_BSGK, v_BSGJ, out_gradient_BTHJ, lse_BHT, delta_BHT,
    )  # fmt: skip


def _launch(
    program: Callable[..., None], block: Block, out: Any, scratch: list[Any], grid: tuple[int, int, int], name: str
) -> Callable[..., Any]:
    """The last axis of a grid varies fastest: heads that share keys and values follow one another."""
    return plgpu.kernel(
        functools.partial(program, block=block),
        out_type=out,
        scratch_types=scratch,
        grid=grid,
        grid_names=("tile", "batch", "head"),
        num_threads=block.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if block.interpret else None,
        kernel_name=name,
    )
