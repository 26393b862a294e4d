"""Images of different sizes in a batch, for vision towers of variable resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
import torchvision.transforms as transforms
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as pixels


class FitPatches:
    """Resize a PIL image so that at most `most` whole patches cover it, with its aspect ratio kept up to rounding.

    The convention is NaFlex's: the image takes the largest scale, up or down, at which at most `most` patches cover it,
    and each side is then stretched to whole patches.

    patch: height and width of a patch in pixels. most: largest number of patches. interpolation: torchvision's mode.
    """

    def __init__(self, patch: tuple[int, int], most: int, interpolation: Any = pixels.InterpolationMode.BICUBIC):
        self.patch, self.most, self.interpolation = patch, most, interpolation

    def size(self, image: Image.Image) -> tuple[int, int]:
        """Return the height and the width in pixels that `image` is resized to."""
        (high, wide), (height, width) = self.patch, (image.height, image.width)
        rows, columns = _grid(height * wide, width * high, self.most)
        return rows * high, columns * wide

    def __call__(self, image: Image.Image) -> Image.Image:
        return pixels.resize(image, list(self.size(image)), self.interpolation)

    def __repr__(self) -> str:
        return f"FitPatches(patch={self.patch}, most={self.most})"


def fitting(transform: Any, patch: tuple[int, int], most: int) -> transforms.Compose:
    """Return the transform of a tower with FitPatches in place of its own resizing and cropping.

    Interpolation, mean and standard deviation stay those of `transform`.
    """
    steps = transform.transforms
    normalise = next(step for step in steps if isinstance(step, transforms.Normalize))
    mode = next((step.interpolation for step in steps if hasattr(step, "interpolation")), None)
    resize = FitPatches(patch, most) if mode is None else FitPatches(patch, most, mode)
    return transforms.Compose([resize, transforms.ToTensor(), normalise])


def find_fit(transform: Any) -> FitPatches | None:
    """Return the FitPatches step of a transform, None without one."""
    return next((step for step in getattr(transform, "transforms", []) if isinstance(step, FitPatches)), None)


def join_images(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Take images of different sizes out of the samples of a batch; return {} and leave them if their sizes are equal.

    Returns "image", the pixels of all images [C, H, W] in one dimension, and "size" [B, 3]. One tensor takes one file
    descriptor on its way from a data reader, a list of tensors one for each.
    """
    if len({getattr(sample.get("image"), "shape", None) for sample in samples}) == 1:
        return {}
    images = [sample.pop("image") for sample in samples]
    sizes = torch.tensor([image.shape for image in images])
    return {"image": torch.cat([image.flatten() for image in images]), "size": sizes}


def moved(images: Any, device: torch.device | str) -> Any:
    """Return a tensor, or each of a list of tensors, on a device."""
    if isinstance(images, Tensor):
        return images.to(device, non_blocking=True)
    return [image.to(device, non_blocking=True) for image in images]


def images_of(batch: dict[str, Any]) -> Tensor | list[Tensor]:
    """Return the images of a batch: [B, C, H, W], or a list of [C, H, W] that join_images joined."""
    images = batch["image"]
    if "size" not in batch:
        return images
    sizes = batch["size"].tolist()
    parts = images.split([math.prod(size) for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def split_patches(patches: Tensor, lengths: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the patches of `size` images at a time, with their lengths: rows of [B, N, D], or of packed [sum of N, D].

    lengths: int64 [B] of packed patches, None for others.
    """
    if lengths is None:
        yield from ((part, None) for part in patches.split(size))
        return
    counts = lengths.split(size)
    yield from zip(patches.split([int(x.sum()) for x in counts]), counts, strict=True)


def _grid(height: int, width: int, most: int) -> tuple[int, int]:
    """Return the most rows and columns of unit squares, at most `most` squares, that an image fills when it is scaled.

    It fills `ceil(s * height)` rows and `ceil(s * width)` columns at the scale s; the largest s reaches the end of a
    row or of a column.
    """

    def fill(rows: int) -> tuple[Fraction, int, int]:
        columns = most // rows
        if rows * width <= columns * height:
            return Fraction(rows, height), rows, -(-rows * width // height)
        return Fraction(columns, width), -(-columns * height // width), columns

    # With more rows than in a grid of the image's own ratio the columns decide, and they become fewer.
    _, rows, columns = max(fill(rows) for rows in range(1, min(most, math.isqrt(most * height // width) + 1) + 1))
    return rows, columns
