"""A segmentation dataset of your own: a folder with `images`, `masks` and a class file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..data.images import IMAGE_SUFFIXES
from ..files import visible_files
from ..segment.prompts import read_classes
from .segmentation_data import SegmentationData
from .specs import IGNORED, OWN, UNKNOWN, Masks, Spec, fingerprint, spread

LAYOUT = "expected images/NAME.jpg (or another format), masks/NAME.png and classes.txt"
MOST_CLASSES = 2**15 - 1  # labels are int16


class OwnData(SegmentationData):
    """Images of a folder `images`, with a mask of the same name in `masks`, in subfolders too.

    A mask is a gray or palette PNG: the label of a pixel is the line of its class in the class file, from 0. 255, or
    65535 with more than 255 classes, does not count. A first class `background` is the background.

    Args:
        root: the folder.
        class_file: one class per line, with synonyms separated by commas; default: `classes.txt` in the folder.
        partial: accept images without a mask.
        limit: use this many images only, spread evenly over the set.

    Raises:
        FileNotFoundError: for missing files.
        ValueError: for unexpected content; both errors name the file.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        class_file: str | Path | None = None,
        partial: bool = False,
        limit: int | None = None,
    ):
        self.root = Path(root)
        file = self.root / "classes.txt" if class_file is None else Path(class_file)
        for path in (self.root / "images", self.root / "masks", file):
            if not (path.is_file() if path == file else path.is_dir()):
                raise FileNotFoundError(f"data: {path} does not exist; {LAYOUT}")
        self.synonyms = read_classes(file, "class_file")
        count = len(self.synonyms)
        if count > MOST_CLASSES:
            raise ValueError(f"class_file: got {count:,} classes in {file}, expected at most {MOST_CLASSES:,}")
        self.classes = [names[0] for names in self.synonyms]
        if len(set(self.classes)) < count:
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"class_file: {file} has the class {twice!r} twice, expected different first words")
        self.class_hash = fingerprint(self.synonyms)
        table = np.full(1 << 16, UNKNOWN, np.int16)
        table[:count] = np.arange(count)
        table[255 if count <= 255 else 65535] = IGNORED
        self._paths = self._find_images()
        self.names = sorted(self._paths)
        self.masks = Masks("masks/*.png", table)
        self.layout, self.split, self._detail = self.masks.path, None, None
        name = self.root.resolve().name
        self.spec = Spec(
            name=own_name(self.root),
            title=f"{name}, {count} classes",
            column=name,
            classes=tuple(self.classes),
            background=self.classes[0] == "background",
            count=(len(self.names),),
            source=str(self.root),
            roots=("",),
            images=("images/*",),
            split=None,
            masks=(self.masks,),
        )
        self.missing = [x for x in self.names if not self._mask_path(x).is_file()]
        self._check_missing(partial)
        self.names = [self.names[i] for i in spread(len(self.names), limit)]

    def _find_images(self) -> dict[str, Path]:
        """Return the path of every image by its name, which is its path below `images` without the suffix."""
        folder = self.root / "images"
        found: dict[str, Path] = {}
        for path in map(Path, visible_files(folder)):
            if path.suffix[1:].lower() in IMAGE_SUFFIXES:
                name = path.relative_to(folder).with_suffix("").as_posix()
                if name in found:
                    raise ValueError(
                        f"data: {found[name]} and {path.name} have the same name, expected one image for each mask"
                    )
                found[name] = path
        if not found:
            raise FileNotFoundError(f"data: {folder} holds no image; {LAYOUT}")
        return found

    def _image_path(self, name: str) -> Path:
        return self._paths[name]


def own_name(root: Path) -> str:
    """Return the name in results of your own dataset in the folder `root`."""
    return f"{OWN}:{root.resolve().name}"


def segmentation_data(
    name: str,
    root: str | os.PathLike,
    *,
    class_file: str | Path | None = None,
    partial: bool = False,
    limit: int | None = None,
) -> SegmentationData:
    """Open the dataset `name`, or with "folder" one of your own; the arguments are those of both classes."""
    root = Path(root)
    if name == OWN:
        return OwnData(root, class_file=class_file, partial=partial, limit=limit)
    return SegmentationData(name, root, class_file=class_file, partial=partial, limit=limit)
