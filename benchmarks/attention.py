"""Attention on this GPU: our kernels beside cuDNN and plain XLA, forward and forward + backward.

    python benchmarks/attention.py [--lengths=1024,4096,16384] [--head-dims=64,128] [--rows=plain,packed] [--tune]

Needs jax and numpy only. First the card's own ceiling (a bfloat16 matrix product of random numbers), then each shape
plain (causal, one document a row) and packed (eight documents a row). TFLOP/s count what the mask lets through:
4 T^2 D / 2 a head forward, 3.5 times that with backward; packed rows are also given as times faster than cuDNN's
causal attention, which is what one runs where documents cannot be masked. Prints a table; writes JSON after each shape.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import RESULTS, write
from nanollama.kernels import tune, tuning
from nanollama.kernels.flash import why_not_mosaic

WHAT = "attention, bfloat16; TFLOP/s of what the mask lets through; medians"
TOKENS = 16_384  # positions of a measurement, and H * K = 2048: as published tables have it
WIDTH = 2048


def ceiling(size: int = 8192) -> float:
    """TFLOP/s of a bfloat16 product of random matrices: what this card gives at best."""
    generator = np.random.default_rng(0)
    a, b = (jnp.asarray(generator.standard_normal((size, size), np.float32), jnp.bfloat16) for _ in range(2))
    return 2 * size**3 / tune.milliseconds(jax.jit(jnp.matmul), (a, b)) / 1e9


def work(problem: tune.Problem) -> float:
    """FLOPs of the forward pass that the mask lets through."""
    documents = 1 if problem.plain else tune.DOCUMENTS
    pairs = documents * (problem.length / documents) ** 2 / 2
    return 4 * pairs * problem.head_dim * problem.heads * problem.rows


def measure(problem: tune.Problem, sides: dict[str, Callable[..., jax.Array]], repeats: int) -> dict[str, Any]:
    """{side: milliseconds and TFLOP/s, or why it did not run}."""
    arrays, result = problem.arrays(), {}
    for name, function in sides.items():
        try:
            forward = tune.milliseconds(jax.jit(function), arrays, repeats)
            both = tune.milliseconds(tune.with_gradients(function), arrays, repeats)
        except Exception as error:  # out of memory, no such library: the row says so and the rest goes on
            result[name] = {"failed": str(error).splitlines()[0][:200]}
            continue
        flops = work(problem)
        result[name] = {
            "forward_ms": round(forward, 4),
            "forward_and_backward_ms": round(both, 4),
            "forward_tflops": round(flops / forward / 1e9, 1),
            "backward_tflops": round(2.5 * flops / max(both - forward, 1e-6) / 1e9, 1),
        }
    return result


def sides_of(problem: tune.Problem, interpret: bool) -> dict[str, Callable[..., jax.Array]]:
    """cuDNN and XLA mask no documents: on packed rows they do the whole causal triangle, and give another result."""
    kind = jax.devices()[0].device_kind
    choice, dim = tuning.lookup(kind, problem.shape()), problem.head_dim
    sides = {"pallas": tune.flash(problem, choice.tiles, interpret)}
    if not interpret and not why_not_mosaic(dim, dim, problem.dtype, kind):
        sides["mosaic"] = tune.flash(problem, choice.mosaic_tiles, compiler="mosaic")
    if not interpret:
        sides["cudnn_causal"] = tune.vendor("cudnn")
    if problem.length <= 4096:
        sides["xla_causal"] = tune.vendor("xla")  # scores whole
    return sides


def row(problem: tune.Problem, figures: dict[str, Any]) -> list[str]:
    """Lines of the table."""
    kind = "plain" if problem.plain else f"packed x{tune.DOCUMENTS}"
    lines = []
    for name, figure in figures.items():
        head = f"{problem.head_dim:>4} {problem.length:>6} {kind:<10} {name:<13}"
        if "failed" in figure:
            lines.append(f"{head} failed: {figure['failed'][:60]}")
            continue
        causal = figures.get("cudnn_causal", {}).get("forward_and_backward_ms")
        faster = f"{causal / figure['forward_and_backward_ms']:>8.2f}x" if causal else ""
        lines.append(
            f"{head}{figure['forward_ms']:>9.3f}{figure['forward_and_backward_ms']:>9.3f}"
            f"{figure['forward_tflops']:>9.1f}{figure['backward_tflops']:>9.1f}{faster}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--rows", default="plain,packed")
    parser.add_argument("--group", type=int, default=1, help="query heads per KV head")
    parser.add_argument(
        "--tune", action="store_true", help="first measure tiles (minutes a shape) and keep the best"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    parser.add_argument(
        "--interpret", action="store_true", help="tiny, on any device: tries the program, not the speed"
    )
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu" and not options.interpret:
        print("error: no GPU here. --interpret tries the program without one.", file=sys.stderr)
        return 2
    device = jax.devices()[0].device_kind
    tokens, width = (64, 32) if options.interpret else (TOKENS, WIDTH)
    top = round(ceiling(64 if options.interpret else 8192), 1)
    print(f"{device}, jax {jax.__version__}; matrix product of random bfloat16: {top:.0f} TFLOP/s")
    titles = ("fwd ms", "f+b ms", "fwd TF", "bwd TF", "speed")
    print(f"{'dim':>4} {'length':>6} {'rows':<10} {'side':<13}" + "".join(f"{title:>9}" for title in titles))
    print("speed: over cuDNN's causal attention, forward + backward")
    entries: list[dict[str, Any]] = []
    for dim in map(int, options.head_dims.split(",")):
        for length in map(int, options.lengths.split(",")):
            for kind in options.rows.split(","):
                heads, plain = max(options.group, width // dim), kind == "plain"
                problem = tune.Problem(max(1, tokens // length), length, heads, heads // options.group, dim, plain)
                if options.tune:
                    tuning.save(device, {tuning.name(problem.shape()): tune.tune(problem, interpret=options.interpret)})
                figures = measure(problem, sides_of(problem, options.interpret), options.repeats)
                print("\n".join(row(problem, figures)), flush=True)
                shape = {"head_dim": dim, "length": length, "rows": problem.rows, "heads": heads,
                         "kv_heads": problem.kv_heads, "documents": 1 if plain else tune.DOCUMENTS}  # fmt: skip
                entries.append({**shape, **figures})
                table = {"matmul_tflops": top, "interpreted": options.interpret, "entries": entries}
                write(options.out, WHAT, table, "jax", "jaxlib")
    return 0


if __name__ == "__main__":
    sys.exit(main())
