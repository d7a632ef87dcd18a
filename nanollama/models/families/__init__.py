"""Model families. A family file holds presets and the mapping to published formats, and nothing else."""

from typing import Any

from nanollama.config import ConfigError
from nanollama.data.strict import nearest
from nanollama.models.families import llama

PRESETS: dict[str, dict[str, Any]] = {**llama.PRESETS}


def preset(name: str) -> dict[str, Any]:
    """Fields of a ModelConfig, for config files: `config.model = preset("nanollama-1b")`."""
    if name not in PRESETS:
        raise ConfigError("preset", f"no preset {name!r}", nearest(name, list(PRESETS)))
    return dict(PRESETS[name])
