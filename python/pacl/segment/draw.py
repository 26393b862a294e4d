"""Draw label maps and similarity maps with NumPy and Pillow alone."""

from __future__ import annotations

import colorsys
import functools
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from ..data.images import to_rgb
from .lettering import fitting, width_of, write

if TYPE_CHECKING:  # torch takes seconds to import, which --help should not
    from torch import Tensor

# Cosines of the darkest and brightest colour, the same for every word and image, so that absent words stay dark. In the
# demo the median of a class's highest cosine is 0.55 where the class is present, and 0.16 where it is not.
SCALE = (0.0, 0.6)
# matplotlib's "magma" at nine even places.
MAGMA = np.array(
    [(0, 0, 4), (29, 17, 71), (81, 18, 124), (130, 38, 129), (182, 54, 121)]
    + [(230, 81, 100), (251, 136, 97), (254, 194, 135), (252, 253, 191)]
)
FAINT = (110, 110, 118)
LINE, ENTRY, FONT = 22, 220, 14  # pixels: height and width of a legend entry, size of its letters


def voc_palette(count: int) -> np.ndarray:
    """Return Pascal VOC's colours of the labels 0 (black), 1, ...: uint8 [count, 3]; they repeat after 256."""
    labels = np.arange(count)[:, None, None] % 256
    bits = labels >> (3 * np.arange(8)[:, None] + np.arange(3)) & 1  # the label's bits, in turn for red, green, blue
    return (bits << (7 - np.arange(8)[:, None])).sum(1).astype(np.uint8)


def word_colours(count: int) -> np.ndarray:
    """Return colours, uint8 `[count, 3]`, that can be told apart; they repeat after 1,358.

    The first six are hues a golden ratio apart. Each later one is the colour farthest from all before it in CIELAB,
    among colours that are neither dark, pale nor grey: the closest of 30 differ by 30.
    """
    return np.resize(_word_colours(), (count, 3)) if count else np.zeros((0, 3), np.uint8)


