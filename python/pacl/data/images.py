"""Images from files and bytes: by a list of formats, with a cap on their pixels, in every mode."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow reads dozens more, some of which start other programs
MAX_IMAGE_PIXELS = 25_000_000


class TooManyPixels(ValueError):
    """An image is larger than the reader allows."""


def open_image(
    source: bytes | Path | BinaryIO,
    formats: tuple[str, ...] = IMAGE_FORMATS,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Open an image with its header read and nothing decoded; use it in a `with`, which closes its file.

    The pixels are as stored: an orientation in EXIF is not followed.

    Raises TooManyPixels for a header with more than max_pixels, FileNotFoundError for a path that is no file, and
    whatever Pillow raises for damaged data or another format.
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif isinstance(source, Path):
        check_is_file(source)
    try:
        with warnings.catch_warnings():  # our own cap replaces Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=formats)
    except Image.DecompressionBombError as error:  # Pillow's own cap, should ours be above 179 million
        raise TooManyPixels(str(error)) from error
    if image.width * image.height > max_pixels:
        image.close()
        raise TooManyPixels(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
    return image


def check_is_file(path: Path) -> None:
    """FileNotFoundError unless `path` is a regular file: a pipe or a device would be waited for."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode: 16 bits are scaled to 8, and what is transparent lies on white.

    An image that is RGB already is returned itself, with its pixels loaded.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # Pillow would clip them
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
