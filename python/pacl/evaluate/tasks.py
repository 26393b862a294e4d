"""The other tasks of `pacl evaluate`: their flags, and a JSON row for each result."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from torch import nn

from ..data import Kind
from ..data.sources import open_pairs
from ..sharing import load_pacl
from ..towers import Towers, load_towers
from ..training.run import _device
from .report import names_of, write_row


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all have."""

    checkpoint: str | None = None
    """Folder of a PACL embedder, or its name on the Hub; without it the open_clip model alone is measured."""
    model: str = "ViT-B-16"
    """open_clip's name, where no checkpoint names it."""
    pretrained: str | None = None
    """Tag or file of the model's weights."""
    out: Path = Path("results")
    """Folder for JSON files and plots."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def load(self) -> tuple[Towers, nn.Module | None]:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("WORLD_SIZE: got several processes, expected one; segmentation alone is shared among them")
        if self.checkpoint:
            return load_pacl(self.checkpoint, _device(self.device))
        return load_towers(self.model, self.pretrained, device=_device(self.device)), None

    def write(self, task: str, dataset: str, rules: dict[str, Any], metrics: dict, towers: Towers, **more) -> Path:
        """A row like CLIP_benchmark's, with the rules that make its numbers comparable."""
        row = {"dataset": dataset, **names_of(towers, self.checkpoint), "task": task, "language": "en"}
        row |= {"protocol": rules, **more, "metrics": metrics}
        path = write_row(self.out, row)
        print(f"{dataset} {rules['name']}: " + ", ".join(f"{k} {x:.4f}" for k, x in metrics.items() if k[0] != "_"))
        print(path, flush=True)
        return path


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(ModelConfig):
    """Image-text retrieval with φ: recall at 1, 5 and 10 as fractions. COCO captions count with all of an image's."""

    data: str
    """Pairs in any form that pacl train takes: .tar shards, csv, a folder, COCO's captions .json, synthetic:eval."""
    dataset_type: Kind = "auto"
    image_root: Path | None = None
    """Folder of the images of csv and COCO."""
    csv_separator: str | None = None
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    scenes: int = 1000
    """Generated scenes of synthetic."""
    plain: bool = False
    """The model's own image embedding beside φ."""
    batch_size: int = 64
    workers: int = 4


def _retrieval(argv: Sequence[str], prog: str) -> int:
    from .gallery import read_gallery, retrieval
    from .scorer import Scorer

    config = tyro.cli(RetrievalConfig, args=list(argv), prog=prog)
    names = ("image_root", "csv_separator", "csv_img_key", "csv_caption_key", "scenes")
    options = {name: getattr(config, name) for name in names} | {"kind": config.dataset_type}
    data = open_pairs(config.data, **options)  # what is wrong with it is said before the model loads
    towers, embedder = config.load()
    scorers = [Scorer(towers, embedder)] + ([Scorer(towers, plain=True)] if config.plain else [])
    data.transform = towers.transform
    reading = {"batch_size": config.batch_size, "workers": config.workers}
    gallery = read_gallery(data, **reading)
    skipped = {reason: count for reason, count in data.skipped.items() if count}
    for scorer in scorers:
        found = retrieval(data, gallery, scorer, **reading)
        # CLIP_benchmark names a recall by what is retrieved.
        metrics = {
            f"{what}_retrieval_recall@{k}": found[f"{way}_R@{k}"]
            for what, way in (("image", "text_to_image"), ("text", "image_to_text"))
            for k in (1, 5, 10)
        }
        rules = scorer.rules | {"name": f"retrieval {scorer.rules['name']}"}
        counts = {"images": gallery.images, "texts": len(gallery.captions), "skipped": skipped}
        config.write("zeroshot_retrieval", Path(config.data).stem, rules, metrics, towers, **counts)
    return 0


TASKS: dict[str, Callable[[Sequence[str], str], int]] = {"retrieval": _retrieval}