@functools.cache
def _word_colours() -> np.ndarray:
    golden = (math.sqrt(5) - 1) / 2
    hues = [colorsys.hsv_to_rgb((0.02 + i * golden) % 1, 0.85, (1.0, 0.8)[i // 5]) for i in range(6)]
    chosen = list((255 * np.array(hues)).astype(np.uint8))
    side = np.linspace(0, 255, 12).round().astype(np.uint8)
    rest = np.stack(np.meshgrid(side, side, side, indexing="ij"), -1).reshape(-1, 3)
    places = _cielab(rest)
    vivid = (places[:, 0] >= 30) & (places[:, 0] <= 92) & (np.hypot(places[:, 1], places[:, 2]) >= 25)
    rest, places = rest[vivid], places[vivid]
    apart = np.linalg.norm(places[:, None] - _cielab(np.array(chosen)), axis=-1).min(1)
    for _ in range(len(rest)):
        farthest = apart.argmax()
        chosen.append(rest[farthest])
        apart = np.minimum(apart, np.linalg.norm(places - places[farthest], axis=-1))
        apart[farthest] = -1  # is not chosen again
    return np.array(chosen)


def _cielab(colours: np.ndarray) -> np.ndarray:
    """Return sRGB colours uint8 [..., 3] as CIELAB's L, a and b under the white D65."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([(0.4124, 0.2126, 0.0193), (0.3576, 0.7152, 0.1192), (0.1805, 0.0722, 0.9505)])
    xyz = xyz / (0.9505, 1.0, 1.089)
    x, y, z = np.moveaxis(np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def heat(values: np.ndarray, scale: tuple[float, float] = SCALE) -> np.ndarray:
    """Return the colours uint8 [..., 3] of values [...]; values beyond the scale get the colour of its end."""
    low, high = scale
    place = (values.clip(low, high) - low) / (high - low) * (len(MAGMA) - 1)
    channels = [np.interp(place, np.arange(len(MAGMA)), MAGMA[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def overlay(
    image: Image.Image,
    shown: Tensor | np.ndarray,
    *,
    colours: np.ndarray | None = None,
    scale: tuple[float, float] = SCALE,
    alpha: float = 0.6,
) -> Image.Image:
    """Draw a label map or one similarity map over the image.

    Args:
        image: a PIL image of H × W pixels.
        shown: integers `[H, W]`, labels; or floats `[h, w]`, cosines, enlarged bilinearly to the image's size.
        colours: uint8 `[K, 3]`, colours of the labels (default: VOC's), where black leaves the image as it is.
        scale: cosines of the darkest and the brightest colour of magma.
        alpha: opacity of the colour, 0 to 1.

    Returns:
        A picture of the image's size.

    Raises:
        ValueError: for labels of another size, and for a scale that does not increase.
    """
    values = np.asarray(shown if isinstance(shown, np.ndarray) else shown.cpu())
    picture = np.array(to_rgb(image))
    if values.dtype.kind == "f":
        if scale[0] >= scale[1]:
            raise ValueError(f"scale: got {scale[0]} to {scale[1]}, expected an increasing pair")
        if values.shape != picture.shape[:2]:
            large = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
            values = np.asarray(large)
        grey = picture.mean(-1, keepdims=True, dtype=np.float32)  # so that all colour comes from the map
        return Image.fromarray(((1 - alpha) * grey + alpha * heat(values, scale)).round().astype(np.uint8))
    if values.shape != picture.shape[:2]:
        raise ValueError(f"shown: got labels {list(values.shape)}, expected the image's {list(picture.shape[:2])}")
    colours = voc_palette(int(values.max()) + 1) if colours is None else colours
    # A table of the results for every label and brightness takes less than half the time of a sum for each pixel.
    share = np.where((colours == 0).all(-1), 0, alpha)[:, None, None]
    table = ((1 - share) * np.arange(256)[:, None] + share * colours[:, None]).round().astype(np.uint8)
    for channel in range(3):
        picture[..., channel] = table[..., channel].take(256 * values.astype(np.int32) + picture[..., channel])
    return Image.fromarray(picture)


def with_legend(
    picture: Image.Image,
    entries: Sequence[tuple[Sequence[int] | None, str, str]] = (),
    scale: tuple[float, float] | None = None,
) -> Image.Image:
    """Enlarge a small picture, and add a legend below.

    entries: a colour (or None), a name, which is cut to fit, and a value behind it. scale: cosines at the two ends of a
    colour scale.
    """
    factor = max(1, 320 // max(picture.size))
    picture = picture.resize([x * factor for x in picture.size], Image.Resampling.NEAREST)
    columns = max(1, picture.width // ENTRY)
    rows = math.ceil(len(entries) / columns) + (scale is not None)
    width = max(picture.width, ENTRY)
    sheet = Image.new("RGB", (width, picture.height + rows * LINE + 8), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for i, (colour, name, value) in enumerate(entries):
        x, y = i % columns * (width // columns), picture.height + 4 + i // columns * LINE
        if colour is not None:
            draw.rectangle((x + 4, y + 3, x + 18, y + 17), fill=tuple(int(c) for c in colour), outline=FAINT)
            x += 20
        value = f"  {value}" if value else ""
        name = fitting(name, width // columns - 28 - width_of(value, FONT), FONT)
        write(sheet, (x + 4, y + 2), name, FONT)
        write(sheet, (x + 4 + width_of(name, FONT), y + 2), value, FONT)
    if scale is not None:
        y = picture.height + 4 + (rows - 1) * LINE
        bar = heat(np.linspace(*scale, ENTRY - 100)[None].repeat(12, 0), scale)
        sheet.paste(Image.fromarray(bar), (46, y + 4))
        write(sheet, (4, y + 2), f"{scale[0]:.2f}", FONT)
        write(sheet, (ENTRY - 48, y + 2), f"{scale[1]:.2f}", FONT)
    return sheet


def label_image(labels: Tensor, colours: np.ndarray) -> Image.Image:
    """Return labels [H, W] as a palette image; with more than 256 colours, as a 16-bit image without colours."""
    values = labels.cpu().numpy()
    if len(colours) > 256:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(colours.astype(np.uint8).ravel().tolist())
    return image


def png(image: Image.Image, level: int = 6) -> bytes:
    """Return a PNG file. level: 1 to 9; for photographs 1 takes a quarter of the time of 6, for a sixth more bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()
