"""Frozen dataclasses from plain mappings, strictly.

Owns the rule that a configuration never silently ignores or coerces anything. Knows nothing of what the
dataclasses mean, and imports only the standard library, so that every room may use it.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class FieldError(ValueError):
    """A configuration field that cannot be used: names the field, its value, and how to mend it."""

    def __init__(self, field: str, problem: str, fix: str):
        self.field, self.problem, self.fix = field, problem, fix
        super().__init__(f"{field}: {problem}. {fix}")


def nearest(name: str, valid: Sequence[str]) -> str:
    """Sentence that names the valid names closest to `name`, or all of them."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Valid names: " + ", ".join(sorted(valid)) + "."


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "config") -> T:
    """Build the dataclass `cls` (nested ones too) from `mapping`.

    Raises FieldError on an unknown field, a missing one, or a value whose type is not the declared one.
    An int is accepted where a float is declared; nothing else is converted, except list to tuple.
    """
    if not isinstance(mapping, Mapping):
        raise FieldError(
            where,
            f"expected a mapping of fields, got {mapping!r}",
            f"Fields of {cls.__name__}: " + ", ".join(field.name for field in dataclasses.fields(cls)) + ".",
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in mapping.items():
        if name not in fields:
            raise FieldError(f"{where}.{name}", "no such field", nearest(str(name), list(fields)))
        values[name] = _convert(hints[name], value, f"{where}.{name}")
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in values and no_default:
            raise FieldError(
                f"{where}.{name}", "is missing", f"Give it a value of type {_type_name(hints[name])}."
            )
    return cls(**values)


def to_mapping(value: Any) -> Any:
    """Plain JSON-able form (dicts, lists, scalars) of a tree of dataclasses, mappings, ConfigDicts and sequences."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "to_dict"):  # a ConfigDict is no Mapping
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_mapping(item) for item in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            names = [str(arg) for arg in typing.get_args(hint)]
            raise FieldError(where, f"{value!r} is not one of {', '.join(names)}", nearest(str(value), names))
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        return _convert_tuple(hint, value, where)
    if origin is dict or hint is dict:
        return _convert_dict(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise FieldError(where, f"{value!r} is of type {type(value).__name__}",
                         f"Give it a value of type {_type_name(hint)}{_spelling(hint, value)}.")
    return value


def _spelling(hint: Any, value: Any) -> str:
    """How YAML wants a value of type `hint` written, where `value` was read as another."""
    if hint in (int, float) and isinstance(value, str):
        try:
            number = hint(float(value))
            return f": {number:_} without quotes (YAML takes 1e9 for text)" if math.isfinite(number) else ""
        except (ValueError, OverflowError):
            return ""
    if hint is int and isinstance(value, float) and value.is_integer():
        return f", such as {int(value):_}"
    return ": put it in quotes" if hint is str and not isinstance(value, (list, tuple, dict, type(None))) else ""


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    errors: list[FieldError] = []
    for option in typing.get_args(hint):
        if option is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(option, value, where)
        except FieldError as error:
            errors.append(error)
    names = any(typing.get_origin(option) is typing.Literal for option in typing.get_args(hint))
    if len(errors) == 1 or errors[-1].field != where or names:
        raise errors[-1]  # which names there are, or what is wrong inside, says more
    raise FieldError(where, f"{value!r} is of type {type(value).__name__}", " Or: ".join(e.fix for e in errors))


def _convert_tuple(hint: Any, value: Any, where: str) -> tuple:
    item = typing.get_args(hint)[0]
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise FieldError(where, f"{value!r} is not a list", f"Give a list of {_type_name(item)}.")
    return tuple(_convert(item, element, f"{where}[{index}]") for index, element in enumerate(value))


def _convert_dict(hint: Any, value: Any, where: str) -> dict:
    if not isinstance(value, Mapping):
        raise FieldError(where, f"{value!r} is not a mapping", "Give a mapping of names to values.")
    arguments = typing.get_args(hint)
    item = arguments[1] if arguments else Any
    return {str(key): _convert(item, element, f"{where}.{key}") for key, element in value.items()}


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
