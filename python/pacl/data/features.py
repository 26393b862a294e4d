"""Tokens and text embeddings of frozen towers, written by `pacl features` and read back as a source of pairs.

A folder holds features-00000.safetensors, ...; manifest.json; and, with nouns, prompts.safetensors. A shard has tokens
[n, N, width], texts [m, D] in float32 (all captions of all images), and keys and captions as JSON in the bytes
`records`; record i ends before ends[i]. So a sample is read from mapped memory without the rest of its shard.
With --max-patches the tokens are packed, [sum of N, width]; those of image i end before token_ends[i].
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..annotations import checked
from ..embedder import DescribedTowers
from ..failures import StoreError
from ..files import write_bytes
from ..remote import Location, RemotePath, location, look_up
from ..settings import Damaged, read_settings
from ..sharing import check_described, check_towers, load_tower
from ..stores import AT_ONCE, Store
from ..tensors import announce, announced, open_tensors, read_ahead
from ..towers import Towers
from ..weights import check_digest
from .feature_rows import fetch_image, fetch_texts, read_records, read_tokens
from .pairs import Pairs
from .samples import captions_of
from .texts import PROMPTS

TOWERS = "model pretrained vision_model vision_pretrained text_model force_image_size max_patches tokens proxy".split()
MANIFEST, NOUNS = "manifest.json", "prompts.safetensors"
# Most images whose tokens and records are on their way from a store to a reader; as many wait there for their texts. On
# a disk so many are announced.
AHEAD = 32
AHEAD_BYTES = 2**25  # the most bytes of so many


class Record(NamedTuple):
    """An image's key, its captions of this epoch, and the rows of their embeddings in the shard."""

    key: str
    captions: list[str]
    texts: list[int]


class Shard(TypedDict):
    name: str
    bytes: int
    count: int


class _Plan(TypedDict):
    model: str
    pretrained: str | None
    vision_model: str | None
    vision_pretrained: bool
    force_image_size: int | None
    nouns: Literal["words", "nltk"] | None


class Plan(_Plan, total=False):
    max_patches: int  # absent if all images have the same number of patches


class _Begun(TypedDict):
    complete: bool
    plan: Plan
    shards: list[Shard]


class Manifest(_Begun, total=False):
    """Contents of manifest.json. images: number of samples of the source. sha256: digests by file name. Earlier
    versions have neither. The rest is written last.
    """

    images: int

    nouns: list[str]
    towers: DescribedTowers
    sha256: dict[str, str]


