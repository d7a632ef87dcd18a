"""Starting as one of several processes: from flags, SLURM, Kubernetes or a TPU pod.

Owns which process this is and where process 0 listens, and the call of `jax.distributed`. `parallel.team` sees to it
that all are there, alike, and stay. Must come before anything uses a JAX device.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping

import jax

from nanollama.config import ConfigError
from nanollama.parallel.team import Connected, Team

_PORT = 8476  # where process 0 listens when nothing names a port


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of how many processes this is."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None  # GPUs of this host that are this process's; None: all
    source: str = "the command line"


def find(coordinator: str | None = None, processes: int | None = None, process: int | None = None,
         environment: Mapping[str, str] = os.environ) -> Place | None:  # fmt: skip
    """The place that flags give, else the cluster's own environment; None for a process alone.

    Errors: ConfigError where some but not all is given.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if any(value is not None for value in given.values()):
        absent = [name for name, value in given.items() if value is None]
        if absent:
            raise ConfigError(absent[0], "is not given", f"Give all of {', '.join(given)}, or none.")
        place = Place(str(coordinator), int(processes or 0), int(process or 0))
        return _checked(place)
    for look in (_slurm, _kubernetes, _tpu_pod):
        found = look(environment)
        if found is not None and found.processes > 1:
            return _checked(found)
    return None


@contextlib.contextmanager
def join(place: Place | None, facts: Mapping[str, str], timeout: float = 300.0) -> Iterator[Team]:
    """Start JAX as one of several processes; yields the team, which ends together.

    Errors: TeamError when not all come in `timeout` seconds, or their `facts` differ.
    """
    if place is None or place.processes == 1:
        yield Team()
        return
    team = Connected(place.process, place.processes, place.coordinator, facts, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPU devices; others have their own
    jax.distributed.initialize(
        place.coordinator, place.processes, place.process, local_device_ids=place.local_devices,
        initialization_timeout=int(timeout), cluster_detection_method="deactivate",
    )  # fmt: skip
    try:
        yield team
    except BaseException as error:
        team.leave(f"{type(error).__name__}: {error}")
        raise
    team.leave()


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """Inside a step that `srun` started: one process per task."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(name in environment for name in names):
        return None
    job, nodes, tasks, process = (environment[name] for name in names)
    port = 61440 + int(job) % 4096  # jobs that share a node have ports of their own
    per_node = int(environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0])
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    local = (int(environment["SLURM_LOCALID"]),) if per_node > 1 and "," in visible else None
    return Place(f"{first_host(nodes)}:{port}", int(tasks), int(process), local, "SLURM")


def _kubernetes(environment: Mapping[str, str]) -> Place | None:
    """Inside an indexed Job whose manifest names the first pod's address and the number of pods."""
    names = ("JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")
    if "JOB_COMPLETION_INDEX" not in environment or "JAX_COORDINATOR_ADDRESS" not in environment:
        return None
    if "JAX_NUM_PROCESSES" not in environment:
        raise ConfigError("JAX_NUM_PROCESSES", "is not set in a Kubernetes Job", "Set it to the Job's completions.")
    process, address, count = (environment[name] for name in names)
    return Place(_with_port(address), int(count), int(process), None, "Kubernetes")


def _tpu_pod(environment: Mapping[str, str]) -> Place | None:
    """On a host of a TPU slice, which is told its number and the names of all."""
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if "TPU_WORKER_ID" not in environment or len(hosts) < 2:
        return None
    return Place(_with_port(hosts[0]), len(hosts), int(environment["TPU_WORKER_ID"]), None, "the TPU pod")


def first_host(nodes: str) -> str:
    """The first of a SLURM node list: "gpu[003-005,9],other" -> "gpu003"."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise ConfigError("SLURM_STEP_NODELIST", f"{nodes!r} names no host", "Give --coordinator HOST:PORT.")
    return "".join(part or "" for part in found.groups())


def _with_port(address: str) -> str:
    return address if re.search(r":\d+$", address) else f"{address}:{_PORT}"


def _checked(place: Place) -> Place:
    if place.processes < 1 or not 0 <= place.process < place.processes:
        raise ConfigError(
            "--process", f"{place.process} of {place.processes} processes (from {place.source})", "Count from 0."
        )
    if not re.search(r":\d+$", place.coordinator):
        raise ConfigError("--coordinator", f"{place.coordinator!r} has no port", "Write HOST:PORT.")
    return place
