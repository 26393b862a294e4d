"""Find users' images in folders, and say why one of them is left out; the reader is that of all commands."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..data.images import IMAGE_FORMATS, IMAGE_SUFFIXES, UNREAD_SUFFIXES, TooManyPixels, read_image
from ..failures import describe
from ..files import visible_files
from ..formats import one_line

__all__ = ["READ", "find_images", "read_image", "why_left_out"]

READ = ", ".join(IMAGE_FORMATS)


def find_images(paths: Iterable[Path], without: Path | None = None, *, folders: bool = False) -> list[Path]:
    """Return files as given, and the images in folders and their subfolders, sorted by path, each folder once.

    Images in formats that are not read, such as HEIC, are found too, so that reading names them. Hidden files and
    folders are left out, and links to folders are followed.

    Args:
        paths: files and folders.
        without: folder of results that is not searched.
        folders: return folders themselves, as videos.

    Raises:
        ValueError: if there is no image, and if `without` is one of the folders.
    """
    paths, found, others = list(paths), [], 0
    seen = set() if without is None else {os.path.realpath(without)}
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        if without is not None and os.path.realpath(path) == os.path.realpath(without):
            raise ValueError(f"out: got {without}, a folder of images, expected another folder for the results")
        if folders:
            found.append(path)
            continue
        for file in sorted(map(Path, visible_files(path, seen))):
            if file.suffix.lower()[1:] in IMAGE_SUFFIXES + UNREAD_SUFFIXES:
                found.append(file)
            else:
                others += 1
    if not found:
        held = f" ({others:,} other files)" if others else ""
        raise ValueError(f"images: got none in {', '.join(map(str, paths))}{held}, expected {READ} files")
    return found


def why_left_out(path: Path, error: Exception) -> str:
    """Return the reason, in one line, for which the image at `path` could not be read or used."""
    if isinstance(error, TooManyPixels):
        return f"{one_line(error)} (--max-image-pixels)"
    if memory := describe(error):
        return f"{memory.partition(';')[0]}; a smaller --short-side or --window takes less"
    if isinstance(error, OSError):
        return (error.strerror or one_line(error)).removeprefix(f"{path} ")
    return one_line(error)[:300] or type(error).__name__
