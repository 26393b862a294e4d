"""The flags of `pacl compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class CompareConfig:
    """Training runs, embedders and results of pacl evaluate side by side, in one HTML page that needs no network."""

    entries: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of pacl train or pacl demo, embedder folders, and JSON files of pacl evaluate or folders of them."""
    images: Path | None = None
    """An image or a folder of some, to be segmented by every embedder; needs --words."""
    words: str | None = None
    """Classes, with commas between: "dog,grass,red ball"."""
    templates: str = "simple"
    """Prompt templates of the words: none, photo, simple or openai, or a file."""
    stride: int = 1
    """Tokens per patch along each side."""
    most_images: int = 12
    """Images at most, spread over the folder."""
    max_image_pixels: int = 25_000_000
    """Larger images are left out."""
    device: str = "auto"
    out: Path = Path("compare.html")
