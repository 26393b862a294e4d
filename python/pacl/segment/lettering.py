"""Write words of any script into pictures, in the fonts that this machine has.

Pillow's own font has little more than ASCII, and Pillow draws a text in one font. So other texts are split into runs,
each in an installed font that has its characters. matplotlib finds these fonts and reads which characters they have; it
brings one with Latin, Greek, Cyrillic, Arabic and Hebrew letters. Nothing is downloaded.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import importlib.util
import math
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..formats import printable

INK = (30, 30, 34)
JOINERS = "\u200c\u200d"  # part or join the letters and emoji beside them
# Parts of the file names of fonts that are not upright, regular and without serifs.
STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "heavy", "condensed", "mono", "serif", "math")
BLANK = ("lastresort", "adobeblank", "colrv1")  # fonts of boxes, of nothing, and of a kind that Pillow does not draw
STRIKES = (109, 160, 136, 128, 96, 64)  # sizes of coloured bitmaps: Noto's, Apple's, and others
EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")
_said: set[str] = set()  # remedies that were printed


class Run(NamedTuple):
    """A part of a text in one font, which is drawn `factor` times as large as the font is."""

    text: str
    font: ImageFont.FreeTypeFont
    factor: float = 1.0

    @property
    def length(self) -> float:
        """Return the width in pixels."""
        return self.font.getlength(self.text) * self.factor


class Face:
    """A font file and its characters."""

    def __init__(self, path: str | Path):
        self.path = str(path)

    @functools.cached_property
    def _opened(self) -> Any:
        from matplotlib.ft2font import FT2Font

        with contextlib.suppress(RuntimeError, OSError):  # a damaged file, or bitmaps for an old matplotlib
            face = FT2Font(self.path)
            if not face.scalable:
                _strike(self.path)  # raises OSError if Pillow cannot draw it
            return face

    @property
    def bitmaps(self) -> bool:
        """Return True for coloured bitmaps of a fixed size, False for outlines."""
        return not self._opened.scalable

    def has(self, text: str) -> bool:
        """Return True if the font has all characters of `text` that are drawn."""
        if self._opened is None or (self.bitmaps and text.isascii()):  # bitmaps of digits are made for key caps
            return False
        return all(self._opened.get_char_index(ord(char)) or _unseen(char) for char in text)

    def run(self, text: str, size: int) -> Run:
        """Return `text` in this font, with letters of `size` pixels."""
        if not self.bitmaps:
            return Run(text, _outlines(self.path, size))
        font, strike = _strike(self.path)
        return Run(text, font, size / strike)


def write(sheet: Image.Image, at: tuple[float, float], text: str, size: int, ink: tuple[int, int, int] = INK) -> None:
    """Write one line of text on an RGB picture, its upper left corner at `at`, in letters of `size` pixels.

    A character that no font has becomes a box, and a line on standard error names the font to install.
    """
    draw, (x, y) = ImageDraw.Draw(sheet), at
    y += _own(size).getmetrics()[0]  # the line on which letters of all fonts stand
    for run in _runs(text, size):
        if run.factor == 1:
            draw.text((x, y), run.text, ink, run.font, anchor="ls")
        else:
            ascent, descent = run.font.getmetrics()
            tile = Image.new("RGBA", (max(1, math.ceil(run.length / run.factor)), ascent + descent))
            ImageDraw.Draw(tile).text((0, ascent), run.text, font=run.font, embedded_color=True, anchor="ls")
            tile = tile.resize([max(1, round(side * run.factor)) for side in tile.size], Image.Resampling.LANCZOS)
            sheet.paste(tile, (round(x), round(y - ascent * run.factor)), tile)
        x += run.length


def width_of(text: str, size: int) -> float:
    """Return the width in pixels of a line of text."""
    return sum(run.length for run in _runs(text, size))


def fitting(text: str, width: float, size: int) -> str:
    """Cut the text to what fits into `width` pixels."""
    text = _plain(text)[:200]
    if width_of(text, size) <= width:
        return text
    fit = bisect.bisect_right(range(len(text)), width, key=lambda count: width_of(text[:count] + "...", size))
    return text[: max(0, fit - 1)] + "..."


def families(texts: Iterable[str]) -> list[str]:
    """Return the names under which matplotlib then finds the fonts of the texts' characters that its own font lacks."""
    from matplotlib.font_manager import fontManager

    found: dict[str, str] = {}
    for text in texts:
        for face, _ in _split(_plain(text)):
            if face is not None and face.path not in found and not face.bitmaps:
                fontManager.addfont(face.path)
                found[face.path] = face._opened.family_name
    return list(dict.fromkeys(found.values()))


