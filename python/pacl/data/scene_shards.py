"""Scenes as shards: the same .jpg and .txt members that anybody's data has, plus exact masks where asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from webdataset import TarWriter

from ..files import atomic_writer
from .scenes import PAIRS, Scene, draw_scene

SPLITS = ("train", "eval")  # their order is part of what a seed means
Members = dict[str, str | bytes]  # of one sample, by extension


def encode_scene(scene: Scene, key: str, *, mask: bool) -> Members:
    """Members of one sample: JPEG (quality 95, no chroma subsampling), caption, and the mask as PNG."""
    jpeg = io.BytesIO()
    # Subsampled chroma would smear 2-pixel stripes into their neighbours.
    Image.fromarray(scene.image).save(jpeg, "JPEG", quality=95, subsampling=0)
    sample = {"__key__": key, "jpg": jpeg.getvalue(), "txt": scene.caption.encode()}
    if mask:
        png = io.BytesIO()
        Image.fromarray(scene.mask).save(png, "PNG")
        sample["mask.png"] = png.getvalue()
    return sample


@dataclass
class SceneMembers(Dataset[Members]):
    """Scene `index` of a split as the members of its sample; each has a random state of its own."""

    split: str
    count: int
    seed: int = 0
    pairs: tuple[tuple[str, str], ...] = PAIRS
    masks: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Members:
        scene = draw_scene(np.random.default_rng([self.seed, SPLITS.index(self.split), index]), self.pairs)
        return encode_scene(scene, f"{self.split}-{index:06d}", mask=self.masks)


def write_scenes(
    folder: Path,
    split: str,
    count: int,
    *,
    seed: int,
    pairs: tuple[tuple[str, str], ...] = PAIRS,
    masks: bool = False,
    shard_size: int = 1000,
    workers: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Write `count` scenes as `folder/split-000.tar`, ...; the same arguments give the same bytes.

    split: "train" or "eval", which never share a scene. workers: processes that draw, 0 for this one; any number
    writes the same. progress: called once per scene. Returns the shards' paths.
    """
    drawn = SceneMembers(split, count, seed, pairs, masks)
    batches = DataLoader(drawn, batch_size=50, collate_fn=list, num_workers=workers)
    samples = (sample for batch in batches for sample in batch)
    paths = []
    for start in range(0, count, shard_size):
        path = folder / f"{split}-{len(paths):03d}.tar"
        with atomic_writer(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for _ in range(start, min(start + shard_size, count)):
                tar.write(next(samples))
                progress()
        paths.append(path)
    return paths
