"""Image-caption pairs with random access: csv files, folders, COCO captions and generated scenes."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .images import IMAGE_SUFFIXES
from .samples import MOST_WORKERS, Raw, Samples, as_bytes, readable
from .scene_shards import SceneMembers
from .scenes import PAIRS, SEEN


class Pairs(Samples):
    """Base of sources with numbered samples. With any `shuffle` above 0 an epoch is a permutation of all samples."""

    def __len__(self) -> int:
        raise NotImplementedError

    def get(self, index: int, epoch: int) -> Raw:
        """Return sample `index`; if its image has several captions, with the one of this epoch."""
        raise NotImplementedError

    @property
    def most_workers(self) -> int:
        return max(1, min(MOST_WORKERS, len(self) // self.world))

    def count(self) -> int:
        return len(self)

    def undecoded(self, epoch: int, worker: int, workers: int, start: int = 0) -> Iterator[Raw]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self)) if self.shuffle else range(len(self))
        for index in order[self.rank * workers + worker :: self.world * workers][start:]:
            yield self.get(int(index), epoch)

    def spread(self, count: int) -> Iterator[Raw]:
        for index in np.linspace(0, len(self) - 1, min(count, len(self))).astype(int):
            yield self.get(int(index), 0)


class CsvPairs(Pairs):
    """Rows of a csv or tsv file with a header, as open_clip reads them: an image's path and its caption.

    separator: default: tab or comma, whichever finds both columns in the header. image_key, caption_key: names of the
    columns. root: folder that paths are relative to, by default the file's; a path outside it is a bad sample, but
    links are followed. Raises ValueError if the columns are missing or the file is not a csv.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        separator: str | None = None,
        image_key: str = "filepath",
        caption_key: str = "title",
        root: str | os.PathLike | None = None,
        **options: Any,
    ):
        path = Path(path)
        super().__init__(str(path), **options)
        if self.masks:
            raise ValueError("masks: got True for a csv, expected False; only shards, folders and scenes have masks")
        self.root = path.parent if root is None else Path(root)
        # surrogateescape passes bytes that are not UTF-8 on to the check of the caption.
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            header = file.readline()
            separators = ["\t", ","] if separator is None else [separator.replace("\\t", "\t")]
            if any(len(choice) != 1 for choice in separators):
                raise ValueError(f"csv_separator: got {separator!r}, expected one character, or \\t")
            columns = [next(csv.reader([header], delimiter=choice), []) for choice in separators]
            fitting = [i for i, names in enumerate(columns) if {image_key, caption_key} <= set(names)]
            if not fitting:
                found = max(columns, key=len)
                raise ValueError(
                    f"csv_img_key, csv_caption_key: got {image_key!r} and {caption_key!r}, expected columns of {path}: "
                    f"{', '.join(found)[:200] or 'it has none'}"
                )
            first, second = (columns[fitting[0]].index(key) for key in (image_key, caption_key))
            rows = csv.reader(file, delimiter=separators[fitting[0]])
            names, captions = [], []
            try:
                for row in filter(None, rows):
                    whole = len(row) > max(first, second)
                    names.append(row[first] if whole else "")
                    captions.append(row[second] if whole else "")
            except csv.Error as error:
                raise ValueError(f"data: {path} is not a csv from line {rows.line_num + 1} on: {error}") from error
        self._images, self._captions = _Strings(names), _Strings(captions)

    def __len__(self) -> int:
        return len(self._images)

    def get(self, index: int, epoch: int) -> Raw:
        name = self._images[index]
        return Raw(name.decode(errors="replace"), below(self.root, os.fsdecode(name)), self._captions[index])


