"""Options of `pacl compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class CompareConfig:
    """Show training runs, embedders and results of pacl evaluate side by side, in one HTML page that needs no
    network.
    """

    entries: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of pacl train or pacl demo, embedder folders, JSON files of pacl evaluate, or folders of such files."""
    images: Path | None = None
    """Image, or folder that is searched with its subfolders, that every embedder segments; needs --words."""
    words: str | None = None
    """Classes, separated by commas: "dog,grass,red ball"."""
    templates: str = "simple"
    """Prompt templates for the words: none, photo, simple, openai, or a file with one per line."""
    stride: int = 1
    """Tokens per patch along each side; it must divide the patch size."""
    most_images: int = 12
    """Show at most this many images, spread over the folder."""
    max_image_pixels: int = 25_000_000
    """Skip images with more pixels than this."""
    device: str = "auto"
    """Device to run on: cpu, cuda, ...; auto takes a GPU if there is one."""
    out: Path = Path("compare.html")
    """Path of the page."""
