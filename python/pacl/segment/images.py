"""Images of users: found in folders, read with a cap on their pixels, of any mode."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps

from ..data.samples import IMAGE_FORMATS, IMAGE_SUFFIXES, open_image, open_source, to_rgb


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as given, folders as the images in them by name; ValueError where there is none."""
    paths, found = list(paths), []
    for path in paths:
        if path.is_dir():
            found += sorted(x for x in path.iterdir() if x.suffix.lower()[1:] in IMAGE_SUFFIXES)
        else:
            found.append(path)
    if not found:
        raise ValueError(f"images: none in {', '.join(map(str, paths))}, expected {', '.join(IMAGE_SUFFIXES)} files")
    return found


def read_image(path: Path | bytes, max_pixels: int = 25_000_000) -> Image.Image:
    """Of a file or its bytes: RGB, turned as its EXIF orientation says; raises for what is no image, or by its header
    has more pixels."""
    with open_source(path) as stream, open_image(stream, IMAGE_FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
        return to_rgb(ImageOps.exif_transpose(image))
