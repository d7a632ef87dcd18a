"""What one block of each flash kernel computes on Hopper, in Mosaic GPU's terms; `flash_mosaic` launches them.

A block has a producer warpgroup, which feeds rings of shared memory by TMA, and consumers, which share what is there:
each owns an equal part of the block's rows. All consumers go through the same tiles, so that the rings stay in step;
of one that holds nothing for its rows a consumer only says that it is done with it.

Refs named *_gmem are whole arrays. Lower case letters are a tile's: q queries, k keys.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from nanollama.kernels.mosaic_parts import (
    OF_COLUMNS,
    OF_ROWS,
    SCORES,
    Block,
    Ring,
    accumulate,
    bounds,
    each,
    filled,
    over_tiles,
    plgpu,
    products,
    roles,
    seen,
    shared_bounds,
    spread,
)

_LOG2_E = math.log2(math.e)
_MASKED = -1e30  # finite, so that exp2(masked - max) is 0 and never NaN


def forward(
    bounds_gmem: Any, start_gmem: Any, first_key_gmem: Any, q_gmem: Any, k_gmem: Any, v_gmem: Any, out_gmem: Any,
    lse_gmem: Any, q_smem: Any, first_key_smem: Any, out_smem: Any, lse_smem: Any, loaded: Any, turn: Any,
    k_ring: Any, v_ring: Any, *, block: Block,
) -> None:  # fmt: skip
    """One tile of queries of one head. Online softmax: out, the running maximum and sum, all base 2.

    Of two consumers one exponentiates while the other multiplies: they meet (`turn`) after the first product of a tile
    and before the second (FlashAttention-3, arXiv:2407.08608, section 3.1).
    """
    rows, columns, factor = block.tile.queries // block.consumers, block.tile.keys, block.scale * _LOG2_E
    number, b, h = block.last - lax.axis_index("tile"), lax.axis_index("batch"), lax.axis_index("head")
    k_ring, v_ring = Ring(k_ring, block), Ring(v_ring, block)
    low, high = shared_bounds(bounds_gmem, b, number, block)

    def consume(mine: jax.Array) -> None:
        first_row = number * block.tile.queries + mine * rows
        own = pl.ds(first_row, rows)
        plgpu.copy_gmem_to_smem(q_gmem.at[b, own, h], q_smem.at[mine], loaded.at[mine])
        plgpu.copy_gmem_to_smem(first_key_gmem.at[b, own], first_key_smem.at[mine], loaded.at[mine])
        plgpu.barrier_wait(loaded.at[mine])
        query = start_gmem[b] + first_row

        def meet() -> None:
            if block.consumers == 2:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def visit(tile: jax.Array, carry: Any, masked: bool) -> Any:
            out, highest_q, sum_q = carry
            (k_smem,) = k_ring.read(tile - low)
            (scores_qk,) = products([(q_smem.at[mine], k_smem)], lambda scores: (scores(),), issued=meet)
            k_ring.release(tile - low)
            if masked:  # after scaling: a fused multiply-subtract of a huge number and its own maximum is not 0
                first_key_q = plgpu.load(first_key_smem.at[mine], layout=OF_ROWS)
                seen_qk = seen(first_key_q, tile * columns, query, (rows, columns), key_axis=1)
                scores_qk = jnp.where(seen_qk, scores_qk * factor, _MASKED)
                now_q = jnp.maximum(highest_q, scores_qk.max(axis=1))
                weights_qk = jnp.exp2(scores_qk - spread(now_q, scores_qk.shape, 0))
            else:
                now_q = jnp.maximum(highest_q, scores_qk.max(axis=1) * factor)
                weights_qk = jnp.exp2(scores_qk * factor - spread(now_q, scores_qk.shape, 0))
            shrink_q = jnp.exp2(highest_q - now_q)
            out = out * spread(shrink_q, out.shape, 0)
            sum_q = sum_q * shrink_q + weights_qk.sum(axis=1)
            low_qk = weights_qk.astype(v_gmem.dtype)
            out, now_q, sum_q, low_qk = lax.optimization_barrier((out, now_q, sum_q, low_qk))  # before it waits
            (v_smem,) = v_ring.read(tile - low)
            meet()
            (out,) = accumulate([out], [lambda: (low_qk, v_smem)], block)
            v_ring.release(tile - low)
            return out, now_q, sum_q

        def skip(tile: jax.Array) -> None:
            k_ring.read(tile - low)
            meet()
            k_ring.release(tile - low)
            v_ring.read(tile - low)
            meet()
            v_ring.release(tile - low)

        initial = (
            filled((rows, out_gmem.shape[-1]), 0.0, SCORES), filled((rows,), _MASKED, OF_ROWS),
            filled((rows,), 0.0, OF_ROWS),
        )  # fmt: skip
        pl.when(mine == 1)(meet)  # half a tile behind
        own_bounds = bounds(bounds_gmem, b, number, mine, block)
        out, highest_q, sum_q = over_tiles(own_bounds, low, high, visit, skip, initial)
        pl.when(mine == 0)(meet)
        sum_q = jnp.where(sum_q == 0, 1.0, sum_q)  # only of queries that were added to fill a tile
        out_smem[mine] = (out / spread(sum_q, out.shape, 0)).astype(out_gmem.dtype)
        lse_smem[mine] = highest_q + jnp.log(sum_q) * _LOG2_E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[mine], out_gmem.at[b, own, h])
        plgpu.copy_smem_to_gmem(lse_smem.at[mine], lse_gmem.at[b, h, own])
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        g = lax.div(h, jnp.int32(block.heads_per_kv_head))
        _feed([(k_ring, k_gmem), (v_ring, v_gmem)], b, g, low, high, columns)

    roles(consume, produce, block)


def _feed(
    rings: list[tuple[Ring, Any]], b: jax.Array, g: jax.Array, low: jax.Array, high: jax.Array, columns: int
) -> None:
    """What a producer of keys and values does: a KV head's tiles low .. high - 1, into the ring of each."""

    def fetch(tile: jax.Array) -> None:
        for ring, gmem in rings:
            ring.fill(tile - low, gmem.at[b, pl.ds(tile * columns, columns), g])

    each(low, high, fetch)
    for ring, _ in rings:
        ring.drain(high - low)


