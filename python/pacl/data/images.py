"""Open images from files and bytes in a few formats, with a cap on their pixels, and convert every mode to RGB."""

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
    """Open an image and read its header without decoding; use it in a `with`, which closes its file.

    The pixels stay as stored: an EXIF orientation is not applied.

    Raises TooManyPixels for a header with more than max_pixels, FileNotFoundError for a path that is not a file, and
    Pillow's own errors for damaged data or another format.
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif isinstance(source, Path):
        check_is_file(source)
    try:
        with warnings.catch_warnings():  # our own cap replaces Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=formats)
    except Image.DecompressionBombError as error:  # Pillow's own cap, 179 million pixels, can be below max_pixels
        raise TooManyPixels(str(error)) from error
    if image.width * image.height > max_pixels:
        image.close()
        raise TooManyPixels(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
    return image


def check_is_file(path: Path) -> None:
    """Raise FileNotFoundError unless `path` is a regular file: reading a pipe or a device would block."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: 16 bits are scaled to 8, and transparent pixels are drawn on white.

    An RGB image is returned itself, with its pixels loaded.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
