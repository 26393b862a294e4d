"""The argument `group` of the loss: the processes that share a batch, looked up at each call."""

from __future__ import annotations

from typing import Any, Literal, NoReturn, get_args

import torch.distributed as dist

from .backends import warn_once

GroupName = Literal["world", "local"]
"""All processes of `torch.distributed`, or this one alone."""
NAMES: tuple[str, ...] = get_args(GroupName)


class Handle:
    """Process group of a module. Copies of the module share it, and pickling it is an error."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "group is a process group of some of the processes, which cannot be pickled: expected 'world', 'local' or "
            "None in a PaclLoss that is pickled (set the group again afterwards)"
        )


def check(group: object) -> None:
    """Raise TypeError or ValueError unless `group` is None, one of NAMES, or a group that contains this process."""
    if isinstance(group, str):
        if group not in NAMES:
            raise ValueError(f"group is {group!r}, expected 'world', 'local' or a torch.distributed process group")
    elif group is not None and not isinstance(group, getattr(dist, "ProcessGroup", ())):
        raise TypeError(
            f"group is a {type(group).__name__}, expected a torch.distributed process group with this process in it, "
            "'world' or 'local'"
        )


def named(group: dist.ProcessGroup | GroupName | None) -> dist.ProcessGroup | GroupName | None:
    """Return "world" for the default group, and anything else unchanged."""
    return "world" if group is not None and _initialised() and group is dist.group.WORLD else group


def lookup(group: GroupName | None) -> dist.ProcessGroup | None:
    """Return the process group that a name stands for now, or None for this process alone."""
    if group is None and _initialised() and dist.get_world_size() > 1:
        warn_once(
            "the loss is that of this process's batch alone, because no group was chosen: group='world' takes the "
            f"batch of all {dist.get_world_size()} processes, group='local' silences this warning"
        )
    return dist.group.WORLD if group == "world" and _initialised() else None


def check_size(group: dist.ProcessGroup | GroupName | None, rank: int, world_size: int) -> None:
    """Raise ValueError unless open_clip's settings `rank` and `world_size` are those of the group."""
    if not _initialised():
        raise ValueError(f"world_size is {world_size}, expected 1 without an initialised torch.distributed")
    process_group = lookup(group) if isinstance(group, str) else group
    expected = (0, 1) if process_group is None else (process_group.rank(), process_group.size())
    if expected != (rank, world_size):
        raise ValueError(
            f"rank is {rank} and world_size {world_size}, expected {expected[0]} and {expected[1]} as in the group"
        )


# `torch.compile` evaluates these while it traces, warnings and errors included; see `backends.resolve`.
lookup._dynamo_marked_constant = True  # type: ignore[attr-defined]
check_size._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
