"""Model families. A family file holds presets and the mapping to published formats, and nothing else."""

from typing import Any

from nanollama.config import ConfigError
from nanollama.data.strict import nearest
from nanollama.models.families import deepseek, llama, minimind, mistral, mixtral, qwen, qwen_moe
from nanollama.models.families.published import Family

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **qwen.FAMILIES,
    **qwen_moe.FAMILIES,
    **mistral.FAMILIES,
    **mixtral.FAMILIES,
    **deepseek.FAMILIES,
    **minimind.FAMILIES,
}
PRESETS: dict[str, dict[str, Any]] = {
    **llama.PRESETS,
    **qwen.PRESETS,
    **qwen_moe.PRESETS,
    **mistral.PRESETS,
    **mixtral.PRESETS,
    **deepseek.PRESETS,
    **minimind.PRESETS,
}


def preset(name: str) -> dict[str, Any]:
    """Fields of a ModelConfig, for config files: `config.model = preset("nanollama-1b")`."""
    if name not in PRESETS:
        raise ConfigError("preset", f"no preset {name!r}", nearest(name, list(PRESETS)))
    return dict(PRESETS[name])


def family_of(model_type: str, where: str) -> tuple[str, Family]:
    """Our name and mapping of a published `model_type`. Errors: ConfigError when it is none of ours."""
    for name, family in FAMILIES.items():
        if family.model_type == model_type:
            return name, family
    raise ConfigError(
        f"{where}: model_type", f"{model_type!r} is not supported", nearest(model_type, list(FAMILIES))
    )
