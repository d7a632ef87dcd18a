"""Real compilation of a train step for a machine that is not here.

Owns the topologies that XLA's compilers are given instead of devices, and what is read off the compiled program.
`pip install "nanollama[tpu]"` brings the TPU compiler (libtpu), `[cuda-plan]` the CUDA one; neither needs the hardware.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from nanollama.config import Config
from nanollama.models.decoder import Decoder
from nanollama.parallel import backend
from nanollama.parallel.mesh import batch_sharding, make_mesh
from nanollama.planning.stand_in import flash_memory
from nanollama.planning.targets import Target
from nanollama.training import step
from nanollama.training.optim import make_optimizer
from nanollama.training.state import abstract_state, state_shardings

COMPILERS = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_plugins.xla_cuda13", "cuda-plan")}  # module, our extra
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device's program; bytes."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    collectives: dict[str, int]  # operations in the program text; those of a scanned layer count once
    seconds: float  # tracing and compiling

    @property
    def total(self) -> int:
        """Bytes a device must have: what comes in, what goes out elsewhere, and what lives between."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def missing(target: Target) -> str | None:
    """None when the compiler for `target` is installed; else what to install."""
    if target.device.platform == "cpu":
        return None
    module, extra = COMPILERS[target.device.platform]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        found = False
    return None if found else f'pip install "nanollama[{extra}]" ({module} is not installed)'


def compile_step(config: Config, target: Target) -> Compiled:
    """What XLA says of `config`'s train step for `target`. Errors: its own, "Ran out of memory" among them."""
    began = time.monotonic()
    return read(compiled_step(config, target), time.monotonic() - began)


def compiled_step(config: Config, target: Target) -> Any:
    """`config`'s train step compiled for `target`, with a run's flags; on GPU and TPU with a stand-in for attention."""
    mesh = make_mesh(config.mesh, devices(target))
    optimizer, decoder = make_optimizer(config), Decoder(config.model, config.compute, config.lora)
    shardings = state_shardings(config, optimizer, mesh)
    train_step = step.make_train_step(config, decoder, optimizer, mesh, shardings)
    kernel = flash_memory() if target.device.platform != "cpu" else contextlib.nullcontext()
    with kernel:
        lowered = train_step.lower(abstract_state(config, optimizer, mesh), abstract_batch(config, mesh))
    return lowered.compile(compiler_options=_options(target))


def abstract_batch(config: Config, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch, with its sharding."""
    shape, where = (config.batch.global_rows, config.data.sequence_length), batch_sharding(mesh)
    types = {key: jnp.float32 if key == "weights" else jnp.int32 for key in step.KEYS}
    return {key: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for key, dtype in types.items()}


def devices(target: Target) -> list[jax.Device]:
    """The devices of a topology: they can be compiled for, not used."""
    if target.device.platform == "cpu":
        return list(jax.devices()[: target.count])
    if target.device.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks the cloud who it is, and waits
        return list(topologies.get_topology_desc(topology_name=target.topology, platform="tpu").devices)
    description = topologies.get_topology_desc(
        platform="cuda", target_config=gpu_description(target), topology=target.topology
    )
    return list(np.asarray(description.devices).ravel())


def gpu_description(target: Target) -> str:
    """XLA's text form of a GPU: what its compiler asks of a card. Hopper's multiprocessor, the table's memory."""
    device, capability = target.device, {"a100": 8, "b200": 10}.get(target.name.partition("x")[0], 9)
    cores = {8: 108, 9: 132, 10: 148}[capability]
    shared = {8: 166912, 9: 232448, 10: 232448}[capability]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: {shared + 1024} shared_memory_per_block_optin: {shared}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {device.bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {device.memory / backend.GPU_MEMORY:.0f}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{device.kind}"
"""


def read(compiled: Any, seconds: float) -> Compiled:
    """The figures of a compiled program."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = re.findall(rf"({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        getattr(memory, "peak_memory_in_bytes", 0),
        dict(collections.Counter(found)),
        seconds,
    )


def _options(target: Target) -> dict[str, Any]:
    """Those of a run there, save what cannot be had without the card."""
    if target.device.platform != "cuda":
        return {}
    pairs = (flag.removeprefix("--").split("=") for flag in backend.known_flags("gpu"))
    run = {name: value == "true" for name, value in pairs}
    return {**run, "xla_gpu_autotune_level": 0}  # autotuning would time kernels on a card
