"""What the figures of a benchmark depend on, without names of hosts or folders; and the file they are written to."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from nanollama.data.files import write_atomic
from nanollama.experiments.environment import processor_name, usable_cores

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores and load."""
    return {"cpu": processor_name(), "cores": usable_cores(),
            "load_average": [round(load, 2) for load in os.getloadavg()]}  # fmt: skip


def accelerator() -> dict[str, Any]:
    """What JAX computes on."""
    import jax

    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(path: Path, what: str, figures: dict[str, Any], *packages: str) -> None:
    """JSON with versions and machine, under its final name only when whole; says so where it is to be kept."""
    parts = {"what": what, "machine": machine(), "device": accelerator(), "versions": versions(*packages)}
    write_atomic(path, json.dumps({**parts, **figures}, indent=1) + "\n")
    if path.parent == RESULTS:
        print(f"written to {path.name}")
