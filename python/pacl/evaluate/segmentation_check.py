"""Check a dataset on disk: counts, damaged files, labels of another layout, shifted labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import write_bytes
from ..progress import Progress
from ..segment.draw import png
from .own_data import OwnData, segmentation_data
from .segmentation_data import SegmentationData
from .segmentation_pictures import label_picture
from .specs import IGNORED, UNKNOWN


@dataclass
class Check:
    """Findings about a dataset.

    images, official: number of images found and expected. pixels: count of each label, int64 [K]. ignored: number of
    pixels that do not count. values: pixels per value in the mask files. problems: one line each; a dataset without
    problems can be evaluated.
    """

    title: str
    layout: str
    images: int
    official: int
    classes: list[str]
    pixels: np.ndarray
    ignored: int = 0
    values: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Format the report, with every label's share of the pixels that count."""
        total = max(1, int(self.pixels.sum()))
        lines = [f"{self.title}: {self.images} of {self.official} images, masks {self.layout}"]
        lines += [f"  {100 * self.pixels[k] / total:6.2f} %  {k:3d}  {x}" for k, x in enumerate(self.classes)]
        lines.append(f"  {100 * self.ignored / max(1, total + self.ignored):6.2f} % of all pixels do not count")
        lines += [f"problem: {line}" for line in self.problems] or ["no problem found"]
        return "\n".join(lines)


def check_segmentation(
    name: str, root: str | Path, *, class_file: str | Path | None = None, picture: str | Path | None = None
) -> Check:
    """Read every image and mask of a dataset; write one image under its labels, with their names, to `picture`.

    Raises FileNotFoundError if no image has a mask, and ValueError for an unknown dataset. Every other problem becomes
    a line of the result's `problems`.
    """
    data = segmentation_data(name, root, class_file=class_file, partial=True)
    spec, table = data.spec, data.masks.table
    found = Check(
        spec.title, data.layout, len(data), spec.count[0], data.classes, np.zeros(len(data.classes), np.int64)
    )
    problems = found.problems
    if data.missing:
        gone = sorted(set(data.missing))
        problems.append(f"{len(gone)} images lack their file or their mask, first {gone[0]}")
    elif len(data) not in spec.count:
        problems.append(f"{len(data)} images, expected {' or '.join(map(str, spec.count))}: from {spec.source}")
    counts = np.zeros(1 << 16, np.int64)
    damaged, sizes = [], []
    richest: tuple[int, int | None] = (0, None)
    with Progress(f"check {name}", len(data), "image") as progress:
        for i, image_name in enumerate(data.names):
            progress.step()
            try:
                values, image = data.values(i), data.image(i)
            except ValueError as error:
                damaged.append(str(error))
                continue
            if values.shape != (image.height, image.width):
                sizes.append(image_name)
                continue
            seen = np.bincount(values.ravel(), minlength=1 << 16)
            counts += seen
            if np.count_nonzero(seen) > richest[0]:
                richest = (int(np.count_nonzero(seen)), i)
    if damaged:
        problems.append(f"{len(damaged)} images or masks are damaged, first {damaged[0]}")
    if sizes:
        problems.append(f"{len(sizes)} masks have another size than their image, first {sizes[0]}")
    found.values = {int(v): int(counts[v]) for v in np.flatnonzero(counts)}
    found.ignored = int(counts[table == IGNORED].sum())
    np.add.at(found.pixels, table[table >= 0], counts[table >= 0])
    problems += _label_problems(data, found)
    if picture is not None and richest[1] is not None:
        labels = table[data.values(richest[1])]
        shown = label_picture(data, data.image(richest[1]), np.where(labels == UNKNOWN, IGNORED, labels))
        write_bytes(picture, png(shown))
    return found


def _label_problems(data: SegmentationData, found: Check) -> list[str]:
    """Report impossible values, and gaps that suggest that all labels are one too low or too high."""
    table, values = data.masks.table, found.values
    unknown = [v for v in values if table[v] == UNKNOWN]
    if unknown:
        others = [x for x in data.spec.masks if (x.table[list(values)] != UNKNOWN).all()]
        hint = f"; all values are labels of {others[0].path}" if others else ""
        if unknown == [255] and table[0] == IGNORED:
            hint = ": labels are probably one too low, as if label 0 had already been removed"
        return [f"values {', '.join(map(str, unknown[:8]))} are not labels of {data.layout}{hint}"]
    absent = [name for name, n in zip(found.classes, found.pixels, strict=True) if n == 0]
    low = ": labels are probably one too low" if absent == found.classes[-1:] else ""
    if not absent or found.images not in data.spec.count or isinstance(data, OwnData) and not low:
        return []  # a subset of the images, or a dataset of your own, may well lack a class
    return [f"{len(absent)} of {len(found.classes)} classes never occur, first {absent[0]!r}{low}"]
