"""The samples of a shard: which members belong together, by their names alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .images import IMAGE_SUFFIXES, UNREAD_SUFFIXES

SUFFIXES = ("mask.png", "txt", "json", *IMAGE_SUFFIXES, *UNREAD_SUFFIXES)
OPEN = 8  # incomplete samples with one webdataset key that are kept in memory


class Group(NamedTuple):
    """Members with one key. parts: contents by suffix, in lower case. fault: a reason and a message, if it is bad."""

    key: str
    parts: dict[str, bytes]
    fault: tuple[str, str] | None = None

    @property
    def image(self) -> str | None:
        """The suffix of the image, None without one."""
        return next((suffix for suffix in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES) if suffix in self.parts), None)

    @property
    def whole(self) -> bool:
        return self.image is not None and "txt" in self.parts


def split_name(name: str) -> tuple[str, str] | None:
    """Split the name of a member into key and suffix; None for other files and hidden ones.

    The suffix is one of SUFFIXES, and all before it is the key: `a/b.v2.jpg` has the key `a/b.v2`, not `a/b` as in
    webdataset, so that versions and dates in names do not merge samples.
    """
    folder, slash, file = name.rpartition("/")
    for suffix in SUFFIXES:
        if file.lower().endswith("." + suffix) and not file.startswith("."):
            return folder + slash + file[: -len(suffix) - 1], suffix
    return None


def group_members(members: Iterable[tuple[str, bytes]]) -> Iterator[Group]:
    """Yield the samples of a shard from the names and contents of its members, in their order.

    Members of a sample are adjacent, except for those of its extensions. An image or text `x.depth.png` without its
    other half beside a sample `x` is such an extension, as webdataset sees it, and left out. Other samples without an
    image or a text have a fault. They come last, because their other half may follow far away (fault "apart").
    """
    lost: dict[str, Group] = {}  # incomplete samples, without their contents
    groups: dict[str, Group] = {}  # samples that the next member may belong to
    base = ""  # webdataset's key, which all of `groups` have
    whole: set[str] = set()  # keys of the samples with this base so far
    halves: list[str] = []  # keys of the incomplete ones

    def close(key: str) -> Iterator[Group]:
        group = groups.pop(key)
        if group.whole:
            whole.add(key)
            yield group
        else:
            halves.append(key)
            parts = group.parts if key not in lost else lost[key].parts | group.parts
            lost[key] = Group(key, dict.fromkeys(parts, b""))

    def close_all() -> Iterator[Group]:
        for key in list(groups):
            yield from close(key)
        for key in halves:
            if any(char == "." and key[:i] in whole for i, char in enumerate(key)):
                lost.pop(key, None)
        whole.clear()
        halves.clear()

    for name, data in members:
        split = split_name(name)
        if split is None:
            continue
        key, suffix = split
        first = _webdataset_key(key)
        if first != base:
            yield from close_all()
            base = first
        for other in list(groups):
            if groups[other].whole and other != key and not key.startswith(f"{other}."):
                yield from close(other)
        group = groups.setdefault(key, Group(key, {}))
        if suffix in group.parts:
            message = f"got a second member {name!r}, expected one of a name"
            yield Group(key, {}, ("archive", message))
            continue
        group.parts[suffix] = data
        if len(groups) > OPEN:
            yield from close(next(iter(groups)))
    yield from close_all()
    for key, group in lost.items():
        if group.whole:
            message = "got image and text that are not adjacent, expected them one after the other (sort the names)"
            yield Group(key, {}, ("apart", message))
        elif "txt" in group.parts:
            yield Group(key, {}, ("image", "got a text without an image, expected both"))
        elif group.image is not None:
            yield Group(key, {}, ("caption", f"got {key}.{group.image} without {key}.txt, expected both"))


def _webdataset_key(key: str) -> str:
    folder, slash, file = key.rpartition("/")
    return folder + slash + file.partition(".")[0]
