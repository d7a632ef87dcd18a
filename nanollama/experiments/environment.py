"""Where a run ran: interpreter, packages, devices, processor. Nothing that names a person, a host or a home.

Owns environment.json's content and `public`, the rule for text that leaves the machine with a run folder.
Knows nothing of configs or results.
"""

import getpass
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "sentencepiece",
            "numpy")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "OMP_NUM_THREADS")


def environment() -> dict[str, Any]:
    """JSON-able facts of this process; starts the JAX backend if nothing has yet."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices),
                    "hosts": jax.process_count()},
        "variables": {name: public(os.environ[name]) for name in VARIABLES if os.environ.get(name)},
        "processor": {"model": processor_name(), "cores": usable_cores(), "memory_bytes": memory_limit()},
    }


def public(text: str) -> str:
    """`text` with home directories written as ~, which also takes the user's name out of paths."""
    home, user = str(Path.home()), _user()
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?=[/\s\"':,;]|$)", "~", text)
    if user:
        text = re.sub(rf"/(home|Users)/{re.escape(user)}(?=[/\s\"':,;]|$)", "~", text)
    return text


def public_path(path: str | os.PathLike[str]) -> str:
    """`path` as seen from the working directory when it lies below it, else without the home directory."""
    absolute = Path(path).absolute()
    if absolute.is_relative_to(Path.cwd()):
        return absolute.relative_to(Path.cwd()).as_posix()
    return public(str(absolute))


def processor_name() -> str:
    """The CPU's own name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace")
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", lines, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> int:
    """Bytes of memory of the machine, or of the container when that allows less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else ""
    return min(physical, int(allowed)) if allowed.isdigit() else physical


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return ""
