"""Options of `pacl look`, `pacl segment` and `pacl serve`. This module does not import torch, so `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..data.images import MAX_IMAGE_PIXELS
from ..flags import Tokens
from .draw import SCALE

MODEL = tyro.conf.create_mutex_group(required=True, title="model")
CLASSES = tyro.conf.create_mutex_group(required=True, title="classes")


def _scale(words: list[str]) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in words[0].split(","))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise ValueError(f"got {words[0]!r}, expected two increasing numbers with a comma between")
    return low, high


Scale = Annotated[
    tuple[float, float],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="LOW,HIGH",
        instance_from_str=_scale,
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda scale: [",".join(map(str, scale))],
    ),
]


@dataclass(frozen=True, kw_only=True)
class SegmenterOptions:
    """The model and how it embeds images and words."""

    checkpoint: Annotated[str | None, MODEL] = None
    """Folder of a run of pacl train or pacl demo, or of an embedder, or a name on the Hub."""
    model: Annotated[str | None, MODEL] = None
    """Name of an open_clip model, for plain CLIP instead of a checkpoint."""
    pretrained: str | None = None
    """Weights of the open_clip model: a tag or a file."""
    tokens: Tokens | None = None
    """Reading of the patch tokens. Default: the one that the checkpoint was trained on; without a checkpoint the one
    with the best published maps."""
    proxy: str | None = None
    """Second tower of proxy tokens, a timm model. Default: vit_base_patch16_224.dino."""
    text_model: Path | None = None
    """Folder of a text encoder of transformers or sentence-transformers, made for the images of --model."""
    templates: str = "simple"
    """Prompt templates for the words: none, photo, simple, openai, or a file with one per line."""
    stride: int = 1
    """Tokens per patch along each side; it must divide the patch size."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Skip images with more pixels than this."""
    device: str = "auto"
    """Device to run on: cpu, cuda, ...; auto takes a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class ImagesOptions(SegmenterOptions):
    """Options shared by `pacl look` and `pacl segment`."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders, which are searched with their subfolders."""
    words: Annotated[str | None, CLASSES] = None
    """Classes, separated by commas: "dog,grass,red ball"."""
    classes: Annotated[Path | None, CLASSES] = None
    """File with one class per line; commas separate its synonyms."""
    short_side: int | None = None
    """Resize images so that their shorter side has this many pixels, by default the model's size."""
    window: int | None = None
    """Side of a sliding window in pixels; by default there is no window."""
    window_stride: int | None = None
    """Distance between windows in pixels, by default half a window."""
    threshold: float | None = None
    """Label a pixel background if its best cosine is below this."""
    entropy: float | None = None
    """Label a pixel background if its softmax over the classes has a higher entropy; the paper uses 1.5."""
    logit_scale: float = 100.0
    """Scale of the cosines in the softmax of --entropy."""


@dataclass(frozen=True, kw_only=True)
class LookOptions(ImagesOptions):
    """Show where an image matches words: write an overlay with the best word of every pixel, and one map per word on a
    fixed colour scale. Print cosines and shares of pixels.
    """

    scale: Scale = SCALE
    """Cosines of the darkest and the brightest colour."""
    out: Path = Path("pacl-look")
    """Folder for the pictures."""


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(ImagesOptions):
    """Segment images zero-shot: write an overlay, a label map (palette PNG) and scores (JSON) per image. Labels number
    the classes from 0, in their order; with --threshold or --entropy, 0 is background and classes begin at 1. Files
    named as videos give an overlay video, a label map per frame, and shares of the pixels (CSV).
    """

    video: bool = False
    """Take the images of each folder as the frames of one video."""
    temporal: float = 0.7
    """Share of the earlier frames in the scores of a video's patches that they resemble; 0 takes each frame alone."""
    fps: float = 25.0
    """Frames per second of a folder, with --video."""
    out: Path = Path("pacl-segment")
    """Folder for the results."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(SegmenterOptions):
    """Serve a page on this machine: drop an image, type words and see where they are, or click a patch to find similar
    ones; compare PACL with plain CLIP. The page loads nothing from elsewhere; only the printed address opens it.
    """

    port: int = 8000
    """Port of the page; 0 takes any free one."""
    examples: Path | None = None
    """Folder of images that the page offers as examples, searched with its subfolders."""
    browser: bool = True
    """Open the page in a browser; --no-browser only prints the address."""
