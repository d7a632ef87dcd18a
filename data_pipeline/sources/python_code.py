"""Python source files as text: the files of the running interpreter's library, and docstrings as prose.

Owns which library files count (tests are left out) and how a module's docstrings become one document.
"""

import ast
import io
import os
import sysconfig
import tokenize
import warnings
from pathlib import Path

# Tests repeat tables and broken syntax on purpose; the rest is not the library's own source.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


def stdlib_files() -> list[tuple[str, Path]]:
    """(name relative to the library, path) of every .py file, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def decode_source(raw: bytes) -> str:
    """Text of a Python file by its own encoding line (PEP 263). Raises ValueError when that fails."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)
    except (SyntaxError, LookupError) as error:
        raise ValueError(str(error)) from error


def docstrings(source: str) -> str:
    """The docstrings of a module as prose: each under its dotted name, in the order of the file.

    Raises ValueError when the source does not parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"does not parse as Python ({error})") from error
    parts: list[str] = []
    _collect(tree, "", parts)
    return "\n\n".join(parts)


def _collect(node: ast.AST, name: str, parts: list[str]) -> None:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and text.strip():
            parts.append(f"{name}\n\n{text}" if name else text)
        for child in node.body:
            child_name = getattr(child, "name", "")
            _collect(child, f"{name}.{child_name}" if name else child_name, parts)
