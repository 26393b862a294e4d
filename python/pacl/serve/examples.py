"""The images that the page offers, and their thumbnails."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..data.images import open_image, to_rgb
from ..data.scenes import CLASSES, draw_scene
from ..segment.draw import png
from ..segment.images import find_images
from .gate import Gate

THUMBNAIL = (192, 128)  # most pixels along each side: twice the size on the page, for sharp screens
KEPT_THUMBNAILS = 1024  # 4 to 8 kB each


class Example(NamedTuple):
    """An image that the page offers, as a file or its bytes, with words to begin with."""

    name: str
    image: Path | bytes
    words: str = ""

    def read(self) -> bytes:
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()


class Thumbnails:
    """Thumbnails of examples, made one at a time when they are first asked for; the last 1,024 are kept."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples
        self.gate = Gate()
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def make(self, number: int, max_pixels: int) -> bytes:
        """Return a JPEG of an example; raises ValueError or OSError for a file that cannot be read."""
        with self.gate.enter():
            if number not in self._kept:
                self._kept[number] = _thumbnail(self.examples[number].image, max_pixels)
            self._kept.move_to_end(number)
            while len(self._kept) > KEPT_THUMBNAILS:
                self._kept.popitem(last=False)
            return self._kept[number]


def _thumbnail(source: Path | bytes, max_pixels: int) -> bytes:
    with open_image(source, max_pixels=max_pixels) as image:
        image.draft("RGB", (max(THUMBNAIL), max(THUMBNAIL)))  # decodes a JPEG at a fraction of its size, in less time
        try:
            small = to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # decoders raise anything on damaged bytes
            raise ValueError("image: got damaged data, expected a whole image") from error
    small.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def find_examples(folder: Path | None, checkpoint: str | None) -> list[Example]:
    """Return the images of a folder; without one, scenes unseen in training if the checkpoint is the demo's."""
    if folder is not None:
        found = [x for x in find_images([folder]) if x.is_file()]
        return [Example(x.relative_to(folder).as_posix() if folder.is_dir() else x.name, x) for x in found]
    if checkpoint:
        place = Path(checkpoint).resolve()  # the demo's folder, or the embedder in it
        if any(all((x / name).is_dir() for name in ("clip", "scenes")) for x in (place, place.parent)):
            return demo_scenes()
    return []


def demo_scenes(count: int = 6) -> list[Example]:
    """Generate scenes, each with words for everything in it and for one absent thing."""
    found = []
    for number in range(count):
        rng = np.random.default_rng((2**31, number))  # cannot repeat the demo's own seeds, which have three numbers
        scene = draw_scene(rng)
        inside = [CLASSES[i] for i in np.unique(scene.mask)]
        absent = rng.choice([x for x in CLASSES if x not in inside])
        found.append(Example(f"scene {number + 1}", png(Image.fromarray(scene.image)), ", ".join([*inside, absent])))
    return found
