"""World of near-duplicates for study.py: 168 textures that differ in one of three attributes, or in their order.

A shape has a colour, a pattern and the pattern's accent: "a red shape with blue stripes" is not "a blue shape with red
stripes". In half of the scenes the shapes differ in one attribute alone. A batch of 64 rarely contains a caption's
nearest neighbours; one of 4,096 always does. Concepts are local textures of the same size as in pacl.data.scenes.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from pacl.data import scenes
from pacl.data.scenes import BACKGROUNDS, SIZE, Scene

COLOURS = scenes.COLOURS | {"pink": (250, 140, 190)}
ACCENTS = COLOURS | {"white": (255, 255, 255), "black": (15, 15, 15)}
PATTERNS = ("stripes", "bars", "dots")
KINDS = tuple((c, p, a) for c in COLOURS for p in PATTERNS for a in ACCENTS if a != c)
CLASSES = (*(f"{'an' if c == 'orange' else 'a'} {c} shape with {a} {p}" for c, p, a in KINDS), *BACKGROUNDS)
INDEX = {kind: label for label, kind in enumerate(KINDS)}


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw one to three shapes on a background; in half of the scenes each differs from the first in one attribute."""
    image, mask, labels, background = scenes.draw_shapes(rng, _labels, partial(paint, rng=rng), len(KINDS))
    named = [CLASSES[label] for label in rng.permutation(labels) if rng.random() < 0.9]
    words = " and ".join(named)
    if not named or rng.random() < 0.5:
        words = f"{words} on {background}" if named else background
    return Scene(image, mask, words, labels)


def _labels(rng: np.random.Generator) -> list[int]:
    count = int(rng.integers(1, 4))
    first = KINDS[rng.integers(len(KINDS))]
    near = [kind for kind in KINDS if sum(x != y for x, y in zip(kind, first, strict=True)) == 1]
    pool = near if rng.random() < 0.5 else [kind for kind in KINDS if kind != first]
    others = rng.choice(len(pool), size=count - 1, replace=False)
    return [INDEX[first], *(INDEX[pool[i]] for i in others)]


def paint(label: int, rng: np.random.Generator) -> np.ndarray:
    """Return a kind's texture, float [64, 64, 3]: two of six rows or columns in the accent, or dots 5 wide every 7."""
    colour, pattern, accent = KINDS[label]
    y, x = np.ogrid[:SIZE, :SIZE]
    dy, dx = rng.integers(0, 42, size=2)
    if pattern == "dots":
        inside = ((y + dy) % 7 - 3) ** 2 + ((x + dx) % 7 - 3) ** 2 <= 4
    else:
        inside = np.broadcast_to((y + dy if pattern == "stripes" else x + dx) % 6 < 2, (SIZE, SIZE))
    out = np.broadcast_to(np.array(COLOURS[colour]) + rng.uniform(-12, 12, 3), (SIZE, SIZE, 3)).copy()
    out[inside] = np.array(ACCENTS[accent])
    return out
