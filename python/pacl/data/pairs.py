"""Image-caption pairs with random access: csv files, folders, COCO captions and generated scenes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import impostor, visible_files
from .images import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from .raw import Raw, as_bytes, readable
from .samples import MOST_WORKERS, Samples
from .scene_shards import SceneMembers
from .scenes import PAIRS, SEEN
from .tables import read_rows, split_row, wrong_header


class Pairs(Samples):
    """Base of sources with numbered samples. With any `shuffle` above 0 an epoch is a permutation of all samples."""

    def __len__(self) -> int:
        raise NotImplementedError

    def get(self, index: int, epoch: int) -> Raw:
        """Return sample `index` with all its captions; the epoch decides which one training takes."""
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


class ListedPairs(Pairs):
    """Base of sources whose file lists paths and captions. All captions of a path are one sample.

    root: folder that the paths are relative to. A path outside it is a bad sample, but links are followed. Images come
    in the order of their first caption.
    """

    root: Path

    def hold(self, names: Sequence[bytes], captions: Sequence[bytes], faults: dict[int, tuple[str, str]]) -> None:
        """Keep a list of pairs. faults: reason and message of bad ones by index, each of which stays by itself."""
        first: dict[bytes, int] = {}
        owners = np.arange(len(names))
        for i, name in enumerate(names):
            if name and i not in faults:
                owners[i] = first.setdefault(name, i)
        order = np.argsort(owners, kind="stable")
        _, starts = np.unique(owners[order], return_index=True)
        self._faults = {int(new): faults[old] for new, old in enumerate(order[starts].tolist()) if old in faults}
        self._images = Strings(names[i] for i in order[starts])
        self._captions = Strings(captions[i] for i in order)
        self._starts = np.append(starts, len(names))

    def __len__(self) -> int:
        return len(self._images)

    def get(self, index: int, epoch: int) -> Raw:
        name = self._images[index]
        captions = [self._captions[i] for i in range(*self._starts[index : index + 2].tolist())]
        key, fault = name.decode(errors="replace"), self._faults.get(index)
        return Raw(key, below(self.root, os.fsdecode(name)), captions, epoch=epoch, fault=fault)


class CsvPairs(ListedPairs):
    """Rows of a csv or tsv file with a header, as open_clip reads them: an image's path and a caption of it.

    Rows with the same path are captions of one image. `tables.py` says how quotes and wrong numbers of fields are read.

    separator: default: tab or comma, whichever finds both columns in the header. image_key, caption_key: names of the
    columns. root: default: the file's folder. Raises ValueError if the columns are missing.
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
            header = file.readline().rstrip("\r\n")
            separators = ["\t", ","] if separator is None else [separator.replace("\\t", "\t")]
            if any(len(choice) != 1 for choice in separators):
                raise ValueError(f"csv_separator: got {separator!r}, expected one character, or \\t")
            found = [split_row(header, choice) for choice in separators]
            fitting = [i for i, names in enumerate(found) if {image_key, caption_key} <= set(names)]
            if not fitting:
                kind, keys = impostor(path, binary=False), (image_key, caption_key)
                raise ValueError(
                    f"csv_img_key, csv_caption_key: got {image_key!r} and {caption_key!r}, expected columns of {path}, "
                    f"but {f'it is {kind}' if kind else wrong_header(header, keys, separator)}"
                )
            columns = found[fitting[0]]
            names: list[bytes] = []
            captions: list[bytes] = []
            faults: dict[int, tuple[str, str]] = {}
            self._joined = 0
            places = columns.index(image_key), columns.index(caption_key)
            for row in read_rows(file, separators[fitting[0]], columns, *places):
                name, caption = row.values or (f"line {row.line}", "")
                if row.values is None:
                    fields = f"{row.fields} field" + "s" * (row.fields != 1)
                    faults[len(names)] = "row", f"line {row.line} has {fields}, expected {len(columns)}"
                names.append(os.fsencode(name))
                captions.append(os.fsencode(caption))
                self._joined += row.joined
        self.hold(names, captions, faults)

    def remarks(self) -> list[str]:
        counts = {
            "rows with separators that are not quoted, taken for a part of the caption": self._joined,
            "rows with too many or too few fields, left out": len(self._faults),
        }
        return [f"{what}: {count:,}" for what, count in counts.items() if count]


class FolderPairs(Pairs):
    """Images of a folder and its subfolders with texts beside them: `a/b.jpg`, `a/b.txt`, perhaps `a/b.mask.png`.

    Each line of a text is a caption. Hidden files and folders are left out. Raises ValueError for a folder without
    images.
    """

    def __init__(self, folder: str | os.PathLike, **options: Any):
        self.folder = Path(folder)
        super().__init__(str(folder), **options)
        paths = [os.path.relpath(path, self.folder) for path in visible_files(self.folder)]
        names = [path for path in paths if _is_image(path)]
        texts = {path[:-4] for path in paths if path.endswith(".txt")}
        if not names:
            raise ValueError(
                f"data: {folder} holds no image (.{', .'.join(IMAGE_SUFFIXES)}), expected images and .txt files"
            )
        self._images = Strings(os.fsencode(name) for name in sorted(names))
        alone = sorted(texts - {os.path.splitext(name)[0] for name in names})
        self._without = (
            sorted(name for name in names if os.path.splitext(name)[0] not in texts),
            [f"{stem}.txt" for stem in alone],
        )

    def remarks(self) -> list[str]:
        return [
            f"{what}: {len(names):,}, the first is {readable(names[0])}"
            for what, names in zip(("images without a .txt", ".txt files without an image"), self._without, strict=True)
            if names
        ]

    def __len__(self) -> int:
        return len(self._images)

    def get(self, index: int, epoch: int) -> Raw:
        name = os.fsdecode(self._images[index])
        image = self.folder / name
        mask = image.with_suffix(".mask.png")
        return Raw(readable(name), image, image.with_suffix(".txt"), mask if self.masks else None, epoch)


