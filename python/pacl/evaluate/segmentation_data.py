"""Images and label masks of a dataset, from the official files or from those of mmsegmentation's converters."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TypedDict, TypeVar

import numpy as np
from PIL import Image

from ..annotations import checked
from ..data.images import IMAGE_FORMATS, open_image, to_rgb
from ..failures import sentence
from ..segment.prompts import read_classes
from ..settings import short
from .specs import UNKNOWN, Masks, Spec, fingerprint, spec, spread

Content = TypeVar("Content")
MASK_FORMATS = ("PNG", "TIFF")
MAX_PIXELS = 100_000_000


class SegmentationData:
    """Images with a label per pixel.

    `data[i]` is an RGB image and its labels, int16 `[H, W]`, IGNORED (-1) for pixels that do not count. `names` are the
    images' names, `classes` the class names in results, `synonyms` the words for each class, `layout` the masks' path.

    Args:
        name: name of a dataset, such as `"voc20"`.
        root: the dataset's folder, or its parent as in mmsegmentation.
        class_file: other names for the classes, one class per line in the same order, with synonyms separated by
            commas.
        partial: accept a folder that lacks some of the official images.
        limit: use this many images only, spread evenly over the set.

    Raises:
        FileNotFoundError: for missing files.
        ValueError: for unexpected content; both errors name the file.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        *,
        class_file: str | Path | None = None,
        partial: bool = False,
        limit: int | None = None,
    ):
        self.spec = spec(name)
        self.synonyms = self._read_classes(class_file)
        self.classes = list(self.spec.classes)
        self.class_hash = fingerprint(self.synonyms)
        self.root, self._images, self.masks = _find(self.spec, Path(root))
        self.layout, self.split = self.masks.path, _split(self.spec, self.masks)
        if self.layout.endswith(".mat"):
            need_scipy(name)
        self._detail = _Detail(self.root / self.layout) if self.layout.endswith(".json") else None
        self.names = self._read_names()
        self.missing = [] if self._detail else [x for x in self.names if not self._mask_path(x).is_file()]
        self.missing += [x for x in self.names if not self._image_path(x).is_file()]
        self._check_missing(partial)
        self.names = [self.names[i] for i in spread(len(self.names), limit)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        image, values = self.image(i), self.values(i)
        if values.shape != (image.height, image.width):
            raise ValueError(
                f"data: the mask of {self.names[i]} has {values.shape[1]} x {values.shape[0]} pixels, its image "
                f"{image.width} x {image.height}"
            )
        labels = self.masks.table[values]
        if (labels == UNKNOWN).any():
            bad = sorted(set(values[labels == UNKNOWN].tolist()))
            raise ValueError(
                f"data: the mask of {self.names[i]} has the values {_few(bad)}, which {self.layout} of "
                f"{self.spec.name} does not have{self._other_ids()}"
            )
        return image, labels

    def image(self, i: int) -> Image.Image:
        # Ignore an EXIF orientation, because masks are drawn on the pixels as stored.
        return read_picture(self._image_path(self.names[i]), IMAGE_FORMATS, to_rgb)

    def values(self, i: int) -> np.ndarray:
        """Return a mask's values as stored, [H, W]; raises ValueError for a file without labels, such as colours."""
        if self._detail:
            return self._detail.values(self.names[i])
        path = self._mask_path(self.names[i])
        if path.suffix == ".mat":
            return _read_label_map(path)
        values = read_picture(path, MASK_FORMATS, np.asarray)
        if values.ndim != 2 or values.dtype.kind not in "ui":
            raise ValueError(f"data: {path} has colours, expected a label per pixel (palette or gray)")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 1 << 16:
            raise ValueError(f"data: {path} has labels {values.min()} to {values.max()}, expected 0 to 65535")
        return values

    def _read_classes(self, file: str | Path | None) -> list[list[str]]:
        if file is None:
            return self.spec.synonyms
        classes = read_classes(file, "class_file")
        if len(classes) != len(self.spec.classes):
            expected = f"{len(self.spec.classes)} ({self.spec.title})"
            raise ValueError(f"class_file: got {len(classes)} classes in {file}, expected {expected}")
        return classes

    def _read_names(self) -> list[str]:
        if self._detail:
            return self._detail.names
        if self.split:
            names = (self.root / self.split).read_text(encoding="utf-8").split()
            for name in names:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                    raise ValueError(f"data: {self.root / self.split} names {name!r}, expected a name below its folder")
            return names
        # A name is the text matched by the stars, joined by slashes, because masks are found by it.
        stars = re.compile(re.escape(self._images).replace(r"\*", "([^/]*)"))
        paths = (path.relative_to(self.root).as_posix() for path in sorted(self.root.glob(self._images)))
        names = ["/".join(match.groups()) for path in paths if (match := stars.fullmatch(path))]
        return [name for name in names if "/." not in f"/{name}"]  # skip hidden files that some systems add

    def _image_path(self, name: str) -> Path:
        return self.root / _fill(self._images, name)

    def _mask_path(self, name: str) -> Path:
        return self.root / _fill(self.layout, name)

    def _check_missing(self, partial: bool) -> None:
        there = len(self.names) - len(set(self.missing))
        wrong = not partial and there not in self.spec.count
        if there == 0 or wrong or (self.missing and not partial):
            example = f", such as that of {self.missing[0]}" if self.missing else ""
            raise FileNotFoundError(
                f"data: {self.root} has {there} of the {self.spec.count[0]} images with masks of {self.spec.title}"
                f"{example}; {_expected(self.spec)}" + ("" if there == 0 else "; --partial accepts a part of them")
            )
        gone = set(self.missing)
        self.names = [x for x in self.names if x not in gone]

    def _other_ids(self) -> str:
        """Return the end of an error: the values belong to another of the dataset's mask files, or are unknown."""
        values = set(np.unique(np.concatenate([np.unique(self.values(i)) for i in range(min(len(self), 20))])).tolist())
        for other in self.spec.masks:
            if not np.array_equal(other.table, self.masks.table) and (other.table[list(values)] != UNKNOWN).all():
                return f"; they look like those of {other.path}"
        return "; expected labels in that layout"


def _find(spec: Spec, root: Path) -> tuple[Path, str, Masks]:
    """Find the folder, the images' pattern and the kind of masks; raises FileNotFoundError naming what is missing."""
    if not root.is_dir():
        raise FileNotFoundError(f"data: {root} is not a folder; {_expected(spec)}")
    lacks = None
    for base in (root / x for x in spec.roots):
        images = next((x for x in spec.images if _any(base, x)), None)
        there = [x for x in spec.masks if _any(base, x.path)]
        for masks in there:
            split = _split(spec, masks)
            if images and (split is None or (base / split).is_file()):
                return base, images, masks
        if images and lacks is None:
            what = _split(spec, there[0]) if there else _either([x.path for x in spec.masks])
            lacks = f"data: {base} has the images of {spec.title} but not {what}"
        elif there and lacks is None:
            lacks = f"data: {base} has the masks of {spec.title} but not {_either(spec.images)}"
    raise FileNotFoundError(f"{lacks or f'data: {root} has no {spec.title}'}; {_expected(spec)}")


def _split(spec: Spec, masks: Masks) -> str | None:
    """Return the list file of the images with such masks; None for a .json, which has its own list."""
    return None if masks.path.endswith(".json") else masks.split or spec.split


def _expected(spec: Spec) -> str:
    splits = [x for x in (_split(spec, masks) for masks in spec.masks) if x]
    split = f", {_either(splits)}" if splits else ""
    return f"expected {_either(spec.images)} with {_either([x.path for x in spec.masks])}{split}, from {spec.source}"


def _either(paths: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(paths))


def _any(base: Path, pattern: str) -> bool:
    return next(base.glob(pattern), None) is not None


def _fill(pattern: str, name: str) -> str:
    """Fill stars with the parts of a name: `a/*/*_b.png`, `x/y` -> a/x/y_b.png; one star takes the whole name."""
    for part in [name] if pattern.count("*") == 1 else name.split("/"):
        pattern = pattern.replace("*", part, 1)
    return pattern


def _few(values: list) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def read_picture(path: Path, formats: tuple[str, ...], use: Callable[[Image.Image], Content]) -> Content:
    """Open the image at `path` and return `use(image)`; raises ValueError naming a damaged or too large file."""
    try:
        with open_image(path, formats, MAX_PIXELS) as image:
            return use(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        known = isinstance(error, ValueError) or isinstance(error, OSError) and error.errno is not None
        reason = sentence(error) if known else "it is damaged or truncated"
        raise ValueError(f"data: cannot read {path}: {reason}") from error


def need_scipy(name: str) -> None:
    """Raise ValueError if scipy, which the labels of the dataset `name` need, is missing."""
    if importlib.util.find_spec("scipy") is None:
        raise ValueError(f"dataset: {name} stores its labels as Matlab files, which need scipy: pip install scipy")


def _read_label_map(path: Path) -> np.ndarray:
    """Read `LabelMap` of a Pascal Context file, [H, W]."""
    from scipy.io import loadmat, whosmat

    wrong = ""
    try:
        shapes = {name: shape for name, shape, _ in whosmat(str(path), appendmat=False)}
        if "LabelMap" not in shapes or len(shapes["LabelMap"]) != 2:
            wrong = f"it has {', '.join(shapes) or 'nothing'}, expected LabelMap of two dimensions"
        elif math.prod(shapes["LabelMap"]) > MAX_PIXELS:
            wrong = f"its LabelMap has {shapes['LabelMap']} pixels, expected at most {MAX_PIXELS:,}"
        else:
            values = loadmat(str(path), appendmat=False, variable_names=["LabelMap"])["LabelMap"]
            if values.dtype == np.uint16:
                return values
            wrong = f"its LabelMap is {values.dtype}, expected uint16"
    except FileNotFoundError:
        raise
    except Exception as error:  # on damaged bytes: TypeError, zlib.error, MatReadError, ...
        raise ValueError(f"data: cannot read {path}: it is no Matlab file, or it is damaged") from error
    raise ValueError(f"data: cannot read {path}: {wrong}")


class Region(TypedDict):
    size: list[int]
    counts: str


class _Detail:
    """Label masks from PASCAL in Detail's trainval_merged.json: run-length coded regions, drawn in their order."""

    def __init__(self, path: Path):
        try:
            data = json.loads(path.read_bytes())  # hundreds of megabytes, more than settings may have
            sizes = {x["image_id"]: (x["height"], x["width"]) for x in data["images"] if x["phase"] == "val"}
            self.names = sorted(Path(x["file_name"]).stem for x in data["images"] if x["phase"] == "val")
            self._ids = {Path(x["file_name"]).stem: x["image_id"] for x in data["images"] if x["phase"] == "val"}
            self._regions: dict[int, list] = {i: [] for i in sizes}
            for region in data["annos_segmentation"]:
                if region["image_id"] in sizes:
                    self._regions[region["image_id"]].append((region["category_id"], region["segmentation"]))
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else "it has other contents"
            raise ValueError(f"data: {path} is not the file of PASCAL in Detail: {reason}") from error
        for height, width in sizes.values():
            if not (type(height) is int and type(width) is int and 0 < height * width <= MAX_PIXELS):
                raise ValueError(
                    f"data: {path} has an image of {height} x {width}, expected at most {MAX_PIXELS:,} pixels"
                )
        self._path, self._sizes = path, sizes

    def values(self, name: str) -> np.ndarray:
        image = self._ids[name]
        values = np.zeros(self._sizes[image], np.uint16)
        for category, code in self._regions[image]:
            region = checked(code, Region, self._path, f"a region of {name}")
            if region["size"] != list(values.shape) or type(category) is not int or not 0 <= category < 2**16:
                raise ValueError(
                    f"data: a region of {name} has the size {region['size']} and the category {short(category)}, "
                    f"expected {list(values.shape)} and a number below 65,536"
                )
            values[decode_rle(region["counts"], *values.shape)] = category
        return values


def decode_rle(counts: str, height: int, width: int) -> np.ndarray:
    """Decode COCO's compressed run lengths to a bool mask [height, width]; columns first, runs of 0 and 1 in turn.

    A run is a base-32 number, lowest digit first. Each character is 48 + digit, + 32 if more follow; the last digit's
    fifth bit is the sign. From the fourth run on, the number is the difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for char in counts.encode():
        digit = char - 48
        value |= (digit & 31) << shift
        shift += 5
        if shift > 40:
            raise ValueError("data: a region's run lengths have a number of more than 40 bits")
        if not digit & 32:
            value -= (1 << shift) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"data: a region's run lengths do not make {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
