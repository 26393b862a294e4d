"""Find users' images in folders; the reader is that of all commands."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..data.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, read_image

__all__ = ["find_images", "read_image"]


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return files as given and folders as their images, sorted by name; raises ValueError if there is none.

    Images in formats that are not read, such as HEIC, are found too, so that reading names them.
    """
    paths, found = list(paths), []
    for path in paths:
        if path.is_dir():
            found += sorted(x for x in path.iterdir() if x.suffix.lower()[1:] in IMAGE_SUFFIXES + UNREAD_SUFFIXES)
        else:
            found.append(path)
    if not found:
        raise ValueError(
            f"images: got none in {', '.join(map(str, paths))}, expected {', '.join(IMAGE_SUFFIXES)} files"
        )
    return found