class FolderPairs(Pairs):
    """Images of a folder and its subfolders with captions beside them: `a/b.jpg`, `a/b.txt`, perhaps `a/b.mask.png`.

    Hidden files and folders are left out. Raises ValueError for a folder without images.
    """

    def __init__(self, folder: str | os.PathLike, **options: Any):
        self.folder = Path(folder)
        super().__init__(str(folder), **options)
        names = []
        walked = set()  # links are followed, each folder once
        for parent, folders, files in os.walk(self.folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in walked:
                folders.clear()
                continue
            walked.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names += [os.path.relpath(os.path.join(parent, name), self.folder) for name in files if _is_image(name)]
        if not names:
            raise ValueError(
                f"data: {folder} holds no image (.{', .'.join(IMAGE_SUFFIXES)}), expected images and .txt files"
            )
        self._images = _Strings(sorted(names))

    def __len__(self) -> int:
        return len(self._images)

    def get(self, index: int, epoch: int) -> Raw:
        name = os.fsdecode(self._images[index])
        image = self.folder / name
        mask = image.with_suffix(".mask.png")
        return Raw(readable(name), image, image.with_suffix(".txt"), mask if self.masks else None)


class CocoPairs(Pairs):
    """Images with several captions in the layout of torchvision's CocoCaptions: an annotation file, a folder of images.

    An image is one sample; each epoch takes one of its captions, without `shuffle` always the first. root: the folder
    of images, by default `X` for an annotation file captions_X.json, beside it or beside its folder, else the file's
    own. An image without a caption is left out. Raises ValueError for any other file.
    """

    def __init__(self, path: str | os.PathLike, *, root: str | os.PathLike | None = None, **options: Any):
        path = Path(path)
        super().__init__(str(path), **options)
        if self.masks:
            raise ValueError(
                "masks: got True for COCO captions, expected False; only shards, folders and scenes have masks"
            )
        self.root = _coco_images(path) if root is None else Path(root)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            captions: dict[int, list[str]] = {}
            for note in content["annotations"]:
                captions.setdefault(note["image_id"], []).append(str(note["caption"]))
            chosen = [number for number in names if number in captions]
            self._images = _Strings([names[number] for number in chosen])
            self._captions = _Strings([json.dumps(captions[number]) for number in chosen])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"[:120]
            raise ValueError(
                f"data: {path} is not COCO captions, expected `images` with file_name and `annotations` with caption "
                f"({reason})"
            ) from error

    def __len__(self) -> int:
        return len(self._images)

    def get(self, index: int, epoch: int) -> Raw:
        name, captions = self._images[index].decode(errors="replace"), json.loads(self._captions[index])
        chosen = as_bytes(captions[self.turn(captions, epoch, name)])
        return Raw(name, below(self.root, name), chosen, captions=captions)


class ScenePairs(Pairs):
    """Generated scenes, drawn on access. They are those of write_scenes with seed 0; `seed` only changes their order.

    split: "train", in which some pairs of colour and pattern never occur, or "eval", which has all pairs and no scene
    of "train".
    """

    def __init__(self, split: str = "train", scenes: int = 10_000, **options: Any):
        super().__init__("generated scenes", **options)
        self._members = SceneMembers(split, scenes, 0, SEEN if split == "train" else PAIRS, self.masks)

    def __len__(self) -> int:
        return len(self._members)

    def get(self, index: int, epoch: int) -> Raw:
        sample = self._members[index]
        return Raw(sample["__key__"], sample["jpg"], sample["txt"], sample.get("mask.png"))


def below(root: Path, name: str) -> Path | str:
    """Return the path of `name` below `root`, or a string: the reason why it may not be read."""
    path = os.path.normpath(os.path.join(root, name))  # join ignores `root` if the name is absolute
    inside = os.path.relpath(path, root).split(os.sep)[0] not in (os.pardir, os.curdir)
    if not name or "\0" in name or not inside:
        return f"{name!r} is not a path below {root}"
    return Path(path)


def _is_image(name: str) -> bool:
    stem, _, suffix = name.lower().rpartition(".")
    return bool(stem) and suffix in IMAGE_SUFFIXES and not name.startswith(".") and not stem.endswith(".mask")


def _coco_images(path: Path) -> Path:
    match = re.fullmatch(r"captions_(.+)\.json", path.name)
    places = [path.parent / match[1], path.parent.parent / match[1]] if match else []
    return next((place for place in places if place.is_dir()), path.parent)


class _Strings:
    """Many strings in one bytes object, whose pages forked workers share; the reference counts of a list would copy
    them.
    """

    def __init__(self, strings: Iterable[str]):
        parts = [os.fsencode(text) for text in strings]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._data = b"".join(parts)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return self._data[self._ends[index - 1] if index else 0 : self._ends[index]]
