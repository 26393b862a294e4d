"""Tokens and text embeddings of frozen towers, written by `pacl features` and read back as a source of pairs.

A folder holds features-00000.safetensors, ...; manifest.json; and, with nouns, prompts.safetensors. A shard has tokens
[n, N, width], texts [m, D] in float32 (all captions of all images), and keys and captions as JSON in the bytes
`records`; record i ends before ends[i]. So a sample is read from mapped memory without the rest of its shard.
"""

from __future__ import annotations

import bisect
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..files import write_bytes
from ..sharing import check_towers, load_tower
from ..towers import Towers
from .pairs import Pairs
from .texts import PROMPTS

TOWERS = "model pretrained vision_model vision_pretrained force_image_size".split()
MANIFEST, NOUNS = "manifest.json", "prompts.safetensors"


class Features(Pairs):
    """Features that `pacl features` wrote to `folder`, in an order by (seed, epoch) as in other numbered sources.

    nouns: the finder of `pacl train --nouns`, whose prompts must be among the stored texts. Yields dicts: key, caption
    (one of several, by epoch), tokens [N, width] as stored, text [D] float32, worker and place. Raises ValueError for
    an incomplete folder.
    """

    def __init__(self, folder: str | os.PathLike, *, nouns: str | None = None, **options: Any):
        super().__init__(str(folder), **options)
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(f"features: {folder} is incomplete, expected one that `pacl features` has finished")
        stored = self.manifest["plan"]["nouns"]
        if nouns is not None and nouns != stored:
            raise ValueError(f"nouns: got {nouns!r}, expected {stored!r}, with which {folder} was written")
        self.ends = list(accumulate(shard["count"] for shard in self.manifest["shards"]))
        self.prompts: dict[str, Tensor] = {}
        if nouns is not None:
            texts = [prompt.format(noun) for noun in self.manifest["nouns"] for prompt in PROMPTS]
            self.prompts = dict(zip(texts, load_file(self.folder / NOUNS)["texts"], strict=True))

    def load_random(self, towers: Towers) -> None:
        """Load the towers that had random weights when they computed the features; `pacl features` keeps them."""
        for name in self.manifest["towers"].get("random", []):
            load_tower(towers, name, self.folder)

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
        index, epoch = raw
        number = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        shard = _open(str(self.folder / self.manifest["shards"][number]["name"]))
        record = read_records(shard, row, row + 1)[0]
        turn = self.turn(record["captions"], epoch, record["key"])
        text = record["text"] + turn
        return {
            "key": record["key"],
            "caption": record["captions"][turn],
            "tokens": shard.get_slice("tokens")[row : row + 1][0],
            "text": shard.get_slice("texts")[text : text + 1][0],
        }

    def embeddings(self, batch: dict[str, Any], texts: list[str]) -> Tensor:
        """Return embeddings [B, D] of `texts`: each is its sample's caption or a prompt with a noun of it."""
        embedded = batch["text"].clone()
        for i, (text, caption) in enumerate(zip(texts, batch["caption"], strict=True)):
            if text != caption:
                if text not in self.prompts:
                    raise ValueError(f"features: {self.folder} has no embedding of {text!r}; it has other nouns")
                embedded[i] = self.prompts[text]
        return embedded


def write_shard(
    folder: Path, number: int, tokens: Tensor, texts: Tensor, records: list[dict], state: dict[str, Any]
) -> None:
    """Write one shard atomically.

    tokens: [n, N, width]. texts: [m, D]. records: for each image key, captions, text (row of its first caption in
    `texts`) and place (the worker that read it, and its index there). state: that of the loader before the batch of
    the last record; see last_place.
    """
    lines = [json.dumps(record).encode() for record in records]
    tensors = {
        "tokens": tokens,
        "texts": texts,
        "records": torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8),
        "ends": torch.from_numpy(np.cumsum([len(line) for line in lines])),
    }
    write_bytes(folder / _name(number), save(tensors, {"state": json.dumps(state)}))


def last_place(folder: Path, shards: int) -> tuple[dict[str, Any], tuple[int, int]] | None:
    """Return how far the first `shards` shards go, None for no shard.

    That is the state of the loader before the batch of the last stored image, and the place of this image: the worker
    that read it, and its index there. Raises ValueError for a shard without this state.
    """
    if not shards:
        return None
    path = folder / _name(shards - 1)
    with safe_open(path, "pt") as shard:
        count = shard.get_slice("ends").get_shape()[0]
        worker, index = read_records(shard, count - 1, count)[0]["place"]
        try:
            return json.loads((shard.metadata() or {})["state"]), (worker, index)
        except (KeyError, ValueError) as error:
            raise ValueError(f"out: {path} does not say how to go on after it; choose another folder") from error


def read_records(shard: safe_open, start: int, end: int) -> list[dict]:
    """Return records `start` to `end` of an open shard."""
    ends = shard.get_slice("ends")[max(0, start - 1) : end].tolist()
    ends = ends if start else [0, *ends]
    data = bytes(shard.get_slice("records")[ends[0] : ends[-1]].numpy())
    return [json.loads(data[a - ends[0] : b - ends[0]]) for a, b in zip(ends, ends[1:], strict=False)]


def _name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def shard_files(folder: Path) -> list[dict[str, Any]]:
    """Return name, size in bytes and count of each shard of `folder`; raise ValueError for a damaged or missing one."""
    shards = []
    for path in sorted(folder.glob("features-*.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                count = shard.get_slice("ends").get_shape()[0]
        except SafetensorError as error:
            raise ValueError(f"out: {path} is damaged ({error}); delete it and all later shards") from error
        shards.append({"name": path.name, "bytes": path.stat().st_size, "count": count})
        if path.name != _name(len(shards) - 1):
            raise ValueError(f"out: {folder} has {path.name} without the shard before it; choose another folder")
    return shards


def stored_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of all shards."""
    for file in shard_files(folder):
        with safe_open(folder / file["name"], "pt") as shard:
            yield from read_records(shard, 0, file["count"])


def tower_names(folder: Path) -> dict[str, Any]:
    """Return the flags of `pacl train` for the towers whose features are in `folder`."""
    plan = read_manifest(folder)["plan"]
    return {name: plan[name] for name in TOWERS} | {"random_towers": plan.get("random_towers", False)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json of a folder of features and check it against the files; raise ValueError for other folders."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        shards = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
        complete, _ = manifest["complete"], manifest["plan"]["nouns"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"features: {folder} has no {MANIFEST} of `pacl features`") from error
    for name, size in shards.items():
        if not re.fullmatch(r"features-\d+\.safetensors", name):  # never read outside the folder
            raise ValueError(f"features: {folder / MANIFEST} names {name!r}, expected features-00000.safetensors, ...")
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"features: {path} is missing or does not have {size:,} bytes; copy it or write it again")
    if complete and not shards:
        raise ValueError(f"features: {folder} holds no shard, expected at least one")
    return manifest


@cache
def _open(path: str) -> safe_open:
    """Open a shard once per process and keep it open; mapped pages take no memory of their own."""
    return safe_open(path, "pt").__enter__()
