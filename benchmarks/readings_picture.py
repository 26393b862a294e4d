"""Draw the sheet of docs/readings.md: scenes of the demo's world, cut up by every reading of the demo's CLIP.

    python benchmarks/readings_picture.py toy/clip docs/images/readings.png     # toy: the folder of `pacl demo`

Only the classes in a scene compete in its pixels. The figure below a map is the share of its pixels that are right. The
reading "proxy" is not drawn, because it needs a second tower.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from pacl.data.scenes import CLASSES, Scene, draw_scene
from pacl.files import write_bytes
from pacl.readings import READINGS
from pacl.segment.draw import overlay, word_colours
from pacl.segment.lettering import write
from pacl.segment.predict import Segmenter
from pacl.towers import load_towers
from PIL import Image

CELL, GAP, COLUMNS = 128, 8, 6


def scenes(count: int) -> list[Scene]:
    """Return the first evaluation scenes in which three classes or more cover at least 12 % each."""
    found: list[Scene] = []
    index = 0
    while len(found) < count:
        scene = draw_scene(np.random.default_rng([1, index]))
        areas = np.unique(scene.mask, return_counts=True)[1]
        if len(areas) > 2 and areas.min() >= 0.12 * scene.mask.size:
            found.append(scene)
        index += 1
    return found


def draw(clip: Path, count: int) -> Image.Image:
    towers = load_towers(f"local-dir:{clip}")
    names = [name for name, reading in READINGS.items() if not reading.proxy]
    segmenters = {name: Segmenter(towers.read(name)) for name in names}
    lines = -(-(2 + len(names)) // COLUMNS)
    step = CELL + GAP + 20
    sheet = Image.new("RGB", (GAP + COLUMNS * (CELL + GAP), GAP + count * lines * step), "white")
    for number, scene in enumerate(scenes(count)):
        present = np.unique(scene.mask)
        words, colours = [CLASSES[label] for label in present], word_colours(len(present))
        image, truth = Image.fromarray(scene.image), np.searchsorted(present, scene.mask)
        tiles = [("image", image), ("truth", overlay(image, truth, colours=colours))]
        for name, segmenter in segmenters.items():
            labels = segmenter.labels(image, words).numpy()
            right = f"{name}, {100 * (labels == truth).mean():.0f} %"
            tiles.append((right, overlay(image, labels, colours=colours)))
        for place, (title, tile) in enumerate(tiles):
            line, column = divmod(place, COLUMNS)
            x, y = GAP + column * (CELL + GAP), GAP + (number * lines + line) * step
            sheet.paste(tile.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
            write(sheet, (x, y + CELL + 2), title, 13)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, help="Folder of the CLIP that `pacl demo` trained.")
    parser.add_argument("out", type=Path, help="The PNG file to write.")
    parser.add_argument("--scenes", type=int, default=2, help="Number of scenes (default: %(default)s).")
    arguments = parser.parse_args()
    buffer = io.BytesIO()
    draw(arguments.clip, arguments.scenes).quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    write_bytes(arguments.out, buffer.getvalue())
    print(f"{arguments.out}: {len(buffer.getvalue()) / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
