"""YAML with line numbers: the value of a file, and the line where each of its fields stands.

Owns reading YAML strictly (a key given twice is an error, not the last one wins). Knows nothing of mixtures.
"""

import os
from pathlib import Path
from typing import Any

import yaml


class YamlError(ValueError):
    """A YAML file that cannot be read; the message names file and line."""


def load_with_lines(path: str | os.PathLike[str], root: str) -> tuple[Any, dict[str, int]]:
    """The value in `path`, and {field path: line, from 1}, such as {"root.datasets[0].name": 7}.

    Field paths are written as `nanollama.data.strict` writes them in its errors. Raises YamlError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise YamlError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise YamlError(f"{path}: not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}). Save it as "
                        "UTF-8.") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise YamlError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error}).") from error
    lines: dict[str, int] = {}
    if node is not None:
        _walk(node, root, lines, str(path), ())
    return value, lines


def line_of(field: str, lines: dict[str, int]) -> int:
    """Line of `field`, or of the nearest field around it that the file has."""
    while field and field not in lines:
        cut = max(field.rfind("."), field.rfind("["))
        field = field[:cut] if cut > 0 else ""
    return lines.get(field, 1)


def _walk(node: yaml.Node, where: str, lines: dict[str, int], path: str, around: tuple[yaml.Node, ...]) -> None:
    """`around`: the nodes that `node` is in."""
    lines.setdefault(where, node.start_mark.line + 1)
    if any(node is outer for outer in around):
        raise YamlError(f"{path}:{node.start_mark.line + 1}: {where} is an alias of what it stands in. Write it out.")
    around = (*around, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, f"{where}[{index}]", lines, path, around)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, item in node.value:
            name = str(key.value)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise YamlError(f"{path}:{key.start_mark.line + 1}: {name!r} is given twice in one mapping. "
                                "Keep one of them.")
            seen.add(name)
            lines[f"{where}.{name}"] = key.start_mark.line + 1
            _walk(item, f"{where}.{name}", lines, path, around)
