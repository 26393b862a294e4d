"""Generated scenes as shards, with the usual .jpg and .txt members and, on request, exact masks."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from webdataset import TarWriter

from ..files import atomic_writer
from .scenes import PAIRS, Scene, draw_scene

SPLITS = ("train", "eval")  # the order matters: a scene's seed includes the index of its split
Members = dict[str, Any]  # the members of one sample, by extension: str or bytes


def encode_scene(scene: Scene, key: str, *, mask: bool) -> Members:
    """Return the members of one sample: JPEG (quality 95, no chroma subsampling), caption, and the mask as PNG."""
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
    """Dataset of the scenes of a split, each as the members of its sample. Every scene has its own random state."""

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


def shard_sizes(count: int, most: int) -> list[int]:
    """Return the sizes of as few shards as hold `count` samples, at most `most` each; they differ by 1 at most."""
    shards = -(-count // most)
    return [count // shards + (i < count % shards) for i in range(shards)]


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

    split: "train" or "eval", which never share a scene. workers: processes that draw, 0 for this one; the bytes do not
    depend on it. progress: called once per scene. Returns the shards' paths.
    """
    drawn = SceneMembers(split, count, seed, pairs, masks)
    # Workers start here, because processes forked within atomic_writer would hold its lock.
    batches = iter(DataLoader(drawn, batch_size=50, collate_fn=list, num_workers=workers))
    samples = (sample for batch in batches for sample in batch)
    paths: list[Path] = []
    for size in shard_sizes(count, shard_size):
        path = folder / f"{split}-{len(paths):03d}.tar"
        with atomic_writer(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for _ in range(size):
                tar.write(next(samples))
                progress()
        paths.append(path)
    return paths
