"""What this card gives at best: a bfloat16 matrix product of random numbers, and a copy of its memory.

    python benchmarks/ceilings.py [--size=8192] [--copy-mb=4096]

Never of zeros: a GPU multiplies them faster (less power, higher clock). Other benchmarks' figures are shares of these.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from benchmarks.attention import ceiling
from benchmarks.machine import RESULTS, write
from nanollama.kernels.tune import milliseconds


def copy_rate(megabytes: int) -> float:
    """Bytes read and written per second by a copy that changes the sign, so that no compiler leaves it out."""
    numbers = jax.random.normal(jax.random.key(0), (megabytes * 2**18,), jnp.float32)
    return 2 * numbers.nbytes / milliseconds(jax.jit(jnp.negative), (numbers,)) * 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices")
    parser.add_argument("--copy-mb", type=int, default=4096, help="MiB that are copied")
    parser.add_argument("--out", type=Path, default=RESULTS / "ceilings.json")
    options = parser.parse_args(arguments)
    figures = {
        "size": options.size,
        "matmul_tflops": round(ceiling(options.size), 6),
        "copy_mib": options.copy_mb,
        "copy_gb_per_second": round(copy_rate(options.copy_mb) / 1e9, 1),
    }
    print(f"{jax.devices()[0].device_kind}: {figures['matmul_tflops']:,.1f} TFLOP/s of bfloat16 {options.size}^3, "
          f"{figures['copy_gb_per_second']:,.0f} GB/s copied (read + written)")  # fmt: skip
    write(options.out, "random data; medians of ten", figures, "jax")
    return 0


if __name__ == "__main__":
    sys.exit(main())
