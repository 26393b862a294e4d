"""Scenes as shards: the same .jpg and .txt members that anybody's data has, plus exact masks where asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from ..files import atomic_writer
from .scenes import PAIRS, Scene, draw_scene

SPLITS = ("train", "eval")  # their order is part of what a seed means


def encode_scene(scene: Scene, key: str, *, mask: bool) -> dict[str, str | bytes]:
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


def write_scenes(
    folder: Path,
    split: str,
    count: int,
    *,
    seed: int,
    pairs: tuple[tuple[str, str], ...] = PAIRS,
    masks: bool = False,
    shard_size: int = 1000,
    progress: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Write `count` scenes as `folder/split-000.tar`, ...; the same arguments give the same bytes.

    split: "train" or "eval", which never share a scene. progress: called once per scene. Returns the shards' paths.
    """
    paths = []
    for start in range(0, count, shard_size):
        path = folder / f"{split}-{len(paths):03d}.tar"
        with atomic_writer(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for index in range(start, min(start + shard_size, count)):
                scene = draw_scene(np.random.default_rng([seed, SPLITS.index(split), index]), pairs)
                tar.write(encode_scene(scene, f"{split}-{index:06d}", mask=masks))
                progress()
        paths.append(path)
    return paths
