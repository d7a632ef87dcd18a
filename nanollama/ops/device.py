"""Which device the program being traced is for. Knows only jax."""

import jax


def device() -> tuple[str, str]:
    """(cpu, gpu or tpu; the device's kind) that the program being traced is for: the mesh's, else the default."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return _platform(abstract.platform), abstract.device_kind
    return _platform(jax.default_backend()), jax.devices()[0].device_kind


def _platform(name: str) -> str:
    return "gpu" if name in ("gpu", "cuda", "rocm") else name
