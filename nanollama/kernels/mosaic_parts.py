"""What the programs of `mosaic_programs` are made of: rings of shared memory, roles of warpgroups, products, masks.

Every product goes through `products` and `accumulate`, because JAX's interpreter of Mosaic GPU cannot continue an
accumulator. Lower case letters are a tile's: q queries, k keys.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from nanollama.kernels.flash_programs import Tile
from nanollama.kernels.intervals import HIGH, LOW, WHOLE_HIGH, WHOLE_LOW

plgpu: Any = mosaic_gpu  # untyped: the older JAX that types are checked with has another interface
_REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}  # a thread of a consumer, of the producer: 512 in all
SCORES = plgpu.Layout.WGMMA  # how a product's result lies in registers
OF_ROWS, OF_COLUMNS = SCORES.reduce(1), SCORES.reduce(0)


@dataclasses.dataclass(frozen=True)
class Block:
    """What the programs of a launch share. The tile is a block's; its sides are what all consumers hold together."""

    tile: Tile
    scale: float
    heads_per_kv_head: int
    last: int  # number of the last block of a row: the grid counts down, so that the longest rows of tiles start first
    interpret: bool

    @property
    def consumers(self) -> int:
        """Four warps are a warpgroup, and one of them is the producer."""
        return self.tile.warps // 4 - 1