def q_gradient(
    bounds_gmem: Any, start_gmem: Any, first_key_gmem: Any, q_gmem: Any, k_gmem: Any, v_gmem: Any,
    out_gradient_gmem: Any, lse_gmem: Any, delta_gmem: Any, q_gradient_gmem: Any, q_smem: Any, out_gradient_smem: Any,
    first_key_smem: Any, lse_smem: Any, delta_smem: Any, loaded: Any, k_ring: Any, v_ring: Any, *, block: Block,
) -> None:  # fmt: skip
    """One tile of queries of one head: dS = P (dO V^T - delta), dQ = scale dS K."""
    rows, columns, factor = block.tile.queries // block.consumers, block.tile.keys, block.scale * _LOG2_E
    number, b, h = block.last - lax.axis_index("tile"), lax.axis_index("batch"), lax.axis_index("head")
    k_ring, v_ring = Ring(k_ring, block), Ring(v_ring, block)
    low, high = shared_bounds(bounds_gmem, b, number, block)

    def consume(mine: jax.Array) -> None:
        first_row = number * block.tile.queries + mine * rows
        own = pl.ds(first_row, rows)
        for source, buffer in (
            (q_gmem.at[b, own, h], q_smem), (out_gradient_gmem.at[b, own, h], out_gradient_smem),
            (first_key_gmem.at[b, own], first_key_smem), (lse_gmem.at[b, h, own], lse_smem),
            (delta_gmem.at[b, h, own], delta_smem),
        ):  # fmt: skip
            plgpu.copy_gmem_to_smem(source, buffer.at[mine], loaded.at[mine])
        plgpu.barrier_wait(loaded.at[mine])
        query = start_gmem[b] + first_row
        lse_q = plgpu.load(lse_smem.at[mine], layout=OF_ROWS)
        delta_q = plgpu.load(delta_smem.at[mine], layout=OF_ROWS)

        def visit(tile: jax.Array, gradient: jax.Array, masked: bool) -> jax.Array:
            (k_smem,), (v_smem,) = k_ring.read(tile - low), v_ring.read(tile - low)

            def scores_gradient(scores: Callable[[], jax.Array], dot: Callable[[], jax.Array]) -> tuple[jax.Array]:
                scores_qk = scores()
                weights_qk = jnp.exp2(scores_qk * factor - spread(lse_q, scores_qk.shape, 0))
                if masked:
                    first_key_q = plgpu.load(first_key_smem.at[mine], layout=OF_ROWS)
                    seen_qk = seen(first_key_q, tile * columns, query, (rows, columns), key_axis=1)
                    weights_qk = jnp.where(seen_qk, weights_qk, 0.0)
                return (weights_qk * (dot() - spread(delta_q, scores_qk.shape, 0)),)

            pairs = [(q_smem.at[mine], k_smem), (out_gradient_smem.at[mine], v_smem)]
            (scores_gradient_qk,) = products(pairs, scores_gradient)
            v_ring.release(tile - low)
            low_qk = scores_gradient_qk.astype(k_gmem.dtype)
            (gradient,) = accumulate([gradient], [lambda: (low_qk, k_smem)], block)
            k_ring.release(tile - low)
            return gradient

        def skip(tile: jax.Array) -> None:
            for ring in (k_ring, v_ring):
                ring.read(tile - low)
                ring.release(tile - low)

        initial = filled((rows, q_gmem.shape[-1]), 0.0, SCORES)
        gradient = over_tiles(bounds(bounds_gmem, b, number, mine, block), low, high, visit, skip, initial)
        q_smem[mine] = (gradient * block.scale).astype(q_gradient_gmem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[mine], q_gradient_gmem.at[b, own, h])
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        g = lax.div(h, jnp.int32(block.heads_per_kv_head))
        _feed([(k_ring, k_gmem), (v_ring, v_gmem)], b, g, low, high, columns)

    roles(consume, produce, block)


