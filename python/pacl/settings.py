"""Settings files, JSON or YAML, read within limits.

Every error of this module and of `annotations` is `FILE is damaged: KEY is VALUE, expected TYPE` or alike.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from .files import impostor
from .formats import one_line
from .remote import Location, open_binary

MOST_JSON_BYTES, MOST_YAML_BYTES = 2**26, 2**20  # YAML takes about a second per megabyte
DEEPEST = 50


class Damaged(ValueError):
    """A file does not hold what it should.

    path: the file, or the whole message when the error is made again in another process. what: a clause on what is
    wrong with the file.
    """

    def __init__(self, path: Location | str, what: str | None = None):
        super().__init__(path if what is None else one_line(f"{path} is damaged: {what}"))


def read_settings(path: Location) -> dict[str, Any]:
    """Read a mapping with strings as keys from a .json or .yaml file.

    Raises Damaged for a file that is too large or not in its format, for a key that is given twice, for values nested
    deeper than 50 levels, and for YAML with aliases or types of its own; OSError for one that cannot be read.
    """
    values = _read(path)
    if not isinstance(values, dict):
        raise Damaged(path, f"it holds {short(values)}, expected a mapping")
    for key in values:
        if not isinstance(key, str):
            raise Damaged(path, f"it has the key {short(key)}, expected a string")
    return values


def read_list(path: Location) -> list[Any]:
    """Read a list from a .json file; raises as read_settings does."""
    values = _read(path)
    if not isinstance(values, list):
        raise Damaged(path, f"it holds {short(values)}, expected a list")
    return values


def _read(path: Location) -> Any:
    is_json = path.suffix == ".json"
    most = MOST_JSON_BYTES if is_json else MOST_YAML_BYTES
    with open_binary(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Damaged(path, f"it has more than {most:,} bytes")
    if kind := impostor(path, binary=False):
        raise Damaged(path, f"it is {kind}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Damaged(path, f"byte {error.start:,} is not UTF-8") from error
    values = _parse_json(text, path) if is_json else _parse_yaml(text, path)
    if _depth(values) > DEEPEST:
        raise Damaged(path, f"its values are nested deeper than {DEEPEST} levels")
    return values


def short(value: Any) -> str:
    """Return a value in at most 60 characters, without control characters."""
    text = one_line("nothing" if value is None else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _parse_json(text: str, path: Location) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = sorted(key for key, _ in pairs)
            twice = next(one for one, other in zip(keys, keys[1:], strict=False) if one == other)
            raise Damaged(path, f"it has the key {short(twice)} twice")
        return found

    def integer(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) < int(digits) < 2**63:
            raise Damaged(path, f"it has an integer of more than 64 bits, {short(digits)}")
        return int(digits)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=integer)
    except Damaged:
        raise
    except json.JSONDecodeError as error:
        raise Damaged(path, f"line {error.lineno}, column {error.colno} is not JSON") from error
    except RecursionError as error:
        raise Damaged(path, f"its values are nested deeper than {DEEPEST} levels") from error


def _parse_yaml(text: str, path: Location) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        raise Damaged(path, f"{line} {error.problem if isinstance(error, _Refused) else 'is not YAML'}") from error
    except yaml.YAMLError as error:
        raise Damaged(path, "it has characters that YAML does not allow") from error
    except Exception as error:  # on a date such as 2026-99-99 or a number like 1:99, what Python raises for it
        raise Damaged(path, "it has a value that YAML cannot represent") from error


class _Refused(yaml.constructor.ConstructorError):
    """Valid YAML that no settings file of this package has."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader without aliases, whose expansion can be exponential, and without keys given twice."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(None, None, "has an alias, expected plain values", event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Refused(None, None, f"is nested deeper than {DEEPEST} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                raise _Refused(None, None, "has a key that is not a word", key.start_mark)
            if key.value in seen:
                raise _Refused(None, None, f"has the key {short(key.value)} again", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise _Refused(None, None, "has an integer of more than 64 bits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _depth(values: Any) -> int:
    level, found = [values], 0
    while level and found <= DEEPEST:
        found += 1
        nested = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list)))
        level = [x for each in nested for x in each if isinstance(x, (dict, list))]
    return found
