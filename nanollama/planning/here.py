"""Planning for the machine at hand: its figures, the check before the first step, and the words for a full memory.

Knows how much memory there is. Cuts the batch to it where the config leaves that open, refuses only what is sure not to
fit, and warns of what may not.
"""

import re

import jax

from nanollama.config import Config, ConfigError
from nanollama.experiments.environment import memory_limit, processor_name, usable_cores
from nanollama.parallel.mesh import AXES, mesh_sizes
from nanollama.planning import knobs
from nanollama.planning.memory import Memory, estimate, rows_on_device, state_bytes
from nanollama.planning.targets import DEVICES, GIB, Device, Target
from nanollama.training.throughput import measured_matmul_flops

# Below this share of the memory the state alone is no reason to look closer.
_EASY = 0.25
# The formula is within a fifth of what compilers say (docs/decisions.md); it refuses past this, and warns past 1.
SURE = 1.3


def this_machine(config: Config) -> Target:
    """Its processors as one device (0.3 s to measure them), or the virtual devices that a fixed mesh asks for."""
    count = max(1, _named_devices(config))
    peak = measured_matmul_flops(config.compute.dtype)
    # Of a desktop or a small cloud machine: memory 10 GB/s, 15 W and 5 cents an hour a core.
    cores = usable_cores()
    device = Device(processor_name(), "cpu", peak / count, memory_limit() / count, 10e9 * cores / count,
                    10e9 / count, 1e9 / count, count, 15 * cores / count, 0.05 * cores / count,
                    matmul=0.7, attention=0.35)  # fmt: skip
    return Target("cpu", device, count)


def _named_devices(config: Config) -> int:
    """Devices that the mesh names; an axis of -1 counts as one."""
    count = 1
    for axis in AXES:
        count *= max(getattr(config.mesh, axis), 1)
    return count


def fewest_micro_batches(config: Config, count: int) -> int:
    """As few as fit each of `count` devices here."""
    sizes, on_cpu = mesh_sizes(config.mesh, count), jax.default_backend() == "cpu"
    return knobs.fewest_micro_batches(config, sizes, device_memory(count), kernel=not on_cpu)


def check_memory(config: Config, count: int) -> str:
    """Before the first step on `count` devices here: "" or a warning.

    Errors: ConfigError names the largest parts and the settings that fit, where the run cannot fit.
    """
    room = device_memory(count)
    if room is None:
        return ""
    sizes = mesh_sizes(config.mesh, count)
    state = sum(state_bytes(config, sizes))
    if state < _EASY * room and _least_activations(config, sizes) < _EASY * room:
        return ""
    memory = estimate(config, sizes, kernel=jax.default_backend() != "cpu")
    if memory.total <= room:
        return ""
    words = (f"needs about {memory.total / GIB:.1f} GiB on a device, {room / GIB:.1f} GiB can be used. "
             f"The largest parts: {largest(memory)}. {advice(config, sizes, room)}")  # fmt: skip
    if memory.total > SURE * room:
        raise ConfigError(config.name, words.removesuffix("."), "See python -m nanollama.plan.")
    return f"warning: {config.name} {words}"


def device_memory(count: int) -> float | None:
    """Bytes each of `count` devices here can use; None where that is not known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # virtual devices share what the machine has
        return memory_limit() / count if jax.process_count() == 1 else None
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else None


def largest(memory: Memory) -> str:
    """The three largest parts."""
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in memory.largest())


def advice(config: Config, sizes: dict[str, int], room: float) -> str:
    """The knobs: what fits `room` bytes a device, by formula."""
    kind = DEVICES.get("h100")
    assert kind is not None
    count = 1
    for size in sizes.values():
        count *= size
    device = Device("", "cpu" if jax.default_backend() == "cpu" else "cuda", kind.peak_flops, room, kind.bandwidth,
                    kind.link, kind.network, kind.per_host, 0, 0)  # fmt: skip
    options = knobs.fitting(config, Target("here", device, count), room)
    if not options:
        return "No micro-batch, remat or mesh setting tried fits: use more devices, or a smaller model."
    best = " ".join(options[0].overrides(config))
    return f"This fits: {best}." if best else "It should fit as it is: other programs may hold the rest."


def out_of_memory(error: BaseException) -> bool:
    """Whether XLA says that a device's memory, or the host's, does not do."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text or "out of memory" in text.lower()


def largest_buffers(text: str, count: int = 3) -> list[str]:
    """The largest of the buffers that XLA lists in its error: size, shape, and the operation that makes each.

    XLA's GPU runtime lists them ("Buffer 1: Size: 4.00GiB ..."), the TPU compiler of some versions ("1. Size: 4.00G
    ..."). Arguments of the program are named by none. Empty where there is no list.
    """
    found = []
    for block in re.split(r"^\s*(?:Buffer \d+:|\d+\.)\s+(?=Size:)", text, flags=re.MULTILINE)[1:]:
        size = re.match(r"Size:\s*([\d.]+)\s*([KMGT]?)", block)
        shape = re.search(r"(?:Shape|Subshape): (\S+?)[{\s]", block)
        if size and shape:
            operation = re.search(r'op_name="([^"]*)"', block)
            maker = operation[1].rpartition("jit(main)/")[2] if operation else "no operation given"
            found.append((float(size[1]) * 1024 ** " KMGT".index(size[2] or " "), shape[1], maker))
    found.sort(key=lambda buffer: -buffer[0])
    return [f"{size / GIB:.2f} GiB {shape} ({maker[-100:]})" for size, shape, maker in found[:count]]


def explain(config: Config, count: int, error: BaseException) -> str:
    """What to print for an error that `out_of_memory` knows: the three largest buffers, or parts, and the knob."""
    sizes = mesh_sizes(config.mesh, count)
    memory = estimate(config, sizes, kernel=jax.default_backend() != "cpu")
    room = device_memory(count) or memory.total
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    buffers = "; ".join(largest_buffers(str(error)))
    by_xla = f"The largest buffers on a device, by XLA: {buffers}.\n" if buffers else ""
    return (f"out of memory: {said[:200]}\n{by_xla}The largest parts on a device, by formula: {largest(memory)}.\n"
            f"{advice(config, sizes, min(room, 0.9 * memory.total))}")  # fmt: skip


def _least_activations(config: Config, sizes: dict[str, int]) -> float:
    """A bound from above without tracing: 100 bytes a token, layer and unit of width (66 measured without remat)."""
    m = config.model
    tokens = rows_on_device(config, sizes) * config.data.sequence_length
    wide = max(m.intermediate_size / m.hidden_size / 2.75, 1.0)
    return 100.0 * tokens * m.hidden_size * m.num_layers * wide + 8.0 * config.compute.loss_chunk_tokens * m.vocab_size