class Features(Pairs):
    """Features that `pacl features` wrote to `folder`, in an order by (seed, epoch) as in other numbered sources.

    nouns: the finder of `pacl train --nouns`, whose prompts must be among the stored texts. Yields dicts: key, origin,
    caption (one of several, by epoch) and text [D] float32, or captions (list) and texts [n, D] (in a batch those of
    all its images), tokens [N, width] as stored, worker and place. Packed features also have length, which is N; a
    batch then has the tokens of all its images [sum of N, width]. Raises ValueError for an incomplete folder and for
    damaged files. verify: read all files once and compare their SHA-256 with the manifest, shared among the processes
    of a machine; files of earlier versions have none. store: the way to read a folder at an address of s3://, gs://,
    hf:// or https://, whose images come in the same order; a store that fails raises StoreError.
    """

    def __init__(
        self,
        folder: str | os.PathLike | RemotePath,
        *,
        nouns: str | None = None,
        verify: bool = True,
        store: Store | None = None,
        **options: Any,
    ):
        super().__init__(str(folder), **options)
        self.folder = location(folder, store)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(f"features: {folder} is incomplete, expected one that `pacl features` has finished")
        check_described(self.manifest["towers"], self.folder / MANIFEST)
        self.paths = [self.folder / shard["name"] for shard in self.manifest["shards"]]
        look_up(self.paths)  # in a store, all reads must come from these objects
        self._check_files(verify)
        stored = self.manifest["plan"]["nouns"]
        if nouns is not None and nouns != stored:
            raise ValueError(f"nouns: got {nouns!r}, expected {stored!r}, with which {folder} was written")
        self.ends = list(accumulate(shard["count"] for shard in self.manifest["shards"]))
        self.prompts: dict[str, Tensor] = {}
        if nouns is not None:
            texts = [prompt.format(noun) for noun in self.manifest["nouns"] for prompt in PROMPTS]
            self.prompts = dict(zip(texts, self._read_prompts(len(texts)), strict=True))

    def _check_files(self, verify: bool) -> None:
        """Check the headers of all files, and the digests of this process's share of those on this machine."""
        first, step = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        digests = self.manifest.get("sha256", {}) if verify else {}

        def check(number: int) -> None:
            path = self.paths[number]
            if number % step == first % step:
                check_digest(path, digests)
            _check_header(path, self.manifest["shards"][number]["count"], packed=self.packed)

        for _ in _many(self.folder, check, range(len(self.paths))):
            pass

    @property
    def packed(self) -> bool:
        """True if images have different numbers of patches."""
        return "max_patches" in self.manifest["plan"]

    def _read_prompts(self, count: int) -> Tensor:
        path = self.folder / NOUNS
        check_digest(path, self.manifest.get("sha256", {}))
        try:
            with open_tensors(path) as file:
                texts = file.get_tensor("texts")
        except SafetensorError as error:
            raise Damaged(path, "it does not hold the texts of the prompts") from error
        if texts.ndim != 2 or len(texts) != count or texts.dtype != torch.float32 or not texts.isfinite().all():
            raise Damaged(path, f"its texts are not {count:,} rows of finite float32 numbers")
        return texts

    def load_random(self, towers: Towers) -> None:
        """Load the towers that had random weights when they computed the features; `pacl features` keeps them."""
        for name in self.manifest["towers"].get("random", []):
            load_tower(towers, name, self.folder, self.manifest.get("sha256", {}))

    def check(self, towers: Towers) -> None:
        """Raise ValueError unless `towers` are those that computed the features."""
        try:
            check_towers(self.manifest["towers"], towers)
        except ValueError as error:
            raise ValueError(f"features: {self.folder} has features of other towers; {error}") from error

    def __len__(self) -> int:
        return self.ends[-1]

    # mypy: here an undecoded sample is its index and epoch, not a Raw, because decode reads everything.
    def get(self, index: int, epoch: int) -> tuple[int, int]:  # type: ignore[override]
        return index, epoch

    def decode(self, raw: tuple[int, int], worker: int = 0) -> dict[str, Any]:  # type: ignore[override]
        return self._sample(raw, self._record(raw))

    def _record(self, raw: tuple[int, int]) -> Record:
        """Return the record of an image; if it is in a store, also begin to read its texts."""
        path, row = self._place(raw[0])
        with _damage(path, row):
            shard = _open(path)
            record = read_records(shard, row, row + 1)[0]
            turns = self.turns(record["captions"], raw[1], record["key"])
            captions, texts = [record["captions"][turn] for turn in turns], [record["text"] + turn for turn in turns]
            if isinstance(path, RemotePath):
                fetch_texts(shard, texts)
            return Record(record["key"], captions, texts)

    def _sample(self, raw: tuple[int, int], record: Record) -> dict[str, Any]:
        path, row = self._place(raw[0])
        with _damage(path, row):
            shard = _open(path)
            texts = torch.cat([shard.get_slice("texts")[text : text + 1] for text in record.texts])
            one = self.captions == "one"
            return {
                "key": record.key,
                "origin": f"{path.name} {row}",
                **({"caption": record.captions[0]} if one else {"captions": record.captions}),
                **read_tokens(shard, row, packed=self.packed),
                **({"text": texts[0]} if one else {"texts": texts}),
            }

    def _place(self, index: int) -> tuple[Location, int]:
        """Return the file of an image, and its row there."""
        number = bisect.bisect_right(self.ends, index)
        return self.paths[number], index - (self.ends[number - 1] if number else 0)

    # mypy: see `get`.
    def decoded(self, raws: Iterator[Any], worker: int) -> Iterator[dict[str, Any] | None]:
        if isinstance(self.folder, RemotePath):
            return self._fetched(raws)
        return super().decoded(announced(raws, self._announce, AHEAD), worker)

    def _fetched(self, raws: Iterator[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Yield the images of a store. Those that come next are under way: tokens and records, and then their texts."""
        image = sum(shard["bytes"] for shard in self.manifest["shards"]) // len(self)
        ahead = min(AHEAD, AHEAD_BYTES // image)
        shards = set()

        def fetch(raw: tuple[int, int]) -> None:
            path, row = self._place(raw[0])
            with contextlib.suppress(StoreError, Damaged), _damage(path, row):  # who reads the image says what is wrong
                shards.add(shard := _open(path))
                fetch_image(shard, row, packed=self.packed)

        def learn(raw: tuple[int, int]) -> tuple[tuple[int, int], Record | Exception]:
            try:
                return raw, self._record(raw)
            except (StoreError, Damaged) as error:  # raised when it is the turn of this image
                return raw, error

        known = map(learn, announced(raws, fetch, ahead))
        try:
            for raw, record in announced(known, lambda item: None, ahead):
                if isinstance(record, Exception):
                    raise record
                yield self._sample(raw, record)
        finally:
            for shard in shards:
                shard.forget()

    # mypy: see `get`.
    def _announce(self, raw: Any) -> None:
        path, row = self._place(raw[0])
        if isinstance(path, Path):
            announce(path, row)

    def embeddings(self, batch: dict[str, Any], texts: list[str]) -> Tensor:
        """Return embeddings [K, D] of `texts`: each is a caption of the batch, in order, or a prompt with its noun."""
        embedded = batch["texts" if "texts" in batch else "text"].clone()
        for i, (text, caption) in enumerate(zip(texts, sum(captions_of(batch), []), strict=True)):
            if text != caption:
                if text not in self.prompts:
                    raise ValueError(f"features: {self.folder} has no embedding of {text!r}; it has other nouns")
                embedded[i] = self.prompts[text]
        return embedded


def write_shard(
    folder: Location,
    number: int,
    tokens: Sequence[Tensor],
    texts: Tensor,
    records: list[dict],
    *,
    packed: bool = False,
) -> None:
    """Write one shard atomically.

    tokens: [N, width] of each image; packed: False if N is the same for all. texts: [m, D]. records: for each image
    key, captions and text (row of its first caption in `texts`).
    """
    lines = [json.dumps(record).encode() for record in records]
    tensors = {
        "tokens": torch.cat(list(tokens)) if packed else torch.stack(list(tokens)),
        "texts": texts,
        "records": torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8),
        "ends": torch.from_numpy(np.cumsum([len(line) for line in lines])),
    }
    if packed:
        tensors["token_ends"] = torch.tensor([len(x) for x in tokens]).cumsum(0)
    write_bytes(folder / _name(number), save(tensors))


def _name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def shard_files(folder: Location) -> list[Shard]:
    """Return name, size in bytes and count of each shard of `folder`; raise ValueError for a damaged one."""
    shards: list[Shard] = []
    paths: list[Location] = [*folder.glob("features-*.safetensors")]
    for path in sorted(paths, key=lambda path: (len(path.name), path.name)):
        try:
            with open_tensors(path) as shard:
                count = shard.get_slice("ends").get_shape()[0]
        except SafetensorError as error:
            raise ValueError(
                f"out: {path} is damaged: it is not a whole safetensors file; delete it, and the same command writes "
                "it again"
            ) from error
        shards.append({"name": path.name, "bytes": path.stat().st_size, "count": count})
    return shards


def missing_shards(folder: Location, count: int) -> list[int]:
    """Return the numbers below `count` of which `folder` has no shard.

    Raises ValueError for a damaged shard, and for one with a number from `count` on.
    """
    there = {shard["name"] for shard in shard_files(folder)}
    wanted = {_name(number): number for number in range(count)}
    if more := sorted(there - wanted.keys()):
        raise ValueError(f"out: {folder} has {more[0]}, expected at most {count:,} files; choose another folder")
    return [number for name, number in wanted.items() if name not in there]


def stored_records(folder: Location) -> Iterator[dict[str, Any]]:
    """Yield the records of all shards."""
    for file in shard_files(folder):
        with open_tensors(folder / file["name"]) as shard:
            yield from read_records(shard, 0, file["count"])


def tower_names(folder: Location) -> dict[str, Any]:
    """Return the flags of `pacl train` for the towers whose features are in `folder`."""
    plan: Mapping[str, Any] = read_manifest(folder)["plan"]
    later = {"tokens": plan.get("tokens", "plain"), "random_towers": plan.get("random_towers", False)}
    return {name: plan.get(name) for name in TOWERS} | later


def digested_files(manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the files whose SHA-256 a complete manifest states."""
    names = [shard["name"] for shard in manifest["shards"]] + [NOUNS] * ("nouns" in manifest)
    return names + [f"{name}.safetensors" for name in manifest["towers"].get("random", [])]


def write_manifest(folder: Location, manifest: dict[str, Any]) -> None:
    """Write manifest.json; a complete one, which has `sha256`, with the SHA-256 of its own other values, too."""
    if manifest["complete"]:
        manifest = manifest | {"sha256": manifest["sha256"] | {MANIFEST: _own_digest(manifest)}}
    write_bytes(folder / MANIFEST, json.dumps(manifest, indent=2).encode())


def _own_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all values of a manifest but this one."""
    others = {name: digest for name, digest in manifest.get("sha256", {}).items() if name != MANIFEST}
    return hashlib.sha256(json.dumps({**manifest, "sha256": others}, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Location) -> Manifest:
    """Read manifest.json of a folder of features and check it against the files' names and sizes.

    Raises ValueError for another folder, a damaged manifest, and files that are missing or of another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"features: {folder} has no {MANIFEST} of `pacl features`")
    manifest: Manifest = checked(read_settings(path), Manifest, path)
    names = [shard["name"] for shard in manifest["shards"]]
    paths = {name: folder / name for name in names if "/" not in name}
    look_up(paths.values())
    for shard in manifest["shards"]:
        name, size = shard["name"], shard["bytes"]
        if not re.fullmatch(r"features-\d+\.safetensors", name):  # never read outside the folder
            raise ValueError(f"features: {path} names {name!r}, expected features-00000.safetensors, ...")
        if not paths[name].is_file() or paths[name].stat().st_size != size:
            raise ValueError(
                f"features: {folder / name} is missing or does not have {size:,} bytes; copy it or write it again"
            )
        if shard["count"] < 1:
            raise Damaged(path, f"{name} has a count of {shard['count']}, expected at least 1")
    if manifest["complete"]:
        if not manifest["shards"]:
            raise ValueError(f"features: {folder} holds no shard, expected at least one")
        if "towers" not in manifest or manifest["plan"]["nouns"] and "nouns" not in manifest:
            raise Damaged(path, "its towers or nouns are missing")
        if manifest.get("sha256", {}).get(MANIFEST, _own_digest(manifest)) != _own_digest(manifest):
            raise Damaged(path, "its values do not have the SHA-256 that it states")
    return manifest


def _check_header(path: Location, count: int, *, packed: bool) -> None:
    """Raise Damaged unless the header of a shard states the tensors of write_shard for `count` images.

    Raises ValueError for a shard of the other kind, packed or not, than the manifest states.
    """
    try:
        # A header from a store is kept: reading the images needs it.
        with _open(path) if isinstance(path, RemotePath) else open_tensors(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            found = {name: (part.get_dtype(), len(part.get_shape())) for name, part in parts.items()}
    except SafetensorError as error:
        raise Damaged(path, "it is not a whole safetensors file") from error
    expected = {"texts": ("F32", 2), "records": ("U8", 1), "ends": ("I64", 1)}
    tokens, token_ends = found.pop("tokens", ("", 0)), found.pop("token_ends", None)
    is_packed = token_ends is not None
    wrong = found != expected or tokens[0] not in ("F32", "F16", "BF16")
    if wrong or (tokens[1], token_ends) != ((2, ("I64", 1)) if is_packed else (3, None)):
        raise Damaged(path, "its tensors have other names or types than those of `pacl features`")
    if is_packed != packed:
        kinds = {True: "a number of patches for each image (--max-patches)", False: "one number of patches"}
        raise ValueError(f"features: {path} has {kinds[is_packed]}, expected {kinds[packed]} in all files")
    lengths = {parts[name].get_shape()[0] for name in ("token_ends" if packed else "tokens", "ends")}
    if lengths != {count}:
        raise Damaged(path, f"it has {min(lengths):,} images, expected {count:,}")


@contextlib.contextmanager
def _damage(path: Location, row: int) -> Iterator[None]:
    """Raise Damaged for any error but the store's: bytes that were not compared with their SHA-256 may cause all."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise Damaged(path, f"the record of its image {row:,} cannot be read") from error


@cache
def _open(path: Location) -> Any:
    """Open a shard once per process and keep it open; mapped pages take no memory of their own."""
    return open_tensors(path).__enter__()


def _many(folder: Location, function: Callable[[int], None], numbers: Iterable[int]) -> Iterator[None]:
    """Call a function with each number; for a store, whose answers take time, many at once."""
    if not isinstance(folder, RemotePath):
        return map(function, numbers)
    return read_ahead(function, numbers, AT_ONCE)
