"""What each device does of a train step on 1, 2, 4 and 8 devices: work, memory and communication; no times.

    python benchmarks/scaling.py [--model=llama-23m] [--rows=8] [--length=256]

Virtual CPU devices and real compiled programs, the global batch always the same. FLOPs and bytes accessed are XLA's
own count of one device's program (layers unrolled, so that each counts); `overhead` is FLOPs of all devices over those
of one: 1.00 is perfect, more is work that devices repeat. Collectives are counted in the program, with the bytes of
their results on a device.
"""

import argparse
import collections
import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from benchmarks.machine import RESULTS, write
from nanollama.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    PackedSetConfig,
    ScheduleConfig,
)
from nanollama.models.decoder import Decoder
from nanollama.models.families import preset
from nanollama.parallel import backend
from nanollama.parallel.mesh import make_mesh
from nanollama.planning.aot import COLLECTIVES, abstract_batch
from nanollama.training.optim import make_optimizer
from nanollama.training.state import abstract_state, state_shardings
from nanollama.training.step import make_train_step

MOST = 8  # devices
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s64": 8, "u8": 1, "s8": 1, "pred": 1}
_RESULT = re.compile(rf"^\s*(?:ROOT )?\S+ = (.+?) ({'|'.join(COLLECTIVES)})\(", re.MULTILINE)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def meshes(model: ModelConfig) -> list[tuple[str, MeshConfig]]:
    """Each axis alone on 2, 4 and 8 devices where the model divides, and pairs on 8."""
    found = [("one device", MeshConfig(data=1))]
    for axis in ("data", "fsdp", "tensor", "context"):
        for count in (2, 4, 8):
            if axis != "tensor" or model.num_heads % count == 0:
                found.append((f"{axis} {count}", dataclasses.replace(MeshConfig(data=1), **{axis: count})))
    found.append(("fsdp 4 x tensor 2", MeshConfig(data=1, fsdp=4, tensor=2)))
    found.append(("fsdp 2 x tensor 2 x context 2", MeshConfig(data=1, fsdp=2, tensor=2, context=2)))
    return found


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{operation: how many in a CPU program's text, and bytes of their results on one device}."""
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for result, name in _RESULT.findall(text):
        found[name]["count"] += 1
        for kind, dims in _ARRAY.findall(result):
            found[name]["bytes"] += BYTES[kind] * math.prod(map(int, filter(None, dims.split(","))))
    return dict(found)


def measure(model: ModelConfig, mesh_config: MeshConfig, rows: int, length: int) -> dict[str, Any]:
    """One device's share of the compiled step. Nothing runs."""
    config = Config(
        "scaling",
        steps=1,
        model=model,
        data=DataConfig((PackedSetConfig("absent"),), "absent", length),
        batch=BatchConfig(rows),
        compute=ComputeConfig(loss_chunk_tokens=rows * length),  # one chunk: XLA counts a loop's body once
        schedule=ScheduleConfig("constant"),
        mesh=mesh_config,
    )
    mesh, optimizer = make_mesh(mesh_config), make_optimizer(config)
    shardings = state_shardings(config, optimizer, mesh)
    step = make_train_step(config, Decoder(model, config.compute), optimizer, mesh, shardings)
    compiled = step.lower(abstract_state(config, optimizer, mesh), abstract_batch(config, mesh)).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "devices": int(mesh.size),
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
    }


def row(name: str, figures: dict[str, Any]) -> str:
    moved = sum(each["bytes"] for each in figures["collectives"].values())
    found = ", ".join(f"{each['count']} {name}" for name, each in sorted(figures["collectives"].items()))
    return (f"{name:<30}{figures['flops'] / 1e9:>9.2f}{figures['overhead']:>10.2f}"
            f"{figures['bytes_accessed'] / 1e9:>10.2f}{figures['arguments'] / 2**20:>10.0f}"
            f"{figures['temporaries'] / 2**20:>10.0f}{moved / 2**20:>10.1f}  {found}")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-23m", help="a preset")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--meshes", default="", help="only those whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    options = parser.parse_args(arguments)
    backend.start(devices=MOST)
    model, entries = ModelConfig(**preset(options.model)), {}
    print(f"{options.model}, {options.rows} x {options.length} tokens; of one device:")
    titles = ("GFLOP", "overhead", "GB used", "args MiB", "temp MiB", "moved MiB")
    print(f"{'':<30}{titles[0]:>9}" + "".join(f"{title:>10}" for title in titles[1:]) + "  collectives")
    for name, mesh in meshes(model):
        if name == "one device" or options.meshes in name:
            figures = measure(model, mesh, options.rows, options.length)
            one = entries.get("one device", figures)
            entries[name] = {**figures, "overhead": round(figures["flops"] * figures["devices"] / one["flops"], 4)}
            print(row(name, entries[name]), flush=True)
    what = "one device's share of a compiled train step, the global batch the same; FLOPs and bytes by XLA's count"
    batch = {"model": options.model, "rows": options.rows, "length": options.length}
    write(options.out, what, {**batch, "meshes": entries}, "jax", "flax", "optax")
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