def kv_gradient(
    bounds_gmem: Any, start_gmem: Any, first_key_gmem: Any, q_gmem: Any, k_gmem: Any, v_gmem: Any,
    out_gradient_gmem: Any, lse_gmem: Any, delta_gmem: Any, k_gradient_gmem: Any, v_gradient_gmem: Any,
    k_smem: Any, v_smem: Any, loaded: Any, ring: Any, *, block: Block,
) -> None:  # fmt: skip
    """One tile of keys of one KV head, over all its query heads: dV = P^T dO, dK = scale dS^T Q.

    Scores are computed transposed, [k, q], so that no product needs its left side transposed.
    """
    rows, columns, factor = block.tile.keys // block.consumers, block.tile.queries, block.scale * _LOG2_E
    number, b, g = lax.axis_index("tile"), lax.axis_index("batch"), lax.axis_index("head")
    ring = Ring(ring, block)
    low, high = shared_bounds(bounds_gmem, b, number, block)

    def consume(mine: jax.Array) -> None:
        first_row = number * block.tile.keys + mine * rows
        own = pl.ds(first_row, rows)
        plgpu.copy_gmem_to_smem(k_gmem.at[b, own, g], k_smem.at[mine], loaded.at[mine])
        plgpu.copy_gmem_to_smem(v_gmem.at[b, own, g], v_smem.at[mine], loaded.at[mine])
        plgpu.barrier_wait(loaded.at[mine])
        start = start_gmem[b]

        def of_head(head: jax.Array, carry: Any) -> Any:
            def step(tile: jax.Array) -> jax.Array:
                return head * (high - low) + tile - low

            def visit(tile: jax.Array, carry: Any, masked: bool) -> Any:
                q_smem, out_gradient_smem, first_key_smem, lse_smem, delta_smem = ring.read(step(tile))

                def weights(scores: Callable[[], jax.Array], dot: Callable[[], jax.Array]) -> tuple[jax.Array, ...]:
                    scores_kq = scores()  # vectors are read where they are used: a column takes a quarter register
                    lse_q = plgpu.load(lse_smem, layout=OF_COLUMNS)
                    weights_kq = jnp.exp2(scores_kq * factor - spread(lse_q, scores_kq.shape, 1))
                    if masked:
                        first_key_q = plgpu.load(first_key_smem, layout=OF_COLUMNS)
                        seen_kq = seen(first_key_q, first_row, start + tile * columns, (rows, columns), key_axis=0)
                        weights_kq = jnp.where(seen_kq, weights_kq, 0.0)
                    delta_q = plgpu.load(delta_smem, layout=OF_COLUMNS)
                    return weights_kq, weights_kq * (dot() - spread(delta_q, scores_kq.shape, 1))

                pairs = [(k_smem.at[mine], q_smem), (v_smem.at[mine], out_gradient_smem)]
                weights_kq, scores_gradient_kq = products(pairs, weights)
                carry = accumulate(
                    carry,
                    [
                        lambda: (scores_gradient_kq.astype(q_gmem.dtype), q_smem),
                        lambda: (weights_kq.astype(q_gmem.dtype), out_gradient_smem),
                    ],
                    block,
                )
                ring.release(step(tile))
                return carry

            def skip(tile: jax.Array) -> None:
                ring.read(step(tile))
                ring.release(step(tile))

            return over_tiles(bounds(bounds_gmem, b, number, mine, block), low, high, visit, skip, carry)

        initial = [filled((rows, gmem.shape[-1]), 0.0, SCORES) for gmem in (k_gmem, v_gmem)]
        k_gradient, v_gradient = lax.fori_loop(0, block.heads_per_kv_head, of_head, initial)
        k_smem[mine] = (k_gradient * block.scale).astype(k_gradient_gmem.dtype)
        v_smem[mine] = v_gradient.astype(v_gradient_gmem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem.at[mine], k_gradient_gmem.at[b, own, g])
        plgpu.copy_smem_to_gmem(v_smem.at[mine], v_gradient_gmem.at[b, own, g])
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        def of_head(head: jax.Array) -> None:
            h = g * block.heads_per_kv_head + head

            def fetch(tile: jax.Array) -> None:
                queries = pl.ds(tile * columns, columns)
                ring.fill(
                    head * (high - low) + tile - low,
                    q_gmem.at[b, queries, h],
                    out_gradient_gmem.at[b, queries, h],
                    first_key_gmem.at[b, queries],
                    lse_gmem.at[b, h, queries],
                    delta_gmem.at[b, h, queries],
                )

            each(low, high, fetch)

        each(0, block.heads_per_kv_head, of_head)
        ring.drain(block.heads_per_kv_head * (high - low))

    roles(consume, produce, block)