class CocoPairs(ListedPairs):
    """Images with several captions in the layout of torchvision's CocoCaptions: an annotation file, a folder of images.

    Karpathy's files (dataset_coco.json, dataset_flickr30k.json, ...) are read too: the images of `split`, with all
    their sentences.

    root: the folder of images, by default `X` for an annotation file captions_X.json, beside it or beside its folder,
    else the file's own. split: "train" (with "restval"), "val" or "test" of Karpathy's file, which needs it. An image
    without a caption is left out. Raises ValueError for any other file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        root: str | os.PathLike | None = None,
        split: str | None = None,
        **options: Any,
    ):
        path = Path(path)
        super().__init__(str(path), **options)
        if self.masks:
            raise ValueError(
                "masks: got True for COCO captions, expected False; only shards, folders and scenes have masks"
            )
        self.root = _coco_images(path) if root is None else Path(root)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            of_karpathy = "sentences" in content["images"][0] if content["images"] else False
            if of_karpathy:
                content = _karpathy(content, split)
            files = {image["id"]: str(image["file_name"]) for image in content["images"]}
            captions: dict[Any, list[str]] = {}
            for note in content["annotations"]:
                text = note["caption"] if isinstance(note["caption"], str) else ""  # a bad caption, which is counted
                captions.setdefault(note["image_id"], []).append(text)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            found = f"is {kind}" if (kind := impostor(path, binary=False)) else "is not COCO captions"
            raise ValueError(
                f"data: {path} {found}, expected `images` with id and file_name, and `annotations` with "
                "image_id and caption, or Karpathy's `images` with filename, split and sentences"
            ) from error
        if of_karpathy and split is None:
            raise ValueError(f"split: got none for {path}, which has Karpathy's splits; expected train, val or test")
        if split is not None and not of_karpathy:
            raise ValueError(f"split: got {split!r} for {path}, expected none; only Karpathy's files have splits")
        self._without = len(files.keys() - captions.keys()), sum(len(captions[i]) for i in captions.keys() - files)
        pairs = [(files[number], text) for number in files for text in captions.get(number, [])]
        if not pairs:
            raise ValueError(f"data: {path} has no caption of its images, expected at least one")
        self.hold([as_bytes(name) for name, _ in pairs], [as_bytes(text) for _, text in pairs], {})

    def remarks(self) -> list[str]:
        kinds = ("images without a caption, left out", "captions without an image, left out")
        return [f"{what}: {count:,}" for what, count in zip(kinds, self._without, strict=True) if count]


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
        return Raw(sample["__key__"], sample["jpg"], sample["txt"], sample.get("mask.png"), epoch)


def _karpathy(content: Any, split: str | None) -> dict[str, list[dict[str, Any]]]:
    """Return the images of a split, and their sentences, in the layout of COCO's captions."""
    splits = {"train": ("train", "restval")}.get(split or "", (split,))
    chosen = [image for image in content["images"] if split is None or image["split"] in splits]
    names = [os.path.join(image.get("filepath", ""), image["filename"]) for image in chosen]
    return {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "caption": sentence["raw"]} for i, x in enumerate(chosen) for sentence in x["sentences"]
        ],
    }


def below(root: Path, name: str) -> Path | str:
    """Return the path of `name` below `root`, or a string: the reason why it may not be read."""
    path = os.path.normpath(os.path.join(root, name))  # join ignores `root` if the name is absolute
    inside = os.path.relpath(path, root).split(os.sep)[0] not in (os.pardir, os.curdir)
    if not name or "\0" in name or not inside:
        return f"{name!r} is not a path below {root}"
    return Path(path)


def _is_image(path: str) -> bool:
    """Return True for a path with the suffix of an image; formats that are not read are counted on decoding."""
    stem, suffix = os.path.splitext(path.lower())
    return suffix[1:] in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES) and not stem.endswith(".mask")


def _coco_images(path: Path) -> Path:
    match = re.fullmatch(r"captions_(.+)\.json", path.name)
    places = [path.parent / match[1], path.parent.parent / match[1]] if match else []
    return next((place for place in places if place.is_dir()), path.parent)


class Strings:
    """Byte strings in one bytes object, whose pages forked workers share; the reference counts of a list would copy
    them.
    """

    def __init__(self, strings: Iterable[bytes]):
        parts = list(strings)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._data = b"".join(parts)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return self._data[self._ends[index - 1] if index else 0 : self._ends[index]]
