"""What a training run depends on: the flags of `pacl train`, and config.yaml in its folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from pacl_kernels.loss import FORMS, LOSSES

POSITIVE = (
    "batch_size accum_freq epochs max_steps train_num_samples lr eps attn_temperature logit_scale max_logit_scale "
    "grad_clip_norm tower_lr force_image_size save_frequency keep_checkpoints log_every_n_steps max_image_pixels "
    "val_frequency"
).split()
NOT_NEGATIVE = "wd warmup epochs_cooldown workers shuffle seed lock_image_unlocked_groups".split()
REPORTERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class TrainConfig:
    """Train PACL's vision embedder on a frozen CLIP and image-caption shards. Flags are named as in open_clip."""

    train_data: str
    """Shards: a path, braces and :: as in open_clip (`a-{000..015}.tar::b.tar`). Local files."""
    model: str = "ViT-B-16"
    """Name of an open_clip model, or local-dir:FOLDER as save_pretrained and the demo write it."""
    pretrained: str | None = None
    """open_clip's tag of its weights, such as openai, or a file of them. Without it a named model is random."""
    vision_model: str | None = None
    """A timm model, such as vit_base_patch16_224.dino, in place of the open_clip model's vision tower."""
    vision_pretrained: bool = True
    """Load timm's weights of it."""
    force_image_size: int | None = None
    """Pixels of a side, if not the vision tower's own."""
    lock_image: bool = True
    """Keep the vision tower as it is; --no-lock-image trains all of it."""
    lock_image_unlocked_groups: int = 0
    """Train its last blocks (stages of a convolutional one) all the same, and the norm behind them."""
    lock_text: bool = True
    """Keep the text tower as it is."""
    tower_lr: float | None = None
    """Learning rate of towers that are trained, if not that of the embedder."""
    grad_checkpointing: bool = False
    """Recompute the activations of towers that are trained."""
    batch_size: int = 256
    """Pairs that one process encodes at a time."""
    accum_freq: int = 1
    """Such batches in a step of a process; all of them, of all processes, are contrasted with each other."""
    epochs: int = 10
    max_steps: int | None = None
    """Stop after that many steps, with the schedule of a run of that length."""
    train_num_samples: int | None = None
    """Pairs in an epoch; counted in the shards without it."""
    lr: float = 5e-4
    wd: float = 0.2
    """Weight decay of matrices; gains, biases and scalars have none."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: int = 0
    """Steps of linear warm-up."""
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = "cosine"
    epochs_cooldown: int = 1
    """Epochs at the end in which const-cooldown goes linearly to 0."""
    grad_clip_norm: float | None = 1.0
    ema_decay: float | None = None
    """Keep a running average of the weights (0.999, say): it is what is validated and written as the embedder."""
    form: Literal["dot", "cosine", "max"] = "cosine"
    loss: Literal["infonce", "sigmoid"] = "infonce"
    attn_temperature: float = 0.05
    """Of the softmax over patches; the paper states none (1), with which the loss is almost a mean over patches."""
    learn_attn_temperature: bool = False
    logit_scale: float = 1 / 0.07
    """Where the learned logit scale begins."""
    max_logit_scale: float = 100.0
    precision: Literal["auto", "fp32", "amp_bf16"] = "auto"
    """auto: amp_bf16 on a GPU, fp32 on a CPU."""
    workers: int = 4
    """Processes that read and decode, for each training process; no more than shards."""
    shuffle: int = 2000
    """Samples held for shuffling, for each worker."""
    max_image_pixels: int = 25_000_000
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    """Of the loss; see python -m pacl_kernels."""
    torchcompile: bool = False
    """Compile the embedder; needs a compiler where it runs."""
    val_data: str | None = None
    """Held-out pairs, named like --train-data: retrieval and loss among all of them."""
    val_segmentation: str | None = None
    """Shards with a .mask.png for each image, a label per pixel and 255 for none: mIoU and share of right patches."""
    val_classes: Path | None = None
    """The texts of the labels of --val-segmentation, one a line, from label 0."""
    val_frequency: int = 1000
    """Steps between validations; the last step has one too."""
    log_dir: Path = Path("logs")
    name: str = "pacl"
    """The folder of the run is LOG_DIR/NAME."""
    save_frequency: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    log_every_n_steps: int = 50
    report_to: str = "auto"
    """tensorboard, wandb, trackio, with commas between; auto: tensorboard if it is installed; none."""
    resume: str | None = None
    """latest, or a checkpoint: go on with the same data order."""
    dry_run: bool = False
    """Print the plan and stop."""

    def check(self) -> TrainConfig:
        """This config; ValueError for a value that cannot be."""
        for name in (*POSITIVE, *NOT_NEGATIVE):
            value = getattr(self, name)
            if value is not None and not (value > 0 or value == 0 and name in NOT_NEGATIVE):
                least = "at least 0" if name in NOT_NEGATIVE else "above 0"
                raise ValueError(f"{name}: got {value!r}, expected a number {least}")
        for name, choices in (("form", FORMS), ("loss", LOSSES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        locked = self.lock_image and self.lock_text and not self.lock_image_unlocked_groups
        for name in ("tower_lr", "grad_checkpointing"):
            if getattr(self, name) and locked:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, but every tower is locked")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay!r}, expected a number between 0 and 1")
        if (self.val_segmentation is None) != (self.val_classes is None):
            raise ValueError("val_segmentation: expected --val-classes with it, and neither without the other")
        reporters(self.report_to)
        return self

    def tower_names(self) -> str:
        """The towers and their weights, for the plan."""
        weights = self.pretrained or ("from a folder" if ":" in self.model else "RANDOM, no --pretrained")
        vision = "" if self.vision_pretrained else " (RANDOM)"
        return f"{self.model} ({weights})" + (f" with {self.vision_model}{vision}" if self.vision_model else "")

    @property
    def folder(self) -> Path:
        return self.log_dir / self.name


def reporters(names: str) -> list[str]:
    """Where curves go; ValueError for a name that is unknown or not installed."""
    if names == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    chosen = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    for name in chosen:
        if name not in REPORTERS:
            raise ValueError(f"report_to: got {name!r}, expected auto, none, or some of {', '.join(REPORTERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed (pip install {name})")
    return chosen


def dump_config(config: TrainConfig) -> str:
    """As YAML; `--config` reads it back."""
    values = {name: str(x) if isinstance(x, Path) else x for name, x in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False)


def command(config: TrainConfig) -> str:
    """The command that gives this config: every flag that is not at its default."""
    words = ["pacl", "train"]
    for item in dataclasses.fields(config):
        value, flag = getattr(config, item.name), item.name.replace("_", "-")
        if value != item.default and item.name not in ("resume", "dry_run"):
            words += (
                [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
            )
    return shlex.join(words)


def read_config(path: Path) -> TrainConfig:
    """A config that dump_config wrote; ValueError for what is no such file."""
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML ({str(error).splitlines()[0]})") from error
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    if not isinstance(values, dict) or "train_data" not in values or not set(values) <= fields:
        unknown = sorted(set(values) - fields) if isinstance(values, dict) else values
        raise ValueError(f"config: {path} is not the config.yaml of a run (unknown: {unknown})")
    paths = {name: Path(values[name]) for name in ("log_dir", "val_classes") if values.get(name) is not None}
    return TrainConfig(**{**values, **paths})
