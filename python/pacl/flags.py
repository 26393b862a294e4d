"""Parse the flags of a command, and check the numbers among them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

from .commands import example
from .remote import Location, location

Options = TypeVar("Options")
# A flag that names a local path or an address in a store.
Place = Annotated[
    Location,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: location(words[0]),
        is_instance=lambda value: isinstance(value, Location),
        str_from_instance=lambda place: [str(place)],
    ),
]
# The keys of pacl.readings.READINGS.
Tokens = Literal["plain", "value", "maskclip", "sclip", "clearclip", "naclip", "kk", "rcs", "gem", "scclip", "proxy"]
# The least value of a number in any command's flags. Flags that depend on others are checked where they are used.
LEAST = {
    **dict.fromkeys("batch_size shard_size max_image_pixels scenes train_num_samples force_image_size".split(), 1),
    **dict.fromkeys("max_patches limit stride short_side window window_stride most_images pairs".split(), 1),
    **dict.fromkeys("workers seed sample port max_bad_share".split(), 0),
    **dict.fromkeys("cache_size store_attempts".split(), 1),
    **dict.fromkeys("store_timeout fps".split(), 0.01),
    "patches": 2,
}


def parse(kind: type[Options], argv: Sequence[str], prog: str, default: Any = None) -> Options:
    """Parse `argv` by a dataclass; raise ValueError for a number that is too small or not finite.

    default: an instance with other defaults than those of the class.
    """
    if {"-h", "--help"} & set(argv):
        _help(kind, prog, default)
    more = {} if default is None else {"default": default}
    options = tyro.cli(kind, args=list(argv), prog=prog, **more)
    check_numbers(options)
    return options


def _help(kind: type[Any], prog: str, default: Any) -> None:
    """Print the help of a command and an example, and end with status 0.

    A class with GROUPS, from a title to one of its base classes, gets its flags in these groups.
    """
    if groups := getattr(kind, "GROUPS", None):
        # tyro shows a field that is a dataclass as a group.
        chosen = default if default is not None else kind()
        kind = dataclasses.make_dataclass(
            kind.__name__, [(title, *_group(base, chosen)) for title, base in groups.items()]
        )
        kind.__doc__, default = type(chosen).__doc__, None
    try:
        tyro.cli(kind, args=["--help"], prog=prog, **({} if default is None else {"default": default}))
    finally:
        print(example(prog))


def _group(base: type[Any], chosen: Any) -> tuple[Any, Any]:
    """Return the annotation and the default of a field that stands for the flags of a base class of `chosen`."""
    values = {item.name: getattr(chosen, item.name) for item in dataclasses.fields(base)}
    return Annotated[base, tyro.conf.OmitArgPrefixes], dataclasses.field(default_factory=lambda: base(**values))


def check_numbers(options: Any) -> None:
    """Raise ValueError for a number in the dataclass `options` that is below LEAST or not finite."""
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if type(value) not in (int, float):
            continue
        least = LEAST.get(item.name)
        if least is not None and not value >= least:
            raise ValueError(f"{item.name}: got {value!r}, expected at least {least}")
        if not math.isfinite(value):
            raise ValueError(f"{item.name}: got {value!r}, expected a finite number")
