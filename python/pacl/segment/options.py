"""Options of `pacl look`, `pacl segment` and `pacl serve`. Nothing here imports torch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..data.images import MAX_IMAGE_PIXELS
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
    """An embedder that pacl train or pacl demo wrote, or one on the Hub."""
    model: Annotated[str | None, MODEL] = None
    """Plain CLIP alone: an open_clip model."""
    pretrained: str | None = None
    """The open_clip model's weights, a tag or a file."""
    templates: str = "simple"
    """Prompt templates of the words: none, photo, simple or openai, or a file."""
    stride: int = 1
    """Tokens per patch along each side."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Larger images are left out."""
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ImagesOptions(SegmenterOptions):
    """What `pacl look` and `pacl segment` share."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files, or folders of images."""
    words: Annotated[str | None, CLASSES] = None
    """Classes with commas between: "dog,grass,red ball"."""
    classes: Annotated[Path | None, CLASSES] = None
    """A file with one class per line, synonyms separated by commas."""
    short_side: int | None = None
    """Pixels of the resized image's shorter side; default: the model's."""
    window: int | None = None
    """Pixels of a sliding window's side; default: no window."""
    window_stride: int | None = None
    """Pixels between windows; default: half a window."""
    threshold: float | None = None
    """Background is where no cosine reaches it."""
    entropy: float | None = None
    """Background is where the softmax over the classes has more entropy; the paper: 1.5."""
    logit_scale: float = 100.0
    """Scale of the cosines in that softmax."""


@dataclass(frozen=True, kw_only=True)
class LookOptions(ImagesOptions):
    """Where in an image is what the words say: the best word of every pixel as an overlay, and one map per word on a
    fixed colour scale. Cosines and shares of pixels are printed."""

    scale: Scale = SCALE
    """Cosines from dark to bright."""
    out: Path = Path("pacl-look")
    """Folder of the pictures."""


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(ImagesOptions):
    """Zero-shot segmentation: an overlay, a label map (palette PNG) and scores (JSON) per image. Labels are numbers of
    lines of the class file from 0; with --threshold or --entropy, 0 is background and classes begin at 1."""

    out: Path = Path("pacl-segment")
    """Folder of the results."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(SegmenterOptions):
    """A page on this machine: drop an image, type words, and see where they are, or click a patch for those like it;
    plain CLIP beside PACL. Nothing is loaded from elsewhere, and only the printed address is answered."""

    port: int = 8000
    """Port of the page; 0: any that is free."""
    examples: Path | None = None
    """Folder of images that the page offers."""
    browser: bool = True
    """Open the page in a browser; --no-browser prints the address only."""
