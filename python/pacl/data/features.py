"""Tokens and text embeddings of frozen towers, computed once by `pacl features`, and read back as a source of pairs.

A folder holds features-00000.safetensors, ...; manifest.json; and with nouns prompts.safetensors. A shard has tokens
[n, N, width], texts [m, D] in float32 (every caption of an image), and keys and captions as JSON in records (bytes), of
which record i ends before ends[i]. So a sample is read, out of mapped memory, without the rest of its shard.
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
from ..sharing import check_towers
from ..towers import Towers
from .pairs import Pairs
from .texts import PROMPTS

TOWERS = "model pretrained vision_model vision_pretrained force_image_size".split()
MANIFEST, NOUNS = "manifest.json", "prompts.safetensors"


class Features(Pairs):
    """What `pacl features` left in `folder`, in the order that other numbered sources have: by (seed, epoch).

    nouns: the finder of `pacl train --nouns`, whose prompts must be among the stored texts. Yields dicts: key, caption
    (of several the one whose turn it is), tokens [N, width] as stored, text [D] float32, and place. Raises ValueError
    for a folder that is not whole.
    """

    def __init__(self, folder: str | os.PathLike, *, nouns: str | None = None, **options):
        super().__init__(str(folder), **options)
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(f"features: {folder} is not finished, expected one on which pacl features has ended")
        if nouns is not None and nouns != self.manifest["plan"]["nouns"]:
            raise ValueError(f"nouns: got {nouns!r}, but {folder} was written with {self.manifest['plan']['nouns']!r}")
        self.ends = list(accumulate(shard["count"] for shard in self.manifest["shards"]))
        self.prompts = {}
        if nouns is not None:
            texts = [prompt.format(noun) for noun in self.manifest["nouns"] for prompt in PROMPTS]
            self.prompts = dict(zip(texts, load_file(self.folder / NOUNS)["texts"], strict=True))

    def check(self, towers: Towers) -> None:
        """ValueError unless `towers` are those that the features are of."""
        try:
            check_towers(self.manifest["towers"], towers)
        except ValueError as error:
            raise ValueError(f"features: {self.folder} has those of others; {error}") from error

    def __len__(self) -> int:
        return self.ends[-1]

    def get(self, index: int, epoch: int) -> tuple[int, int]:
        return index, epoch  # there is nothing undecoded

    def decode(self, raw: tuple[int, int], worker: int = 0) -> dict[str, Any]:
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
        """Embeddings [B, D] of `texts`, each its sample's caption or a noun in a prompt."""
        embedded = batch["text"].clone()
        for i, (text, caption) in enumerate(zip(texts, batch["caption"], strict=True)):
            if text != caption:
                if text not in self.prompts:
                    raise ValueError(f"features: {self.folder} has no embedding of {text!r}; its nouns are other ones")
                embedded[i] = self.prompts[text]
        return embedded


def write_shard(folder: Path, number: int, tokens: Tensor, texts: Tensor, records: list[dict]) -> None:
    """One file, whole or not at all; records: key, captions, text, the row of texts that is the first's,
    and place, the worker that read the image and its number there."""
    lines = [json.dumps(record).encode() for record in records]
    tensors = {
        "tokens": tokens,
        "texts": texts,
        "records": torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8),
        "ends": torch.from_numpy(np.cumsum([len(line) for line in lines])),
    }
    write_bytes(folder / f"features-{number:05d}.safetensors", save(tensors))


def read_records(shard, start: int, end: int) -> list[dict]:
    """Records `start` to `end` of an open shard."""
    ends = shard.get_slice("ends")[max(0, start - 1) : end].tolist()
    ends = ends if start else [0, *ends]
    data = bytes(shard.get_slice("records")[ends[0] : ends[-1]].numpy())
    return [json.loads(data[a - ends[0] : b - ends[0]]) for a, b in zip(ends, ends[1:], strict=False)]


def shard_files(folder: Path) -> list[dict[str, Any]]:
    """Name, size in bytes and count of each shard of `folder`; ValueError if one is missing between them."""
    shards = []
    for path in sorted(folder.glob("features-*.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                count = shard.get_slice("ends").get_shape()[0]
        except SafetensorError as error:
            raise ValueError(f"out: {path} is not whole ({error}); delete it and those after it") from error
        shards.append({"name": path.name, "bytes": path.stat().st_size, "count": count})
        if path.name != f"features-{len(shards) - 1:05d}.safetensors":
            raise ValueError(f"out: {folder} has {path.name} without the one before it; choose another folder")
    return shards


def stored_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Records of all shards."""
    for file in shard_files(folder):
        with safe_open(folder / file["name"], "pt") as shard:
            yield from read_records(shard, 0, file["count"])


def tower_names(folder: Path) -> dict[str, Any]:
    """Arguments of load_towers for the towers whose features are in `folder`."""
    plan = read_manifest(folder)["plan"]
    return {name: plan[name] for name in TOWERS}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a folder of features, checked against the files; ValueError for another folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        shards = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
        complete, _ = manifest["complete"], manifest["plan"]["nouns"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"features: {folder} has no {MANIFEST} that pacl features wrote") from error
    for name, size in shards.items():
        if not re.fullmatch(r"features-\d+\.safetensors", name):  # nothing outside the folder
            raise ValueError(f"features: {folder / MANIFEST} names {name!r}, expected features-00000.safetensors, ...")
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"features: {path} is missing or not of {size:,} bytes; copy it again or write it anew")
    if complete and not shards:
        raise ValueError(f"features: {folder} holds no shard")
    return manifest


@cache
def _open(path: str):
    """Kept open, once a process: what is mapped takes no memory of its own."""
    return safe_open(path, "pt").__enter__()
