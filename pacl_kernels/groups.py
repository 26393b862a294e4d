"""Which processes share a batch: the argument `group` of the loss, looked up at each call."""

from __future__ import annotations

import torch.distributed as dist

from .backends import warn_once

NAMES = ("world", "local")


class Handle:
    """A process group as a module keeps it: copies of the module share it, and it cannot be pickled."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __deepcopy__(self, memo) -> Handle:
        return self

    def __reduce__(self):
        raise TypeError(
            "group is a process group of some of the processes, which cannot be pickled: expected 'world', 'local' or "
            "None in a PaclLoss that is (its group can be set again afterwards)"
        )


def check(group) -> None:
    """Raises TypeError or ValueError unless it is None, one of NAMES, or a group with this process in it."""
    if isinstance(group, str):
        if group not in NAMES:
            raise ValueError(f"group is {group!r}, expected 'world', 'local' or a torch.distributed process group")
    elif group is not None and not isinstance(group, getattr(dist, "ProcessGroup", ())):
        raise TypeError(
            f"group is a {type(group).__name__}, expected a torch.distributed process group with this process in it, "
            "'world' or 'local'"
        )


def named(group):
    """The default group as "world"; everything else as it is."""
    return "world" if group is not None and _initialised() and group is dist.group.WORLD else group


def lookup(group: str | None) -> dist.ProcessGroup | None:
    """The process group that a name stands for now; None is this process alone."""
    if group is None and _initialised() and dist.get_world_size() > 1:
        warn_once(
            "the loss is that of this process's batch alone, because no group was chosen: group='world' takes the "
            f"batch of all {dist.get_world_size()} processes, group='local' silences this warning"
        )
    return dist.group.WORLD if group == "world" and _initialised() else None


def check_size(group, rank: int, world_size: int) -> None:
    """Raises ValueError unless rank and world size, open_clip's settings, are those of the group."""
    if not _initialised():
        raise ValueError(f"world_size is {world_size}, expected 1 without an initialised torch.distributed")
    group = lookup(group) if isinstance(group, str) else group
    expected = (0, 1) if group is None else (group.rank(), group.size())
    if expected != (rank, world_size):
        raise ValueError(
            f"rank is {rank} and world_size {world_size}, expected {expected[0]} and {expected[1]} as in the group"
        )


# `torch.compile` decides these while it traces, warnings and errors included; see `backends.resolve`.
lookup._dynamo_marked_constant = True
check_size._dynamo_marked_constant = True


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
