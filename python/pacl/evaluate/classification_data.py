"""Images with one class each: torchvision's datasets, ImageNet, a folder per class, clip-benchmark's tar files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torchvision.datasets as tv
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.archives import members
from ..data.images import IMAGE_SUFFIXES, read_image, to_rgb
from ..failures import sentence
from ..segment.prompts import read_classes
from .segmentation_data import MAX_PIXELS, need_scipy
from .specs import fingerprint, spread


@dataclass(frozen=True)
class Kind:
    """A kind of dataset. layout: files expected below the root; count: official number of images, None if any."""

    title: str
    layout: str
    open: Callable[[Path], Any]  # must be picklable
    count: int | None = None


class Labelled(Dataset):
    """Images with a class each: `data[i]` is a transformed image and its class, an int.

    name: a key of KINDS. root: the folder of the dataset's files. class_file: other names, one class per line in label
    order, with synonyms separated by commas. partial: accept a number of images other than the official one. limit: use
    this many images only, spread evenly. `synonyms` are the words for each class, `templates` those of the dataset or
    None. Raises FileNotFoundError, in one line, for missing files, and ValueError for unexpected content.
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
        if name not in KINDS:
            raise ValueError(f"dataset: got {name!r}, expected one of {', '.join(KINDS)}")
        if name in MATLAB:
            need_scipy(name)
        self.name, self.kind = name, KINDS[name]
        self.transform: Any = None  # from a PIL image to a tensor; set before reading
        expected = f"expected {self.kind.layout} ({self.kind.title})"
        try:
            self.images = self.kind.open(Path(root))
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(f"data_root: {root} does not hold a complete {name}; {expected}") from error
        found = len(self.images)
        if found != self.kind.count and self.kind.count is not None and not partial or not found:
            raise FileNotFoundError(
                f"data_root: {root} has {found} of the {self.kind.count or 'images'} images of {name}; {expected}"
                + ("; --partial accepts a part of them" if found else "")
            )
        names = self.images.classes
        if name == "imagenet":
            names = open_clip.IMAGENET_CLASSNAMES
        self.synonyms = [[x if name == "imagenet" else spoken(x, name)] for x in names]
        if class_file is not None:
            self.synonyms = read_classes(class_file, "class_file")
            if len(self.synonyms) != len(names):
                raise ValueError(f"class_file: {class_file} has {len(self.synonyms)} classes, expected {len(names)}")
        self.class_hash = fingerprint(self.synonyms)
        self.templates: tuple[str, ...] | None = getattr(self.images, "templates", None)
        self._chosen = spread(found, limit)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = self.images[self._chosen[i]]
        return self.transform(to_rgb(image)), int(label)


def spoken(name: str, dataset: str = "") -> str:
    """Turn a class name into words: commas would separate synonyms, and names of files and folders lack spaces."""
    if dataset == "eurosat":
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return " ".join(re.sub(r"[_/,]+", " ", name).split())


class Folder(tv.ImageFolder):
    """A folder per class, named like the class and in sorted order; only the formats of data/images.py are decoded."""

    def __init__(self, root: Path):
        super().__init__(str(root), loader=_rgb, is_valid_file=_is_image)


class ImageNet(Folder):
    """ImageNet's validation images in 1,000 folders n01440764, ..., in the root or in its `val`."""

    def __init__(self, root: Path):
        super().__init__(root / "val" if (root / "val").is_dir() else root)
        strange = [name for name in self.classes if not re.fullmatch(r"n\d{8}", name)]
        if strange or len(self.classes) != 1000:
            raise FileNotFoundError(f"{root} has {len(self.classes)} folders, expected the 1,000 WordNet ids")


class Caltech101(Folder):
    """Caltech-101 without BACKGROUND_Google, which is not a class; torchvision's own reader needs scipy."""

    def __init__(self, root: Path):
        super().__init__(root / "caltech101/101_ObjectCategories")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if name != "BACKGROUND_Google"]
        return names, {name: i for i, name in enumerate(names)}


