"""The one reader of images: the formats that are read, a cap on their pixels, and every mode as upright RGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

# Pillow reads dozens of formats more, some of which start other programs. AVIF came with Pillow 11.3.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP") + ("AVIF",) * ("avif" in features.get_supported_modules())
# Suffixes without their dot, in lower case. If several images share a name, the first of these is read.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "avif")
UNREAD_SUFFIXES = ("heic", "heif", "gif", "jxl", "jp2", "svg")  # known images that are named but not read
MAX_IMAGE_PIXELS = 25_000_000
# The first bytes of other files that people take for images: (offset, bytes, name).
_SIGNATURES = (
    (0, b"version https://git-lfs", "a pointer of Git LFS"),
    (0, b"GIF8", "GIF"),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"8BPS", "PSD"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
)
_TEXTS = ((b"<svg", "SVG"), (b"<!doctype html", "HTML"), (b"<html", "HTML"))
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


class TooManyPixels(ValueError):
    """An image is larger than the reader allows."""


class UnreadFormat(ValueError):
    """A file has a format that the reader does not read."""


def open_image(
    source: bytes | Path | BinaryIO,
    formats: tuple[str, ...] = IMAGE_FORMATS,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Open an image and read its header without decoding; use it in a `with`, which closes its file.

    The pixels stay as stored: an EXIF orientation is not applied, which suits masks.

    Raises TooManyPixels for a header with more than max_pixels, FileNotFoundError for a path that is not a file,
    UnreadFormat for another known format, and ValueError for an unknown one or a damaged header.
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
    except UnidentifiedImageError as error:
        found = _format(source)
        expected = ", ".join(formats)
        if found is None:
            raise ValueError(f"got a file of an unknown or damaged format, expected {expected}") from error
        raise UnreadFormat(f"got {found}, which is not read, expected {expected}") from error
    except Exception as error:
        raise _damaged(error, "image") from error
    if image.width * image.height > max_pixels:
        image.close()
        raise TooManyPixels(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
    return image


def read_image(
    source: bytes | Path | BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS, *, turn: bool = True
) -> Image.Image:
    """Read a file or its bytes as RGB, turned upright by its EXIF orientation.

    turn: False keeps the pixels where they are stored, for an image with a mask, which is drawn on them (Pillow turns
        TIFF files in any case).
    Raises as open_image does, and ValueError for damaged data and for pixels without a known range.
    """
    with open_image(source, max_pixels=max_pixels) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd metadata in images that it reads
                image.load()  # a TIFF turns itself here
        except Exception as error:
            raise _damaged(error, f"{image.format} image") from error
        return to_rgb(_upright(image) if turn else image)


def check_is_file(path: Path) -> None:
    """Raise FileNotFoundError unless `path` is a regular file: reading a pipe or a device would block."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: 16 bits are scaled to 8, and transparent pixels are drawn on white.

    An RGB image is returned itself, with its pixels loaded. Raises ValueError for floating-point pixels.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode == "F":
        raise ValueError("got floating-point pixels, whose range is unknown, expected 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _damaged(error: Exception, what: str) -> Exception:
    """Return the error for bytes on which Pillow raised `error`: anything from SyntaxError to struct.error.

    Errors of the file system and a lack of memory are returned themselves.
    """
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno is not None:
        return error
    return ValueError(f"got a damaged or truncated {what}")


def _upright(image: Image.Image) -> Image.Image:
    """Return the loaded image turned by its EXIF orientation; unreadable EXIF data are ignored."""
    try:
        turn = _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow raises anything on damaged EXIF data, and the pixels are fine without
        return image
    return image if turn is None else image.transpose(turn)


def _format(source: Path | BinaryIO) -> str | None:
    """Return the name of a file's format by its first bytes, or None for an unknown one."""
    if isinstance(source, Path):
        with open(source, "rb") as stream:
            return _format(stream)
    source.seek(0)
    head = source.read(512)
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<?xml") and b"<svg" in text:
        return "SVG"
    return next((name for start, name in _TEXTS if text.startswith(start)), None)