def _runs(text: str, size: int) -> Sequence[Run]:
    """Split a text into runs, in their order from left to right."""
    text = _plain(text)
    runs = [face.run(part, size) if face else Run(part, _own(size)) for face, part in _split(text)]
    directions = (unicodedata.bidirectional(char) for char in text)
    first = next((direction for direction in directions if direction in ("L", "R", "AL")), "L")
    return runs if first == "L" else runs[::-1]


def _split(text: str) -> list[tuple[Face | None, str]]:
    """Split a text by the fonts that have its characters; None is Pillow's own font."""
    if text.isascii():
        return [(None, text)]
    whole = next((face for face in _faces() if face.has(text)), None)
    if whole is not None:
        return [(whole, text)]
    parts: list[tuple[Face | None, str]] = []
    for char in text:
        last = parts[-1][0] if parts else None
        if not (parts and (_unseen(char) or (last.has(char) if last else char.isascii()))):
            face = None if char.isascii() else next((face for face in _faces() if face.has(char)), None)
            if face is None and not char.isascii():
                _say_missing(char)
            parts.append((face, ""))
        parts[-1] = (parts[-1][0], parts[-1][1] + char)
    return parts


@functools.cache
def _faces() -> Sequence[Face]:
    """Return the fonts of this machine, the plainest first; [] without matplotlib."""
    try:
        import matplotlib
        from matplotlib.font_manager import findSystemFonts
    except ImportError:
        return []
    own = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    # findSystemFonts, not fontManager's list: that is stored once, and does not have a font installed later.
    paths = [path for path in findSystemFonts() if not any(word in Path(path).stem.lower() for word in BLANK)]
    return [Face(own), *map(Face, sorted(paths, key=_plainness))]


def _plainness(path: str) -> tuple[int, bool, int, str]:
    name = Path(path).stem.lower()
    return sum(word in name for word in STYLES), "sans" not in name, len(name), name


def _say_missing(char: str) -> None:
    """Print, once for each font, that a font should be installed for the character."""
    script, _, _ = unicodedata.name(char, "").partition(" ")
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "install matplotlib, which finds fonts"
    elif script in EAST_ASIAN:
        remedy = "install Noto Sans CJK (Debian's fonts-noto-cjk)"
    elif unicodedata.category(char) in ("So", "Sk"):
        remedy = "install Noto Color Emoji (Debian's fonts-noto-color-emoji)"
    else:
        remedy = f"install Noto Sans for {script.title() or 'its script'} (Debian's fonts-noto-core)"
    if remedy not in _said:
        _said.add(remedy)
        print(f"no font has {char}, which pictures show as a box: {remedy}", file=sys.stderr)


def _unseen(char: str) -> bool:
    """Return True for a character without a glyph of its own: a joiner, or one that selects a variant."""
    return unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f"


def _plain(text: str) -> str:
    """Return the text without control characters, but with joiners, and with letters and their accents in one."""
    return unicodedata.normalize("NFC", "".join(char if char in JOINERS else printable(char) for char in text))


@functools.cache
def _own(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # given a size
    return font


@functools.cache
def _outlines(path: str, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, size)
    with contextlib.suppress(OSError, ValueError):  # most fonts have one weight
        font.set_variation_by_name("Regular")  # the default of a variable font may be its thinnest
    return font


@functools.cache
def _strike(path: str) -> tuple[ImageFont.FreeTypeFont, int]:
    """Return the font at a size of which it has bitmaps, and that size."""
    for size in STRIKES:
        with contextlib.suppress(OSError):  # "invalid pixel size"
            return ImageFont.truetype(path, size), size
    raise OSError(f"{path} has coloured bitmaps of a size that is not known")
