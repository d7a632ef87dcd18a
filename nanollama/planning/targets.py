"""Machines a run can be planned for: the figures of one device, and how many there are.

Owns the table and the names (`h200x8`, `v5p-256`). Figures are the makers' data sheets unless a comment says
otherwise; prices are public list prices per hour of one device, on demand, and change: `--price` overrides them.
"""

import dataclasses
import math
import re
from typing import Literal

from nanollama.accelerators import PEAK_FLOPS
from nanollama.data.strict import FieldError, nearest
from nanollama.parallel.backend import GPU_MEMORY

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU, TPU chip or CPU."""

    kind: str  # as JAX names it
    platform: Literal["cuda", "tpu", "cpu"]
    peak_flops: float  # dense bfloat16 per second
    memory: float  # bytes that a program can use
    bandwidth: float  # bytes of device memory per second
    link: float  # bytes per second to the devices of the same host or slice, one direction
    network: float  # bytes per second and device to those of other hosts, one direction
    per_host: int  # devices that share a host or slice, so that `link` reaches them
    watts: float  # of the device; the host's share is in `OVERHEAD`
    price: float  # US dollars per hour
    # Shares of the peak that good kernels reach. GEMM: 650 of 989 TFLOP/s on an H100 in whole training steps;
    # attention with head dim 64 to 128, forward and backward: 300 of 989 (tokamax's published H100 timings).
    matmul: float = 0.66
    attention: float = 0.30


# Power: thermal design power. Price: H100 and H200 as on-demand clouds list them in 2026, the TPUs as Google Cloud
# does for its cheapest US region. Link: NVLink 4 has 450 GB/s one way (18 links of 25); a TPU chip's ICI links
# together one way; network: 400 Gb/s InfiniBand or Ethernet per GPU, 200 GB/s of data-centre network per TPU host.
_OF_80_GIB = GPU_MEMORY * 80 * GIB
DEVICES: dict[str, Device] = {
    "a100": Device("NVIDIA A100-SXM4-80GB", "cuda", PEAK_FLOPS["a100"],
                   _OF_80_GIB, 2039 * GB, 300 * GB, 25 * GB, 8, 400, 1.8),
    "h100": Device("NVIDIA H100 80GB HBM3", "cuda", PEAK_FLOPS["h100"],
                   _OF_80_GIB, 3350 * GB, 450 * GB, 50 * GB, 8, 700, 3.0),
    "h200": Device("NVIDIA H200", "cuda", PEAK_FLOPS["h200"],
                   GPU_MEMORY * 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 8, 700, 3.8),
    "b200": Device("NVIDIA B200", "cuda", PEAK_FLOPS["b200"],
                   GPU_MEMORY * 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 8, 1000, 6.0),
    # Memory as libtpu's compiler states it in its out-of-memory errors: 15.75 and 95.73 GiB.
    "v4": Device("TPU v4", "tpu", PEAK_FLOPS["tpu v4"],
                 31.75 * GIB, 1200 * GB, 135 * GB, 6 * GB, 4096, 192, 3.22),
    "v5e": Device("TPU v5 lite", "tpu", PEAK_FLOPS["tpu v5 lite"],
                  15.75 * GIB, 819 * GB, 100 * GB, 6 * GB, 256, 200, 1.2),
    "v5p": Device("TPU v5", "tpu", PEAK_FLOPS["tpu v5"],
                  95.73 * GIB, 2765 * GB, 300 * GB, 6 * GB, 8960, 350, 4.2),
    "v6e": Device("TPU v6 lite", "tpu", PEAK_FLOPS["tpu v6"],
                  31.25 * GIB, 1640 * GB, 224 * GB, 6 * GB, 256, 300, 2.7),
}  # fmt: skip
OVERHEAD = 1.5  # power of hosts, network and cooling beside the devices' own

# Shapes of TPU slices: v4 and v5p are three-dimensional, v5e and v6e two-dimensional.
_SLICES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """`count` devices of one kind."""

    name: str
    device: Device
    count: int

    @property
    def topology(self) -> str:
        """What a compiler without the hardware is told: TPU "v5p:4x8x8"; GPU "slices x hosts x devices"."""
        if self.device.platform == "cuda":
            hosts = math.ceil(self.count / self.device.per_host)
            return f"{hosts}x1x{self.count // hosts}"
        generation = self.name.partition("-")[0]
        return f"{generation}:{_SLICES[_dimensions(generation)][self.count]}"


def parse(name: str) -> Target:
    """`h200x8` (8 GPUs), `v5p-256` (256 chips). Errors: FieldError names the nearest kind, or the slices there are."""
    found = re.fullmatch(r"([a-z]+\d+[a-z]*)(?:[x-](\d+))?", name.lower())
    kind, count = (found[1], int(found[2] or 1)) if found else (name, 1)
    if kind not in DEVICES:
        raise FieldError("--target", f"no device {kind!r}", f"{nearest(kind, list(DEVICES))} Write h200x8 or v5p-256, "
                         "cpu for this machine.")
    device = DEVICES[kind]
    if count < 1:
        raise FieldError("--target", f"{count} devices", "Give 1 or more.")
    if device.platform == "tpu":
        sizes = _SLICES[_dimensions(kind)]
        if count not in sizes:
            there = ", ".join(map(str, sizes))
            raise FieldError("--target", f"no slice of {count} {kind} chips", f"There are {there}.")
        return Target(f"{kind}-{count}", device, count)
    if count > device.per_host and count % device.per_host:
        raise FieldError("--target", f"{count} {kind} are not whole hosts of {device.per_host}",
                         f"Use a multiple of {device.per_host}.")
    return Target(f"{kind}x{count}", device, count)


def _dimensions(generation: str) -> int:
    return 2 if generation in ("v5e", "v6e") else 3
