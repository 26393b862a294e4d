"""The flags that say how pairs are read, the same for every command that reads some."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import Kind
from .images import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from .samples import Samples


@dataclass(frozen=True, kw_only=True)
class PairFlags:
    """Base of a command's flags: the options of open_pairs that depend on the form of the data."""

    dataset_type: Kind = "auto"
    csv_separator: str | None = None
    """Without it, the one of tab and comma that finds both columns in the header."""
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    image_root: Path | None = None
    """Folder of the images that a csv or COCO file names, none of which may lie outside; by default beside it."""
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def open(self, location: str, *, scenes: int | None = None, **options: Any) -> Samples:
        """The pairs at `location`, read as these flags say.

        scenes: how many are generated, where they are; None for open_pairs' own number. options: of open_pairs.
        """
        from .sources import open_pairs  # torch takes seconds, which --help has not

        flags = {item.name: getattr(self, item.name) for item in dataclasses.fields(PairFlags)}
        flags["kind"] = flags.pop("dataset_type")
        return open_pairs(location, **flags | ({} if scenes is None else {"scenes": scenes}) | options)


@dataclass(frozen=True, kw_only=True)
class TrainingDataFlags(PairFlags):
    """What a command has too that reads all pairs for training."""

    train_num_samples: int | None = None
    """Pairs in an epoch, or generated scenes; without it they are counted (10,000 scenes)."""
    max_bad_share: float = 0.1
    """Stop once a larger share of the samples was skipped as bad, of at least 500 that a process has seen."""

    def open(self, location: str, **options: Any) -> Samples:
        counts = {"scenes": self.train_num_samples or None, "max_bad_share": self.max_bad_share}
        return super().open(location, **counts | options)
