"""`python -m nanollama.kernels.tune`: measure tiles and backends on this GPU, and keep the best in a table.

    python -m nanollama.kernels.tune --head-dim=64 --heads=32 --kv-heads=4 --lengths=4096,16384

For each length, packed (eight documents a row) and plain: each kernel's tile is chosen with the others fixed, by the
time of forward, then of forward and backward, of Triton's programs and on Hopper of Mosaic GPU's; plain rows are also
timed with cuDNN. Mosaic GPU's may win only if their results on this card are Triton's. Most of it is compilation, which
goes on in several threads. `tuning` says where the table is. Imports only jax and numpy.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nanollama.kernels import tuning
from nanollama.kernels.flash import flash_attention, why_not_mosaic
from nanollama.kernels.flash_programs import Tile, Tiles

DOCUMENTS = 8  # of a packed row

CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "forward": (
        Tile(64, 64, 4, 3),
        Tile(128, 32, 4, 3),
        Tile(128, 64, 4, 3),
        Tile(128, 64, 8, 2),
        Tile(128, 128, 8, 2),
    ),
    "q_gradient": (Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(128, 32, 4, 2), Tile(128, 64, 8, 2)),
    "kv_gradient": (Tile(32, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 128, 4, 2), Tile(64, 128, 8, 2)),
}

# By head dim: of those that compile for an H200 these keep their registers out of memory, or nearly (docs/kernels.md).
MOSAIC_CANDIDATES: dict[int, dict[str, tuple[Tile, ...]]] = {
    64: {
        "forward": (Tile(128, 64, 12, 4), Tile(128, 128, 12, 2), Tile(128, 192, 12, 2), Tile(192, 128, 16, 2)),
        "q_gradient": (Tile(128, 64, 12, 3), Tile(128, 128, 12, 3)),
        "kv_gradient": (Tile(64, 128, 12, 2), Tile(64, 64, 8, 2), Tile(64, 192, 16, 2)),
    },
    128: {
        "forward": (Tile(128, 64, 12, 3), Tile(192, 64, 16, 3)),
        "q_gradient": (Tile(128, 64, 12, 3), Tile(128, 128, 12, 2), Tile(192, 64, 16, 2)),
        "kv_gradient": (Tile(64, 128, 12, 2), Tile(64, 64, 8, 2)),
    },
}
THREADS = 8  # that compile
CLOSE = 0.01  # of the norm: bfloat16 products summed in another order differ by less


@dataclasses.dataclass(frozen=True)
class Problem:
    """One shape to measure."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    plain: bool
    dtype: str = "bfloat16"

    def shape(self) -> tuning.Shape:
        group = self.heads // self.kv_heads
        return tuning.Shape(self.dtype, self.head_dim, self.head_dim, group, self.length, self.plain)

    def arrays(self) -> tuple[jax.Array, ...]:
        """Random q, k, v, first_key, start: GPUs run zeros faster than numbers."""
        generator = np.random.default_rng(0)
        shapes = [
            (self.rows, self.length, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]
        q, k, v = (jnp.asarray(generator.standard_normal(shape, np.float32), self.dtype) for shape in shapes)
        index = np.arange(self.length)
        part = -(-self.length // DOCUMENTS)
        first_key = np.broadcast_to(np.zeros_like(index) if self.plain else index // part * part, q.shape[:2])
        return q, k, v, jnp.asarray(first_key, jnp.int32), jnp.zeros(self.rows, jnp.int32)


def milliseconds(function: Callable[..., Any], arguments: Sequence[jax.Array], repeats: int = 10) -> float:
    """Median time of a jitted call, after one to compile and warm up."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def flash(
    problem: Problem, tiles: Tiles, interpret: bool = False, compiler: str = "triton"
) -> Callable[..., jax.Array]:
    """`f(q, k, v, first_key, start)`."""
    scale = problem.head_dim**-0.5
    return functools.partial(flash_attention, scale=scale, tiles=tiles, interpret=interpret, compiler=compiler)


def vendor(implementation: Literal["cudnn", "xla"]) -> Callable[..., jax.Array]:
    """As `flash`, of `jax.nn.dot_product_attention` ("cudnn", "xla"); plain causal."""

    def function(q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, start: jax.Array) -> jax.Array:
        del first_key, start
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return function


def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Output and gradients to q, k and v, jitted."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, *mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(q, k, v, *mask)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def tune(
    problem: Problem,
    candidates: dict[str, tuple[Tile, ...]] = CANDIDATES,
    mosaic_candidates: dict[int, dict[str, tuple[Tile, ...]]] = MOSAIC_CANDIDATES,
    interpret: bool = False,
    clock: Callable[[Callable[..., Any], Sequence[jax.Array]], float] = milliseconds,
) -> dict[str, Any]:
    """The table's entry for a problem: the fastest tiles of each compiler, and the fastest backend that can."""
    arrays, dim = problem.arrays(), problem.head_dim
    tiles, took = fastest_tiles(problem, candidates, "triton", interpret, clock)
    mosaic_tiles, contenders = tuning.default_tiles(dim, "mosaic"), {"pallas": took["forward_and_backward"]}
    reason = why_not_mosaic(dim, dim, problem.dtype, jax.devices()[0].device_kind)
    if not reason:
        try:
            mosaic_tiles, times = fastest_tiles(problem, mosaic_candidates[dim], "mosaic", interpret, clock)
            took |= {f"mosaic_{what}": time for what, time in times.items()}
            reason = difference(flash(problem, mosaic_tiles, interpret, "mosaic"), flash(problem, tiles), arrays)
        except RuntimeError as error:
            reason = str(error)
        if not reason:
            contenders["mosaic"] = took["mosaic_forward_and_backward"]
    if reason:
        print(f"  mosaic: {reason}", file=sys.stderr)
    if problem.plain and not interpret:
        try:
            contenders["cudnn"] = took["cudnn_forward_and_backward"] = clock(with_gradients(vendor("cudnn")), arrays)
        except Exception as error:
            print(f"  cudnn: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    return {
        "backend": min(contenders, key=contenders.__getitem__),
        "tiles": tuning.tiles_as_dict(tiles),
        "mosaic_tiles": tuning.tiles_as_dict(mosaic_tiles),
        "milliseconds": {key: round(value, 4) for key, value in took.items()},
    }


def fastest_tiles(
    problem: Problem,
    candidates: dict[str, tuple[Tile, ...]],
    compiler: str,
    interpret: bool,
    clock: Callable[[Callable[..., Any], Sequence[jax.Array]], float],
) -> tuple[Tiles, dict[str, float]]:
    """A compiler's best tiles, and their milliseconds. Errors: RuntimeError where no tile of a kernel compiles."""
    arrays, best = problem.arrays(), tuning.default_tiles(problem.head_dim, compiler)
    took: dict[str, float] = {}
    for part, choices in candidates.items():
        times: dict[Tile, float] = {}
        programs = {}
        for tile in dict.fromkeys((getattr(best, part), *choices)):
            function = flash(problem, dataclasses.replace(best, **{part: tile}), interpret, compiler)
            programs[tile] = jax.jit(function) if part == "forward" else with_gradients(function)
        for tile, program in compiled(programs, arrays).items():
            try:
                times[tile] = clock(program.result(), arrays)
            except Exception as error:  # a tile too large for this GPU fails to compile, in a way of its own each time
                print(f"  {compiler} {part} {tile}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        if not times:
            raise RuntimeError(f"{problem}: no tile of {part} compiles on {jax.devices()[0].device_kind}")
        fastest = min(times, key=times.__getitem__)
        best = dataclasses.replace(best, **{part: fastest})
        took["forward" if part == "forward" else "forward_and_backward"] = times[fastest]
    return best, took


def compiled(programs: dict[Tile, Any], arrays: Sequence[jax.Array]) -> dict[Tile, Future[Any]]:
    """The jitted functions compiled for these arguments, several at a time: XLA leaves the interpreter's lock alone."""

    def started(program: Any) -> Future[Any]:
        try:
            lowered = program.lower(*arrays)
        except Exception as error:  # of a tile that a compiler refuses before XLA sees it
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed
        return pool.submit(lowered.compile)

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return {tile: started(program) for tile, program in programs.items()}


def difference(function: Callable[..., jax.Array], twin: Callable[..., jax.Array], arrays: Sequence[jax.Array]) -> str:
    """What of output and gradients differs from the twin's by more than rounding, and by how much; empty if nothing."""
    (_, out), gradients = with_gradients(function)(*arrays)
    (_, wanted), twins = with_gradients(twin)(*arrays)
    for name, a, b in zip(("output", "dq", "dk", "dv"), (out, *gradients), (wanted, *twins), strict=True):
        a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
        distance = float(jnp.linalg.norm(a32 - b32) / jnp.linalg.norm(b32))
        if not distance < CLOSE:  # NaN is not close
            return f"its {name} is {distance:.3g} of the norm from Triton's; please report this. It is not used."
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nanollama.kernels.tune", description="Measure attention tiles on this GPU, and keep the best."
    )
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--lengths", default="4096", help="positions per row, comma-separated")
    parser.add_argument("--tokens", type=int, default=32768, help="positions per measurement; rows follow")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"error: the kernels are for GPUs, and JAX runs on {jax.default_backend()} here.", file=sys.stderr)
        return 2
    kind = jax.devices()[0].device_kind
    for length in map(int, options.lengths.split(",")):
        for plain in (False, True):
            rows = max(1, options.tokens // length)
            problem = Problem(rows, length, options.heads, options.kv_heads, options.head_dim, plain)
            entry = tune(problem)
            path = tuning.save(kind, {tuning.name(problem.shape()): entry})
            print(f"{tuning.name(problem.shape())}: {entry['backend']}, {entry['milliseconds']} ms", flush=True)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
