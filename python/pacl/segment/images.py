"""Find users' images in folders and read them, in any mode, up to a number of pixels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps

from ..data.images import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, open_image, to_rgb


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return files as given and folders as their images, sorted by name; raises ValueError if there is none."""
    paths, found = list(paths), []
    for path in paths:
        if path.is_dir():
            found += sorted(x for x in path.iterdir() if x.suffix.lower()[1:] in IMAGE_SUFFIXES)
        else:
            found.append(path)
    if not found:
        raise ValueError(
            f"images: got none in {', '.join(map(str, paths))}, expected {', '.join(IMAGE_SUFFIXES)} files"
        )
    return found


def read_image(source: Path | bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Read a file or its bytes as RGB, rotated by its EXIF orientation.

    Raises TooManyPixels for a header with more than max_pixels, and whatever Pillow raises for a file that is not an
    image.
    """
    with open_image(source, max_pixels=max_pixels) as image:
        return to_rgb(ImageOps.exif_transpose(image))
