"""YAML with line numbers: the value of a file, and the line where each of its fields stands.

Owns reading YAML strictly: a key given twice is an error, not the last one wins; a file whose aliases stand for more
than a person could have written is refused before they are followed. Knows nothing of mixtures.
"""

import os
from pathlib import Path
from typing import Any

import yaml

MAX_VALUES = 100_000  # of a file with its aliases written out; the largest mixture here has 616


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
    fields = _Fields(str(path))
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, fields.lines
        fields.walk(node, root, ())  # before the value is made, which takes as long as its aliases are many
        return loader.construct_document(node), fields.lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise YamlError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error}).") from error
    except RecursionError as error:
        raise YamlError(f"{path}: lists or mappings are nested too deeply to be read. Write it flatter.") from error


def line_of(field: str, lines: dict[str, int]) -> int:
    """Line of `field`, or of the nearest field around it that the file has."""
    while field and field not in lines:
        cut = max(field.rfind("."), field.rfind("["))
        field = field[:cut] if cut > 0 else ""
    return lines.get(field, 1)


class _Loader(yaml.SafeLoader):
    """Says where a value stands that looks like a date or a number and is none, such as 2023-02-29."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value!r}: {error}; if it is a text, put it in quotes",
                problem_mark=node.start_mark) from error


class _Fields:
    """The lines of the fields of the file `path`."""

    def __init__(self, path: str):
        self.path = path
        self.lines: dict[str, int] = {}
        self._values = 0

    def walk(self, node: yaml.Node, where: str, around: tuple[yaml.Node, ...]) -> None:
        """Note the lines of `node` and what is in it. `around`: the nodes that it is in. Raises YamlError."""
        line = node.start_mark.line + 1
        self.lines.setdefault(where, line)
        self._values += 1
        if self._values > MAX_VALUES:
            top = ".".join(where.split("[")[0].split(".")[:2])
            raise YamlError(f"{self.path}:{line_of(top, self.lines)}: the file has more than {MAX_VALUES:,} values, "
                            f"aliases (*name) written out, and {top} is not the end of them. Use fewer aliases of "
                            "what holds aliases.")
        if any(node is outer for outer in around):
            raise YamlError(f"{self.path}:{line}: {where} is an alias of what it stands in. Write it out.")
        around = (*around, node)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.walk(item, f"{where}[{index}]", around)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, item in node.value:
                name = str(key.value)
                if name in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise YamlError(f"{self.path}:{key.start_mark.line + 1}: {name!r} is given twice in one mapping. "
                                    "Keep one of them.")
                seen.add(name)
                self.lines[f"{where}.{name}"] = key.start_mark.line + 1
                self.walk(item, f"{where}.{name}", around)
