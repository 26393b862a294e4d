"""Options that the tasks of `pacl evaluate` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ..processes import choose_device, process_group
from ..sharing import load_model
from ..towers import Towers
from .results import names_of, write_row


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options that every task has: the model, where it runs, and where results go."""

    checkpoint: str | None = None
    """Folder of a PACL embedder, or its name on the Hub; without it the open_clip model alone is measured."""
    model: str = "ViT-B-16"
    """open_clip's name, where no checkpoint names it."""
    pretrained: str | None = None
    """Tag or file of the model's weights, which a model by its name must have."""
    out: Path = Path("results")
    """Folder for JSON files and plots."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def group(self) -> dist.ProcessGroup | None:
        """The processes that share the data; None for this one alone."""
        return process_group(choose_device(self.device))

    def load(self) -> tuple[Towers, nn.Module | None]:
        """The model's towers and its embedder, None without a checkpoint."""
        return load_model(self.checkpoint, self.model, self.pretrained, choose_device(self.device))

    def write(self, task: str, dataset: str, rules: dict[str, Any], metrics: dict, towers: Towers, **more) -> Path:
        """Write a row like CLIP_benchmark's, with the rules that make its numbers comparable, and print its numbers.

        For the first process alone. Returns the path of the file.
        """
        row = {"dataset": dataset, **names_of(towers, self.checkpoint), "task": task, "language": "en"}
        row |= {"protocol": rules, **more, "metrics": metrics}
        path = write_row(self.out, row)
        print(f"{dataset} {rules['name']}: " + ", ".join(f"{k} {x:.4f}" for k, x in metrics.items() if x is not None))
        print(path, flush=True)
        return path


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(TaskOptions):
    """Options of the tasks on a data set with classes."""

    data_root: Path
    """Folder of the data set, or the one above it that holds it, as mmsegmentation and torchvision have it."""
    class_file: Path | None = None
    """Other class names: a class per line in the labels' order, synonyms separated by commas, the best one counts."""
    limit: int | None = None
    """Only so many images, spread over the set."""
    partial: bool = False
    """Accept a data set that lacks images; the result says so."""

    @property
    def reading(self) -> dict[str, Any]:
        """What SegmentationData and Labelled take of these."""
        return {"root": self.data_root, "class_file": self.class_file, "limit": self.limit, "partial": self.partial}
