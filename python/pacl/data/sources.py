"""Open pairs in any of the supported formats."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any, get_args

from ..remote import RemotePath, is_remote
from ..remote import location as place_of
from ..stores import Store
from . import Kind
from .pairs import CocoPairs, CsvPairs, FolderPairs, ScenePairs
from .samples import Samples
from .scene_shards import SPLITS
from .shards import Shards, check_finished, split_names

TARS = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")  # suffixes of shards
FORMS = "shards (.tar), a folder of images with .txt files, a .csv or .tsv, or COCO's captions (.json)"
CONVERT = "write its paths and captions as columns filepath and title of a .csv: pandas.{}({!r}).to_csv('pairs.csv')"
# Forms of pairs that are known and not read, by suffix: how to convert them.
OTHERS = {
    ".parquet": CONVERT.format("read_parquet", "pairs.parquet"),
    ".jsonl": CONVERT.format("read_json", "pairs.jsonl").replace("')", "', lines=True)", 1),
    ".txt": "write its paths and captions below the line `filepath<tab>title` of a .tsv",
}


def open_pairs(
    location: str | os.PathLike | RemotePath,
    *,
    kind: Kind = "auto",
    resampled: bool = False,
    csv_separator: str | None = None,
    csv_img_key: str = "filepath",
    csv_caption_key: str = "title",
    image_root: str | os.PathLike | None = None,
    split: str | None = None,
    scenes: int = 10_000,
    store: Store | None = None,
    **options: Any,
) -> Samples:
    """Open the pairs at `location`. Their format is `kind`, or with "auto" inferred from the name.

    webdataset: .tar shards (see Shards) or a folder of them, `resampled` or not; csv: a .csv or .tsv file; folder:
    images with .txt files beside them; coco: an annotation .json; synthetic: `synthetic`, or `synthetic:eval`.
    image_root: folder of the images of csv and coco. split: "train", "val" or "test" of Karpathy's .json. scenes:
    number of generated scenes. store: how shards at an address of s3://, gs://, hf:// or https:// are read. options:
    those of Samples.

    Raises ValueError or FileNotFoundError, one line, for any other location.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"dataset_type: got {kind!r}, expected one of {', '.join(get_args(Kind))}")
    if any(map(is_remote, split_names(location))):
        if kind not in ("auto", "webdataset"):
            raise ValueError(f"dataset_type: got {kind} for an address, expected webdataset; stores hold shards alone")
        return Shards(_remote_shards(str(location), store), resampled=resampled, store=store, **options)
    assert not isinstance(location, RemotePath)
    path = Path(location)
    check_finished(path)
    if kind == "auto":
        kind = _kind(os.fspath(location), path)
    if resampled and kind != "webdataset":
        raise ValueError(f"dataset_resampled: got True for {kind}, expected webdataset; only shards can be resampled")
    if split is not None and kind != "coco":
        raise ValueError(f"split: got {split!r} for {kind}, expected none; only Karpathy's .json files have splits")
    if kind == "webdataset":
        shards = sorted(path.glob("*.tar")) if path.is_dir() else location
        return Shards(shards, resampled=resampled, **options)
    if kind == "synthetic":
        name, _, split = os.fspath(location).partition(":")
        if name != "synthetic" or split not in ("", *SPLITS):
            raise ValueError(f"data: got {os.fspath(location)!r}, expected synthetic, synthetic:train, synthetic:eval")
        return ScenePairs(split or "train", scenes, **options)
    if image_root is not None and not Path(image_root).is_dir():
        raise FileNotFoundError(f"image_root: {os.fspath(image_root)!r} is not a folder, expected one of images")
    if kind == "folder":
        if not path.is_dir():
            raise FileNotFoundError(f"data: {os.fspath(location)!r} is not a folder, expected one of images")
        return FolderPairs(path, **options)
    if not path.is_file():
        raise FileNotFoundError(f"data: {os.fspath(location)!r} is not a file, expected a {kind} file")
    if kind == "coco":
        return CocoPairs(path, root=image_root, split=split, **options)
    keys = {"image_key": csv_img_key, "caption_key": csv_caption_key}
    return CsvPairs(path, separator=csv_separator, root=image_root, **keys, **options)


def _remote_shards(location: str, store: Store | None) -> str | list[RemotePath]:
    """Return the shards in a folder of a store; shards that are named stay as they are."""
    if "::" in location or location.lower().endswith(TARS):
        return location
    folder = place_of(location, store)
    assert isinstance(folder, RemotePath)
    check_finished(folder)
    if not (shards := folder.glob("*.tar")):
        raise FileNotFoundError(f"data: {folder} holds no .tar file, expected the address of shards or of their folder")
    return shards


def _kind(location: str, path: Path) -> Kind:
    if path.is_dir():
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    if location.split(":")[0] == "synthetic":
        return "synthetic"
    kinds: dict[str, Kind] = {".csv": "csv", ".tsv": "csv", ".json": "coco"}
    suffix = path.suffix.lower()
    if suffix in OTHERS:
        raise ValueError(f"data: got {location!r}, which is not read, expected {FORMS}; {OTHERS[suffix]}")
    if suffix not in (*kinds, *TARS) and path.is_file() and not tarfile.is_tarfile(path):
        raise ValueError(f"data: got {location!r}, expected {FORMS}")
    return kinds.get(suffix, "webdataset")
