"""Check values from settings files against type annotations."""

from __future__ import annotations

import dataclasses
import math
import types
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from .remote import Location
from .settings import Damaged, short

NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    Path: "a path",
    type(None): "nothing",
    list: "a list",
    tuple: "a list",
}


def checked(value: Any, kind: Any, path: Location, key: str = "") -> Any:
    """Return `value` from the file at `path` as an instance of the annotation `kind`; raise Damaged if it is none.

    kind: bool, int, float (finite), str, None, Any, Path (from a string), a Literal, a union, a list, a
    tuple, a dict with string keys, a TypedDict (of which other keys are kept) or a dataclass (of which other keys are
    errors). Integers are floats; booleans are not integers. key: where the value stands in the file.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _fields(value, kind, path, key)
    if origin in (Union, types.UnionType):
        for part in sorted(parts, key=lambda part: part is not type(None)):
            if _fits(value, part):
                return checked(value, part, path, key)
    elif _fits(value, kind):
        inside = f"{key}[{{}}]".format
        if origin is dict:
            return {name: checked(x, parts[1], path, f"{key}.{name}" if key else name) for name, x in value.items()}
        if origin is list:
            return [checked(x, parts[0], path, inside(i)) for i, x in enumerate(value)]
        if origin is tuple:
            kinds = [parts[0]] * len(value) if parts[1:] == (...,) else parts
            return tuple(
                checked(x, part, path, inside(i)) for i, (x, part) in enumerate(zip(value, kinds, strict=True))
            )
        return Path(value) if kind is Path else value
    raise Damaged(path, f"{key or 'it'} is {short(value)}, expected {_describe(kind)}")


def _fields(value: Any, kind: Any, path: Location, key: str) -> Any:
    """Check the keys of a mapping against those of a TypedDict or a dataclass."""
    if not isinstance(value, dict):
        raise Damaged(path, f"{key or 'it'} is {short(value)}, expected a mapping")
    hints, prefix = _hints(kind), f"{key}." if key else ""
    if is_typeddict(kind):
        required = set(kind.__required_keys__)
    else:
        fields = dataclasses.fields(kind)
        none = dataclasses.MISSING
        required = {item.name for item in fields if item.default is none and item.default_factory is none}
        unknown = sorted(map(str, value.keys() - hints.keys()))
        if unknown:
            raise Damaged(path, f"it has the unknown key {short(prefix + unknown[0])}")
    if missing := sorted(required - value.keys()):
        raise Damaged(path, f"{prefix}{missing[0]} is missing")
    found = {name: checked(x, hints.get(name, Any), path, f"{prefix}{name}") for name, x in value.items()}
    if is_typeddict(kind):
        return found
    try:
        return kind(**found)
    except ValueError as error:
        raise Damaged(path, str(error)) from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, kind: Any) -> bool:
    """Return whether the value itself, without what is inside it, is of a kind."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if kind is Any or kind is None or kind is type(None):
        return kind is Any or value is None
    if origin is Literal:
        return any(value == x and type(value) is type(x) for x in parts)
    if origin is tuple:
        return isinstance(value, list) and (parts[1:] == (...,) or len(value) == len(parts))
    if is_typeddict(kind) or dataclasses.is_dataclass(kind) or origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is int:
        return type(value) is int
    if kind is Path:
        return isinstance(value, str) and "\0" not in value
    return isinstance(value, origin)


def _describe(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, parts))
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple and parts[1:] != (...,):
        return f"a list of {len(parts)}"
    return NAMES.get(origin or kind, "a mapping")
