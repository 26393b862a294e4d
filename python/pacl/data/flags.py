"""The flags that say how pairs are read, shared by all commands that read pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..remote import Location
from ..stores import Store
from . import Kind
from .images import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from .samples import Samples


STORE = ("cache_dir", "cache_size", "store_timeout", "store_attempts")  # flags of reading from stores


@dataclass(frozen=True, kw_only=True)
class PairFlags:
    """Base of a command's flags: the options of open_pairs that depend on the format of the data."""

    dataset_type: Kind = "auto"
    csv_separator: str | None = None
    """Separator of the columns. Default: tab or comma, whichever finds both columns in the header."""
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    image_root: Path | None = None
    """Folder of the images that a csv or COCO file names. Images outside it are refused. Default: beside the file."""
    split: Literal["train", "val", "test"] | None = None
    """Split of Karpathy's dataset_coco.json and alike, whose images are below --image-root."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    cache_dir: Path | None = None
    """Local folder that keeps what was read from a store (s3://, gs://, hf://, https://)."""
    cache_size: float = 100.0
    """Most gigabytes in --cache-dir; what was read longest ago makes room."""
    store_timeout: float = 60.0
    """Seconds that a store may take to answer a read before the read is repeated."""
    store_attempts: int = 10
    """Number of times that a read from a store is tried, with growing pauses, before the command gives up."""

    @property
    def store(self) -> Store:
        return Store(self.store_timeout, self.store_attempts, self.cache_dir, int(self.cache_size * 1e9))

    def open(self, location: str, *, scenes: int | None = None, **options: Any) -> Samples:
        """Open the pairs at `location` by these flags.

        scenes: number of generated scenes, if `location` is synthetic; None: the default of open_pairs. options: those
        of open_pairs.
        """
        from .sources import open_pairs  # here, because importing torch would make --help slow

        names = [item.name for item in dataclasses.fields(PairFlags) if item.name not in STORE]
        flags = {"store": self.store} | {name: getattr(self, name) for name in names}
        flags["kind"] = flags.pop("dataset_type")
        return open_pairs(location, **flags | ({} if scenes is None else {"scenes": scenes}) | options)


@dataclass(frozen=True, kw_only=True)
class TrainingDataFlags(PairFlags):
    """Base of the flags of a command that reads all pairs for training."""

    train_num_samples: int | None = None
    """Pairs in an epoch, or number of generated scenes. Default: the pairs are counted; 10,000 scenes."""
    max_bad_share: float = 0.1
    """Stop when a larger share of the samples is bad, once a process has read 500."""

    def open(self, location: str, **options: Any) -> Samples:
        counts = {"scenes": self.train_num_samples or None, "max_bad_share": self.max_bad_share}
        return super().open(location, **counts | options)


def given_flags(flags: PairFlags) -> list[str]:
    """Return the flags of pairs that differ from their defaults, as words of a command line."""
    words: list[str] = []
    for item in dataclasses.fields(PairFlags):
        value = getattr(flags, item.name)
        if value != item.default:
            words += [f"--{item.name.replace('_', '-')}", str(value)]
    return words


def plan_of(flags: Any, *without: str) -> dict[str, Any]:
    """Return the flags of a command as plain Python, without some: what must be the same when it is continued."""
    values = {name: str(x) if isinstance(x, Path) else x for name, x in dataclasses.asdict(flags).items()}
    return {name: x for name, x in values.items() if name not in (*without, *STORE)}


def check_plan(out: Location, begun: Mapping[str, Any], plan: dict[str, Any]) -> None:
    """Raise ValueError unless the output in `out` was begun with the same plan."""
    changed = [f"{name} ({begun.get(name)}, now {x})" for name, x in plan.items() if begun.get(name) != x]
    if changed:
        raise ValueError(f"out: {out} was begun with another {', '.join(changed)}, expected the same or another folder")