class Tars:
    """clip-benchmark's layout: `test/*.tar` with an image and a .cls each, classnames.txt, and templates with {c}.

    Headers are read once and images on access. A label is a decimal number; nothing is unpickled.
    """

    def __init__(self, root: Path):
        self.classes = _lines(root / "classnames.txt")
        templates = root / "zeroshot_classification_templates.txt"
        self.templates = tuple(x.replace("{c}", "{}") for x in _lines(templates)) if templates.is_file() else None
        if self.templates and not all("{}" in x for x in self.templates):
            raise ValueError(f"data_root: {templates} has a line without {{c}}, expected it where the class goes")
        self._places: list[tuple[Path, int, int, int]] = []
        for path in sorted((root / "test").glob("*.tar")):
            self._index(path)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, offset, size, label = self._places[i]
        with open(path, "rb") as file:
            file.seek(offset)
            try:
                return read_image(file.read(size), MAX_PIXELS), label
            except Exception as error:  # decoders raise anything on damaged bytes
                raise ValueError(
                    f"data_root: cannot read the image at byte {offset} of {path}: {sentence(error)}"
                ) from error

    def _index(self, path: Path) -> None:
        images, labels = {}, {}

        def refuse(error: Exception) -> None:
            raise ValueError(f"data_root: {path} cannot be read: {sentence(error)}") from error

        for member in members(path, refuse, compressed=False):
            folder, _, file = member.name.rpartition("/")
            stem, _, suffix = file.partition(".")
            key, suffix = f"{folder}/{stem}", suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                images[key] = member.offset, member.size
            elif suffix == "cls":
                text = member.read().decode(errors="replace").strip() if member.size <= 32 else "a long text"
                if not text.isdecimal() or int(text) >= len(self.classes):
                    raise ValueError(
                        f"data_root: {member.name} of {path} has {text!r}, expected 0 to {len(self.classes) - 1}"
                    )
                labels[key] = int(text)
        odd = sorted(images.keys() ^ labels.keys())
        if odd:
            raise ValueError(f"data_root: {odd[0].lstrip('/')} of {path} lacks its image or its .cls, expected both")
        self._places += [(path, *images[key], labels[key]) for key in images]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower()[1:] in IMAGE_SUFFIXES


def _rgb(path: str) -> Image.Image:
    """Read an image. A named function, because worker processes may receive the dataset pickled."""
    try:
        return read_image(Path(path), MAX_PIXELS)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise ValueError(f"data: cannot read {path}: {sentence(error)}") from error


MATLAB = ("flowers102", "cars")
# torchvision's own splits and class lists. Its CIFAR files are pickles; it reads them only if their digests match.
KINDS = {
    "imagenet": Kind(
        "ILSVRC2012 val (image-net.org)", "val/n01440764/*.JPEG, a folder per WordNet id", ImageNet, 50_000
    ),
    "cifar10": Kind(
        "CIFAR-10 python version (Krizhevsky)", "cifar-10-batches-py", partial(tv.CIFAR10, train=False), 10_000
    ),
    "cifar100": Kind(
        "CIFAR-100 python version (Krizhevsky)", "cifar-100-python", partial(tv.CIFAR100, train=False), 10_000
    ),
    "food101": Kind(
        "Food-101 (ETH Zurich)", "food-101/images and food-101/meta", partial(tv.Food101, split="test"), 25_250
    ),
    "caltech101": Kind("Caltech-101", "caltech101/101_ObjectCategories", Caltech101, 8_677),
    "dtd": Kind("Describable Textures (Oxford VGG)", "dtd/dtd/images and labels", partial(tv.DTD, split="test"), 1_880),
    "eurosat": Kind("EuroSAT RGB", "eurosat/2750, a folder per class", partial(tv.EuroSAT), 27_000),
    "flowers102": Kind(
        "Flowers-102 (Oxford VGG)", "flowers-102/jpg and its .mat files", partial(tv.Flowers102, split="test"), 6_149
    ),
    "pets": Kind(
        "Oxford-IIIT Pet", "oxford-iiit-pet/images and annotations", partial(tv.OxfordIIITPet, split="test"), 3_669
    ),
    "cars": Kind(
        "Stanford Cars",
        "stanford_cars/cars_test, devkit and cars_test_annos_withlabels.mat",
        partial(tv.StanfordCars, split="test"),
        8_041,
    ),
    "sun397": Kind("SUN397 (Princeton)", "SUN397/ClassName.txt and folders", partial(tv.SUN397), 108_754),
    "stl10": Kind("STL-10 (Stanford)", "stl10_binary", partial(tv.STL10, split="test"), 8_000),
    "folder": Kind("your own", "a folder of images per class", Folder),
    "wds": Kind("clip-benchmark's layout", "classnames.txt and test/*.tar with .cls", Tars),
}