class Ring:
    """Slots of shared memory that go round: TMA fills one (`full`), all consumers release it (`free`)."""

    def __init__(self, allocated: Any, block: Block) -> None:
        """`allocated`: what `scratch` asked for."""
        self.buffers, self.full, self.free = allocated
        self.block, self.slots = block, block.tile.stages

    @staticmethod
    def scratch(block: Block, *buffers: tuple[tuple[int, ...], Any]) -> Any:
        """What to allocate for a ring whose slots hold arrays of these shapes and dtypes."""
        slots = block.tile.stages
        return (
            tuple(shared((slots, *shape), dtype) for shape, dtype in buffers),
            plgpu.Barrier(num_arrivals=len(buffers), num_barriers=slots),
            plgpu.Barrier(num_arrivals=block.consumers, num_barriers=slots),
        )

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.slots))

    def fill(self, step: jax.Array, *sources: Any) -> None:
        """The producer's side: start to copy what consumers read at `step`, once its slot is free."""
        slot = self.slot(step)
        pl.when(step >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def drain(self, steps: jax.Array) -> None:
        """The producer's last act, after `steps`: a thread that waits for a barrier sees all of its completions."""
        each(jnp.maximum(steps - self.slots, 0), steps, lambda step: plgpu.barrier_wait(self.free.at[self.slot(step)]))

    def read(self, step: jax.Array) -> tuple[Any, ...]:
        """A consumer's side: the buffers of `step`, when they are full. Each step is read and released once."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return tuple(buffer.at[slot] for buffer in self.buffers)

    def release(self, step: jax.Array) -> None:
        """What was read is in registers or in a finished product."""
        if self.block.interpret:  # there products are reads like others, which only a fence puts before TMA's writes;
            plgpu.commit_smem()  # on the device a read that is over cannot be overtaken by a write
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory; matrices lie in it as TMA writes and wgmma reads them, in swizzled rows of 128 bytes."""
    if len(shape) < 3:
        return plgpu.SMEM(shape, dtype)
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


def roles(consume: Callable[[jax.Array], None], produce: Callable[[], None], block: Block) -> None:
    """The last warpgroup gives registers to the others and produces."""
    warpgroup = lax.axis_index("warpgroup")
    many, few = _REGISTERS[block.consumers]

    @pl.when(warpgroup < block.consumers)
    def _() -> None:
        plgpu.set_max_registers(many, action="increase")
        consume(warpgroup)

    @pl.when(warpgroup == block.consumers)
    def _() -> None:
        plgpu.set_max_registers(few, action="decrease")
        produce()


def bounds(bounds_gmem: Any, b: jax.Array, number: jax.Array, mine: jax.Array | int, block: Block) -> list[jax.Array]:
    """Of the rows of one consumer: see `intervals`."""
    return [bounds_gmem[b, number * block.consumers + mine, column] for column in range(4)]


def shared_bounds(bounds_gmem: Any, b: jax.Array, number: jax.Array, block: Block) -> tuple[jax.Array, jax.Array]:
    """[low, high) of the tiles that hold something for any consumer."""
    consumers = [bounds(bounds_gmem, b, number, mine, block) for mine in range(block.consumers)]
    lows, highs = [one[LOW] for one in consumers], [one[HIGH] for one in consumers]
    return functools.reduce(jnp.minimum, lows), functools.reduce(jnp.maximum, highs)


def over_tiles(
    own: Sequence[jax.Array], low: jax.Array, high: jax.Array, visit: Callable[..., Any],
    skip: Callable[[jax.Array], None], carry: Any,
) -> Any:  # fmt: skip
    """Visit the consumer's tiles, comparing at both ends only, and skip those before and after that others need."""
    each(low, own[LOW], skip)
    carry = lax.fori_loop(own[LOW], own[WHOLE_LOW], functools.partial(visit, masked=True), carry)
    carry = lax.fori_loop(own[WHOLE_LOW], own[WHOLE_HIGH], functools.partial(visit, masked=False), carry)
    carry = lax.fori_loop(own[WHOLE_HIGH], own[HIGH], functools.partial(visit, masked=True), carry)
    each(own[HIGH], high, skip)
    return carry


def each(low: jax.Array | int, high: jax.Array | int, do: Callable[[jax.Array], None]) -> None:
    lax.fori_loop(low, high, lambda tile, _: do(tile), None)


def products(
    pairs: Sequence[tuple[Any, Any]],
    use: Callable[..., tuple[jax.Array, ...]],
    issued: Callable[[], None] = lambda: None,
) -> tuple[jax.Array, ...]:
    """`use` of a function for each pair of matrices in shared memory that waits for left right^T and returns it.

    All products are on their way before the first is waited for; `issued` is called between.
    """

    def scope(*accumulators: Any) -> tuple[jax.Array, ...]:
        for accumulator, (left, right) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
        issued()
        return use(
            *(
                functools.partial(plgpu.wgmma_accumulator_load, accumulator, wait_n=len(pairs) - 1 - i)
                for i, accumulator in enumerate(accumulators)
            )
        )

    shapes = [(left.shape[0], right.shape[0]) for left, right in pairs]
    return pl.run_scoped(scope, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def accumulate(
    totals: Sequence[jax.Array], factors: Sequence[Callable[[], tuple[jax.Array, Any]]], block: Block
) -> list[jax.Array]:
    """Each total + left right; `factors` give left (in registers) and right (in shared memory), one after the other."""
    if block.interpret:
        sides = [factor() for factor in factors]
        return [
            total + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
            for total, (left, right) in zip(totals, sides, strict=True)
        ]

    def state(accumulators: Sequence[Any]) -> None:
        for accumulator, factor in zip(accumulators, factors, strict=True):
            plgpu.wgmma(accumulator, *factor())

    return pl.run_state(state)([plgpu.ACC.init(total) for total in totals])


def seen(first_key_q: jax.Array, key: Any, query: Any, shape: tuple[int, int], key_axis: int) -> jax.Array:
    """Which pairs of a tile the mask lets through; `key` and `query` are the tile's first."""
    keys = plgpu.broadcasted_iota(jnp.int32, shape, key_axis, layout=SCORES) + key
    queries = plgpu.broadcasted_iota(jnp.int32, shape, 1 - key_axis, layout=SCORES) + query
    return (keys >= spread(first_key_q, shape, 1 - key_axis)) & (keys <= queries)


def spread(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along `axis` of a matrix."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def filled(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
