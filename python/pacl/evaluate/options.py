"""Options that the tasks of `pacl evaluate` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ..commands import next_command
from ..processes import choose_device, process_group
from ..sharing import load_model
from ..towers import Towers
from .results import names_of, write_row


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of every task: the model, its device, and where results go."""

    checkpoint: str | None = None
    """Folder of a run of pacl train or of an embedder, or its name on the Hub; without it the task measures the
    open_clip model alone."""
    model: str = "ViT-B-16"
    """Name of the open_clip model; ignored with --checkpoint."""
    pretrained: str | None = None
    """Weights of the open_clip model, a tag or a file; required for open_clip's own model names."""
    tokens: str | None = None
    """Reading of the patch tokens: plain, value, maskclip, sclip, clearclip, naclip, kk, rcs, gem, scclip or proxy.
    Default: the one that the checkpoint was trained on, plain without a checkpoint."""
    proxy: str | None = None
    """Second tower of proxy tokens, a timm model. Default: vit_base_patch16_224.dino."""
    text_model: Path | None = None
    """Folder of a text encoder of transformers or sentence-transformers, made for the images of --model."""
    out: Path = Path("results")
    """Folder for JSON files and plots."""
    device: str = "auto"
    """Device to run on: cpu, cuda, ...; auto takes a GPU if there is one."""

    def group(self) -> dist.ProcessGroup | None:
        """Return the processes that share the data, or None for a single process."""
        return process_group(choose_device(self.device))

    def load(self) -> tuple[Towers, nn.Module | None]:
        """Load the model's towers and its embedder, which is None without a checkpoint."""
        names = (self.checkpoint, self.model, self.pretrained)
        device = choose_device(self.device)
        return load_model(*names, device, self.tokens, self.proxy, text_model=self.text_model)

    def write(self, task: str, dataset: str, rules: dict[str, Any], metrics: dict, towers: Towers, **more: Any) -> Path:
        """Write a row like CLIP_benchmark's, with the rules that make its numbers comparable, and print its numbers.

        Call it in the first process alone. Returns the path of the file.
        """
        row: dict[str, Any] = {"dataset": dataset, **names_of(towers, self.checkpoint), "task": task, "language": "en"}
        row |= {"protocol": rules, **more, "metrics": metrics}
        path = write_row(self.out, row)
        print(f"{dataset} {rules['name']}: " + ", ".join(f"{k} {x:.4f}" for k, x in metrics.items() if x is not None))
        print(path, flush=True)
        return path

    def next_command(self) -> str:
        """Return the line that names the next command: the comparison of all results in the folder."""
        run = [self.checkpoint] if self.checkpoint and Path(self.checkpoint).is_dir() else []
        return next_command("compare", *run, self.out)


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(TaskOptions):
    """Options of the tasks on a dataset with classes."""

    data_root: Path
    """Folder of the dataset, or its parent folder, as in mmsegmentation and torchvision."""
    class_file: Path | None = None
    """File with other class names: one class per line in label order; commas separate synonyms, the best one counts."""
    limit: int | None = None
    """Measure this many images only, spread over the dataset."""
    partial: bool = False
    """Accept a dataset that lacks images; the result says so."""

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of SegmentationData and Labelled."""
        return {"root": self.data_root, "class_file": self.class_file, "limit": self.limit, "partial": self.partial}
