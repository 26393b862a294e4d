"""A generated world with exact masks: coloured, patterned shapes on textured backgrounds, 64 x 64 pixels.

The concepts are local textures on purpose: in a trial a small CLIP learned colour and pattern in two minutes of
training, but still named silhouettes at chance. Three of the 18 colour x pattern pairs never occur in training scenes;
a model that names them has composed its knowledge of the colour and of the pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels, both sides

# No green, grey or brown: shapes that share a colour with a background caused the most errors.
COLOURS = {
    "red": (215, 35, 40),
    "orange": (250, 130, 15),
    "yellow": (250, 225, 40),
    "cyan": (40, 200, 215),
    "blue": (35, 70, 215),
    "purple": (140, 45, 180),
}
PATTERNS = ("plain", "striped", "dotted")
BACKGROUNDS = ("grass", "sand", "gravel", "wood", "snow", "asphalt")

PAIRS = tuple((colour, pattern) for colour in COLOURS for pattern in PATTERNS)
HELD_OUT = (("red", "striped"), ("yellow", "dotted"), ("blue", "plain"))
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


def phrase(pair: tuple[str, str]) -> str:
    """Return the words for a (colour, pattern) pair: `an orange striped shape`."""
    colour, pattern = pair
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {pattern} shape"


# A mask's label is an index into CLASSES: the pairs first, then the backgrounds.
CLASSES = tuple(phrase(pair) for pair in PAIRS) + BACKGROUNDS
SEEN_LABELS = tuple(PAIRS.index(pair) for pair in SEEN)
HELD_OUT_LABELS = tuple(PAIRS.index(pair) for pair in HELD_OUT)


@dataclass(frozen=True)
class Scene:
    """One generated picture.

    image: uint8 [64, 64, 3]; mask: uint8 [64, 64], labels into CLASSES; caption: one line;
    labels: the labels of the shapes in it, back to front.
    """

    image: np.ndarray
    mask: np.ndarray
    caption: str
    labels: tuple[int, ...]


def draw_scene(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...] = PAIRS) -> Scene:
    """Draw one to three shapes of different `pairs` on a random background; the `rng` state determines the scene."""

    def choose(rng: np.random.Generator) -> list[int]:
        chosen = rng.choice(len(pairs), size=min(int(rng.integers(1, 4)), len(pairs)), replace=False)
        return [PAIRS.index(pairs[i]) for i in chosen]

    image, mask, labels, background = draw_shapes(rng, choose, lambda label: paint(PAIRS[label], SIZE, rng), len(PAIRS))
    return Scene(image, mask, _caption(rng, labels, background), labels)


def draw_shapes(
    rng: np.random.Generator,
    choose: Callable[[np.random.Generator], list[int]],
    texture: Callable[[int], np.ndarray],
    first_background: int,
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...], str]:
    """Draw shapes with the labels that `choose` returns, back to front; return image, mask, labels and background.

    texture: function from a label to its texture, float [64, 64, 3]. first_background: the label in the mask of the
    first of BACKGROUNDS.
    """
    while True:
        background = int(rng.integers(len(BACKGROUNDS)))
        canvas = background_texture(BACKGROUNDS[background])
        top, left = rng.integers(canvas.shape[0] - SIZE, size=2)
        image = canvas[top : top + SIZE, left : left + SIZE] + rng.uniform(-10, 10)
        mask = np.full((SIZE, SIZE), first_background + background, dtype=np.uint8)
        labels = tuple(choose(rng))
        for label in labels:
            inside = _silhouette(rng)
            mask[inside] = label
            image[inside] = texture(label)[inside]
        # Draw again if a later shape hides one, which the caption would name but the picture not show.
        if all(np.count_nonzero(mask == label) >= 150 for label in labels):
            break
    image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    return image, mask, labels, BACKGROUNDS[background]


def paint(pair: tuple[str, str], size: int, rng: np.random.Generator | None = None, scale: int = 1) -> np.ndarray:
    """Return float [size, size, 3] filled with a pair's texture: white stripes 2 pixels wide, or black dots 5 across.

    `rng` shifts the pattern and varies the colour; `scale` enlarges the pattern, for legends.
    """
    colour, pattern = pair
    shift = rng.integers(0, 42, size=2) if rng else (0, 0)
    fill = np.array(COLOURS[colour], dtype=np.float64) + (rng.uniform(-12, 12, 3) if rng else 0)
    out = np.broadcast_to(fill, (size, size, 3)).copy()
    y, x = np.ogrid[:size, :size]
    if pattern == "striped":  # stripes narrower than the gaps, so that the colour prevails
        out[np.broadcast_to((y // scale + shift[0]) % 6 < 2, (size, size))] = 255
    elif pattern == "dotted":
        out[((y // scale + shift[0]) % 7 - 3) ** 2 + ((x // scale + shift[1]) % 7 - 3) ** 2 <= 4] = 15
    return out


def _silhouette(rng: np.random.Generator) -> np.ndarray:
    """Return bool [64, 64]: an ellipse, or a polygon of 3 to 8 corners, around a random centre."""
    centre, radius = rng.uniform(12, SIZE - 12, 2), rng.uniform(13, 22)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    if rng.random() < 0.3:
        radii = np.array([radius, radius * rng.uniform(0.6, 1.0)])
    else:
        corners = int(rng.integers(3, 9))
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 2 * np.pi)
        radii = radius * rng.uniform(0.75, 1.15, corners)[:, None]
    outline = centre + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    stencil = Image.new("1", (SIZE, SIZE))
    ImageDraw.Draw(stencil).polygon([tuple(point) for point in outline], fill=1)
    return np.asarray(stencil)


def _caption(rng: np.random.Generator, labels: tuple[int, ...], background: str) -> str:
    """Name the scene's parts in random order. Parts are left out at times, as people do, down to a bare `grass`."""
    named = [CLASSES[label] for label in rng.permutation(labels) if rng.random() < 0.75]
    with_background = rng.random() < 0.6
    if not named:
        return background
    words = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return f"{words} on {background}" if with_background else words


@cache
def background_texture(name: str) -> np.ndarray:
    """Return the texture from which a background is cut, float [256, 256, 3]; always the same for a name."""
    rng = np.random.default_rng(BACKGROUNDS.index(name))

    def noise(height: int, width: int) -> np.ndarray:
        """Return unit noise smoothed over `height` x `width` pixels."""
        field = rng.normal(size=(256, 256))
        for axis, length in ((0, height), (1, width)):
            field = sum((np.roll(field, shift, axis) for shift in range(length)), np.zeros_like(field))
        return (field / field.std())[..., None]

    base, grain = {
        "grass": ((72, 104, 52), 22 * noise(5, 1) + 8 * noise(9, 9)),
        "sand": ((208, 188, 150), 9 * noise(1, 1) + 7 * noise(3, 12)),
        "gravel": ((128, 128, 126), 34 * np.sign(noise(3, 3)) * (np.abs(noise(3, 3)) > 0.5)),
        "wood": ((112, 74, 46), 16 * noise(2, 25) + 5 * noise(1, 1)),
        "snow": ((232, 237, 243), 4 * noise(2, 2) + 6 * noise(12, 12)),
        "asphalt": ((52, 53, 57), 7 * noise(1, 1) + 60 * (noise(1, 1) > 2.2)),
    }[name]
    return np.array(base) + grain
