"""Which settings make a run fit, tried by formula: micro-batches, remat, sharding. None changes what is learned.

Knows nothing of how a plan is printed.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from nanollama.config import Config, ConfigError, MeshConfig
from nanollama.parallel.mesh import AXES, batch_shards, mesh_sizes
from nanollama.planning.memory import Memory, Sizes, estimate
from nanollama.planning.roofline import StepTime, step_time
from nanollama.planning.targets import Target

Remat = Literal["none", "dots", "names", "full"]
REMAT: tuple[Remat, ...] = ("none", "dots", "names", "full")
# The formula is up to 16 % below what compilers say (docs/decisions.md); what is chosen by it alone must fit for sure.
MARGIN = 1.16


@dataclasses.dataclass(frozen=True)
class Option:
    """Settings, and what they would take."""

    config: Config
    sizes: dict[str, int]
    memory: Memory
    time: StepTime

    def overrides(self, given: Config) -> list[str]:
        """The command-line overrides that turn `given` into this."""
        now = self.config
        pairs = [("config.compute.remat", given.compute.remat, now.compute.remat),
                 ("config.batch.micro_batches", given.batch.micro_batches, now.batch.micro_batches)]  # fmt: skip
        pairs += [(f"config.mesh.{axis}", getattr(given.mesh, axis), getattr(now.mesh, axis)) for axis in AXES]
        return [f"--{name}={new}" for name, old, new in pairs if old != new]


def evaluate(config: Config, target: Target) -> Option:
    """The formula's figures for a config as it is. Errors: ConfigError as the run itself would raise it."""
    sizes = mesh_sizes(config.mesh, target.count)
    memory = estimate(config, sizes, kernel=target.device.platform != "cpu")
    return Option(config, sizes, memory, step_time(config, target, sizes, memory))


def fitting(config: Config, target: Target, room: float) -> list[Option]:
    """The fastest option in `room` bytes for each remat setting, with the config's own mesh if any fits there."""
    for mesh in meshes(config, target):
        found = [option for remat in REMAT if (option := _first(config, target, mesh, remat, room))]
        if found:
            return sorted(found, key=lambda option: option.time.total)
    return []


def meshes(config: Config, target: Target) -> Iterator[MeshConfig]:
    """The config's own layout, then ones that cut the state further: all devices fsdp, then more and more tensor."""
    yield config.mesh
    tensor = 1
    while config.determinism != "elastic" and tensor <= min(target.count, target.device.per_host):
        other = MeshConfig(data=1, fsdp=-1, tensor=tensor)
        if target.count % tensor == 0 and other != config.mesh:
            yield other
        tensor *= 2


def micro_batches(config: Config, sizes: Sizes) -> list[int]:
    """Numbers of micro-batches that the rows allow, fewest first: fewer are faster."""
    if config.determinism == "elastic":  # there they are part of what is computed
        return [config.batch.micro_batches]
    rows = config.batch.global_rows // batch_shards(sizes)
    return [count for count in range(1, rows + 1) if config.batch.global_rows % (count * batch_shards(sizes)) == 0]


def fewest_micro_batches(config: Config, sizes: Sizes, room: float | None, *, kernel: bool) -> int:
    """As few as fit `room` bytes a device; where none fits, the most that the rows allow.

    room: None where it is not known: one. kernel: as `memory.estimate`.
    """
    counts = micro_batches(config, sizes) or [1]
    for count in counts:
        if room is None or MARGIN * estimate(with_micro_batches(config, count), sizes, kernel=kernel).total <= room:
            return count
    return counts[-1]


def with_micro_batches(config: Config, count: int) -> Config:
    """`config` with its batch cut into `count`."""
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_batches=count))


def _first(config: Config, target: Target, mesh: MeshConfig, remat: Remat, room: float) -> Option | None:
    try:
        counts = micro_batches(config, mesh_sizes(mesh, target.count))
        for count in counts:
            changed = dataclasses.replace(
                with_micro_batches(config, count),
                mesh=mesh,
                compute=dataclasses.replace(config.compute, remat=remat),
            )
            option = evaluate(changed, target)
            if option.memory.total <= room:
                return option
    except ConfigError:  # the axes do not divide the model or the rows
        return None
    return None
