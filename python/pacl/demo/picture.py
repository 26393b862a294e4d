"""segmentation.png: image, truth, plain CLIP and PACL side by side, every class drawn in its own texture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.scenes import BACKGROUNDS, COLOURS, HELD_OUT, PAIRS, PATTERNS, background_texture, paint
from ..files import write_bytes
from ..segment.lettering import write
from .evaluation import Evaluation, percent

SCALE = 3  # pixels per scene pixel
CELL, GAP, LEFT, TOP, LEGEND = 64 * SCALE, 12, 24, 92, 330
FAINT, ACCENT = (110, 110, 118), (196, 30, 110)


def draw_picture(evaluation: Evaluation, path: Path) -> None:
    """Draw the evaluation's rows and a legend, and write the PNG to `path`."""
    columns = {"image": "image", "truth": "truth", "clip": "plain CLIP", "pacl": "PACL"}
    rows = evaluation.rows
    width = LEFT + 4 * (CELL + GAP) + LEGEND
    sheet = Image.new("RGB", (width, max(TOP + len(rows) * (CELL + GAP + 22), 740)), "white")
    draw = ImageDraw.Draw(sheet)
    write(sheet, (LEFT, 16), "Zero-shot segmentation of unseen scenes: 24 classes compete in every pixel", 20)
    for column, (name, title) in enumerate(columns.items()):
        x = LEFT + column * (CELL + GAP)
        write(sheet, (x, TOP - 44), title, 16)
        if name in evaluation.metrics:
            write(sheet, (x, TOP - 22), _miou(evaluation, name), 13, FAINT)
    for number, row in enumerate(rows):
        y = TOP + number * (CELL + GAP + 22)
        for column, name in enumerate(columns):
            tile = photo(row.image) if name == "image" else textured(row.maps[name])
            sheet.paste(tile, (LEFT + column * (CELL + GAP), y))
        write(sheet, (LEFT, y + CELL + 3), row.title, 13, FAINT)
    _legend(sheet, draw, LEFT + 4 * (CELL + GAP) + 20, TOP)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def photo(image: Tensor) -> Image.Image:
    """Return a scene's image, uint8 [3, 64, 64], at the picture's scale."""
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize((CELL, CELL), Image.Resampling.BICUBIC)


def textured(labels: Tensor) -> Image.Image:
    """Draw a label map [64, 64] as a picture [CELL, CELL]: each class in its own texture, regions outlined."""
    big = labels.numpy().repeat(SCALE, 0).repeat(SCALE, 1)
    out = np.zeros((CELL, CELL, 3))
    for label in np.unique(big):
        out[big == label] = _texture(label, CELL)[big == label]
    edge = np.zeros_like(big, dtype=bool)
    edge[1:] |= big[1:] != big[:-1]
    edge[:, 1:] |= big[:, 1:] != big[:, :-1]
    out[edge] = 0
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


def legend_picture() -> Image.Image:
    """Return the legend alone: the texture of every class."""
    sheet = Image.new("RGB", (LEGEND, 760 - TOP), "white")
    _legend(sheet, ImageDraw.Draw(sheet), 4, 8)
    return sheet


def _texture(label: int, size: int) -> np.ndarray:
    if label < len(PAIRS):
        return paint(PAIRS[label], size, scale=SCALE)
    return background_texture(BACKGROUNDS[label - len(PAIRS)])[:size, :size]


def _legend(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """Draw the legend at (x, y): colours down, patterns across, held-out pairs framed; the backgrounds below."""
    size, step = 56, 70
    y += 26
    for column, pattern in enumerate(PATTERNS):
        write(sheet, (x + 70 + column * step, y - 24), pattern, 14)
    for row, colour in enumerate(COLOURS):
        write(sheet, (x, y + row * step + 18), colour, 14)
        for column, pattern in enumerate(PATTERNS):
            at = (x + 70 + column * step, y + row * step)
            tile = paint((colour, pattern), size, scale=SCALE).clip(0, 255).astype(np.uint8)
            sheet.paste(Image.fromarray(tile), at)
            if (colour, pattern) in HELD_OUT:
                draw.rectangle((at[0] - 5, at[1] - 5, at[0] + size + 4, at[1] + size + 4), outline=ACCENT, width=3)
    y += len(COLOURS) * step
    draw.rectangle((x, y + 6, x + 14, y + 20), outline=ACCENT, width=3)
    write(sheet, (x + 24, y + 4), "held out: never in a training scene", 14)
    y += 44
    for index, name in enumerate(BACKGROUNDS):
        at = (x + (index % 3) * 94, y + (index // 3) * 84)
        tile = background_texture(name)[:size, :size].clip(0, 255).astype(np.uint8)
        sheet.paste(Image.fromarray(tile), at)
        write(sheet, (at[0], at[1] + size + 3), name, 14)


def _miou(evaluation: Evaluation, method: str) -> str:
    seen, held_out = (percent(evaluation.metrics[method][group]["miou"]) for group in ("seen", "held_out"))
    return f"mIoU {seen} %, held out {held_out} %"
