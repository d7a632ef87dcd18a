"""Seconds a step takes at best: arithmetic, memory traffic and communication against what the device can do.

Owns the counts of bytes moved. A lower bound that good runs come near to, not a promise: it knows no kernel launches,
no stragglers and no input pipeline.
"""

import dataclasses
import math

import jax.numpy as jnp

from nanollama.accelerators import WORLD_CARBON
from nanollama.config import Config
from nanollama.models.accounting import flops_per_token
from nanollama.planning.memory import Memory, Sizes, rows_on_device
from nanollama.planning.targets import OVERHEAD, Target


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    arithmetic: float
    memory_traffic: float
    overlapped: float  # communication that runs beside the arithmetic: gathers of weights, sums of gradients
    exposed: float  # communication that the next product waits for: tensor, context, expert
    bubble: float  # pipeline stages waiting for their first or after their last micro-batch

    @property
    def total(self) -> float:
        return max(self.arithmetic, self.memory_traffic, self.overlapped) + self.exposed + self.bubble

    @property
    def limit(self) -> str:
        """What the step waits for most."""
        parts = {"arithmetic": self.arithmetic, "memory traffic": self.memory_traffic,
                 "communication": max(self.overlapped, self.exposed), "pipeline bubbles": self.bubble}  # fmt: skip
        return max(parts, key=lambda name: parts[name])


def step_time(config: Config, target: Target, sizes: Sizes, memory: Memory) -> StepTime:
    """By roofline: the longest of arithmetic, memory traffic and overlapped communication, plus what nothing hides."""
    device, model, compute = target.device, config.model, config.compute
    used = math.prod(sizes.values())
    tokens = config.batch.global_rows * config.data.sequence_length
    flops = flops_per_token(model, config.data.sequence_length)
    # The backward pass computes the forward pass again: all of it, or all but attention, or neither products nor that.
    products, attention = {
        "none": (1.0, 1.0), "dots": (1.0, 1.0), "names": (4 / 3, 1.0), "full": (4 / 3, 4 / 3),
    }[compute.remat]  # fmt: skip
    peak = device.peak_flops * (0.5 if compute.dtype == "float32" and device.platform != "cpu" else 1.0)
    arithmetic = (tokens / used) * (
        (flops.train - flops.attention) * products / (peak * device.matmul)
        + flops.attention * attention / (peak * device.attention)
    )

    micro, itemsize = config.batch.micro_batches, jnp.dtype(compute.dtype).itemsize
    whole = memory.parameters * sizes.get("fsdp", 1)  # weights that a device reads, float32
    traffic = micro * (3 * whole + 4 * memory.activations) + 8 * memory.parameters + 2 * memory.optimizer

    local_tokens = rows_on_device(config, sizes) * config.data.sequence_length // sizes.get("context", 1) * micro
    layers = model.num_layers // sizes.get("stage", 1)
    hidden = local_tokens * model.hidden_size * itemsize
    keys_values = 2 * local_tokens * model.num_kv_heads * model.head_dim * itemsize // sizes.get("tensor", 1)
    again = 1 if compute.remat in ("names", "full") else 0

    def seconds(axis: str, sent: float) -> float:
        """Sending `sent` bytes around a ring of the axis, each device its share at a time."""
        count = sizes.get(axis, 1)
        if count == 1:
            return 0.0
        names = list(sizes)
        reach = math.prod(sizes[name] for name in names[names.index(axis) :])
        speed = device.link if reach <= device.per_host else device.network
        return sent * (count - 1) / count / speed

    overlapped = seconds("fsdp", micro * (2 * whole * itemsize / 4 + whole)) + seconds(
        "data", micro * 2 * memory.gradients
    )
    exposed = seconds("tensor", layers * (4 + 2 * again) * 2 * hidden)
    exposed += seconds("context", layers * (3 + again) * keys_values * sizes.get("context", 1))
    if model.moe is not None:
        exposed += seconds("expert", layers * (4 + 2 * again) * hidden * model.moe.experts_per_token)
    stages = sizes.get("stage", 1)
    bubble = max(arithmetic, traffic / device.bandwidth) * (stages - 1) / micro
    return StepTime(arithmetic, traffic / device.bandwidth, overlapped, exposed, bubble)


@dataclasses.dataclass(frozen=True)
class Bill:
    """What the whole run takes, at the roofline's speed."""

    tokens_per_second: float
    mfu: float
    days: float
    dollars: float
    kilowatt_hours: float
    carbon: float  # kg of CO2


def bill(config: Config, target: Target, seconds: float, *, price: float | None = None,
         carbon: float = WORLD_CARBON) -> Bill:  # fmt: skip
    """Of `config.steps` steps of `seconds`; price in dollars per device and hour, carbon in kg per kWh."""
    device, length = target.device, config.data.sequence_length
    tokens = config.batch.global_rows * length
    hours = config.steps * seconds / 3600
    power = hours * target.count * device.watts * OVERHEAD / 1000
    rate = tokens / seconds
    return Bill(
        tokens_per_second=rate,
        mfu=rate * flops_per_token(config.model, length).train / (device.peak_flops * target.count),
        days=hours / 24,
        dollars=hours * target.count * (device.price if price is None else price),
        kilowatt_hours=power,
        carbon=power * carbon,
    )
