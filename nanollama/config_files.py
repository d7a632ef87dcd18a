"""From a config file and changes on the command line to a checked Config.

A config file is Python with `get_config(arg)` that returns an `ml_collections.ConfigDict` (see `configs/`); pipeline
files are read in the same way. Owns that file's form and that of `--config.field=value`. Imports only the standard
library, as `nanollama.config` does.
"""

import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanollama.config import Config, ConfigError, resolve
from nanollama.data.strict import nearest, to_mapping


def load(spec: str, changes: Sequence[str] = ()) -> Config:
    """Resolve `path.py` or `path.py:arg`, with `field.path=value` changes, into a checked Config.

    Errors: ConfigError names the field, its value, the nearest valid name and the fix.
    """
    values = load_file(spec)
    for change in changes:
        _apply_override(values, change)
    return resolve(values)


def overrides(arguments: Sequence[str]) -> list[str]:
    """`--config.field=value` arguments as `field=value`. Errors: ConfigError on any other argument."""
    for argument in arguments:
        if not argument.startswith("--config."):
            raise ConfigError(argument, "no such argument", "Fields of the config are given as --config.field=value.")
    return [argument.removeprefix("--config.") for argument in arguments]


def load_file(spec: str) -> Any:
    """What the file's `get_config(arg)` returns, as plain dicts and lists; `arg` is what follows the colon in `spec`.

    Errors: ConfigError where there is no such file or no `get_config` in it.
    """
    path_text, _, argument = spec.partition(":")
    path = Path(path_text)
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError("--config", f"no file {path_text!r}", nearest(path_text, siblings or ["configs/phase1.py"]))
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError("--config", f"{path_text!r} has no get_config(arg)", "Define get_config(arg) there.")
    return to_mapping(module.get_config(argument))


def parse_arg(argument: str, **defaults: Any) -> dict[str, Any]:
    """`"runlocal,steps=20"` -> {"runlocal": True, "steps": 20}, with `defaults` for what is not named.

    For `get_config(arg)` of config files. Errors: ConfigError on a name not in `defaults` or another type.
    """
    values = dict(defaults)
    for part in filter(None, argument.split(",")):
        name, given, text = part.partition("=")
        if name not in values:
            raise ConfigError("--config", f"unknown argument {name!r}", nearest(name, list(defaults)))
        value = _literal(text) if given else True
        if type(value) is not type(defaults[name]):
            raise ConfigError(
                "--config",
                f"argument {name}={value!r} is of type {type(value).__name__}",
                f"Give a value of type {type(defaults[name]).__name__}.",
            )
        values[name] = value
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--config.{path}", "has no value", "Write --config.field=value.")
    *parents, last = path.split(".")
    node = values
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(
                "config." + ".".join(parents[: depth + 1]), "has no fields of its own", "Shorten the path."
            )
        node = child
    node[last] = _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
