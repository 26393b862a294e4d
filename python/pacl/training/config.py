"""What a training run depends on: the flags of `pacl train`, and config.yaml in its folder."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pacl_kernels.checks import FORMS, LOSSES

from ..data.flags import TrainingDataFlags
from ..embedder import DEFAULT_ATTN_TEMPERATURE, DEFAULT_FORM

POSITIVE = (
    "batch_size accum_freq epochs max_steps train_num_samples lr eps attn_temperature logit_scale max_logit_scale "
    "grad_clip_norm tower_lr force_image_size save_frequency keep_checkpoints log_every_n_steps max_image_pixels "
    "val_frequency"
).split()
NOTES = ("deviations", "left_open")  # in config.yaml, for people: see recipe.py
NOT_NEGATIVE = "wd warmup epochs_cooldown workers shuffle seed lock_image_unlocked_groups max_bad_share".split()
REPORTERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class TrainConfig(TrainingDataFlags):
    """Train PACL's vision embedder on a frozen CLIP and image-caption pairs. Flags are named as in open_clip."""

    train_data: str | None = None
    """Shards (a path, braces and :: as in open_clip, `a-{000..015}.tar::b.tar`) or a folder of them, a .csv or .tsv
    file, a folder of images with .txt files, an annotation .json of COCO captions, or synthetic. Local files."""
    features: Path | None = None
    """What pacl features stored, in place of --train-data; its towers are those of the run."""
    dataset_resampled: bool = False
    """Draw shards with replacement."""
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
    accum_freq: int | None = 1
    """Such batches in a step of a process; all of them, of all processes, are contrasted with each other. None: as many
    as make 4,096 pairs, the paper's batch."""
    epochs: int = 10
    max_steps: int | None = None
    """Stop after that many steps, with the schedule of a run of that length."""
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
    form: Literal["dot", "cosine", "max"] = DEFAULT_FORM
    loss: Literal["infonce", "sigmoid"] = "infonce"
    attn_temperature: float = DEFAULT_ATTN_TEMPERATURE
    """Of the softmax over patches; the paper states none (1), with which the loss is almost a mean over patches."""
    learn_attn_temperature: bool = False
    logit_scale: float = 1 / 0.07
    """Where the learned logit scale begins."""
    learn_logit_scale: bool = True
    max_logit_scale: float = 100.0
    nouns: Literal["words", "nltk"] | None = None
    """Train every other time on a noun of the caption in a prompt instead of the caption; nouns by the package's word
    list, or by nltk's tagger."""
    recipe: Literal["paper"] | None = None
    """paper: defaults of all flags as in the paper, a batch of 4,096 pairs included; config.yaml lists what other flags
    change, and what the paper leaves open."""
    precision: Literal["auto", "fp32", "amp_bf16"] = "auto"
    """auto: amp_bf16 on a GPU, fp32 on a CPU."""
    workers: int = 4
    """Processes that read and decode, for each training process; no more than shards."""
    shuffle: int = 2000
    """Samples of shards held for shuffling, for each worker; other forms are shuffled whole. 0: not at all."""
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
    """The classes of --val-segmentation, one per line from label 0, synonyms separated by commas."""
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
        if (self.train_data is None) == (self.features is None):
            got = "none" if self.features is None else "--features too"
            raise ValueError(f"train_data: got {got}, expected image-caption pairs or features")
        choices = {"form": FORMS, "loss": LOSSES, "nouns": (None, "words", "nltk"), "recipe": (None, "paper")}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(str, values))}")
        locked = self.lock_image and self.lock_text and not self.lock_image_unlocked_groups
        if self.features is not None and not locked:
            raise ValueError("features: got some, but towers that are trained change theirs; train on --train-data")
        for name in ("tower_lr", "grad_checkpointing"):
            if getattr(self, name) and locked:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, but every tower is locked")
        if not 1 <= self.logit_scale <= self.max_logit_scale:
            most = self.max_logit_scale
            raise ValueError(f"logit_scale: got {self.logit_scale!r}, expected 1 to {most!r} (--max-logit-scale)")
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


def dump_config(config: TrainConfig, notes: dict[str, Any]) -> str:
    """As YAML; `--config` reads it back, all but the notes of a recipe."""
    values = {name: str(x) if isinstance(x, Path) else x for name, x in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values | notes, sort_keys=False, width=120)


def read_config(path: Path) -> TrainConfig:
    """A config that dump_config wrote; ValueError for what is no such file."""
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML ({str(error).splitlines()[0]})") from error
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name not in NOTES}
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    if not isinstance(values, dict) or "train_data" not in values or not set(values) <= fields:
        unknown = sorted(set(values) - fields) if isinstance(values, dict) else values
        raise ValueError(f"config: {path} is not the config.yaml of a run (unknown: {unknown})")
    for item in dataclasses.fields(TrainConfig):
        if "float" in str(item.type) and isinstance(values.get(item.name), str):
            try:  # to YAML 1e-3, without a point, is a string
                values[item.name] = float(values[item.name])
            except ValueError as error:
                raise ValueError(
                    f"config: {item.name} is {values[item.name]!r} in {path}, expected a number"
                ) from error
    names = ("log_dir", "image_root", "features", "val_classes")
    paths = {name: Path(values[name]) for name in names if values.get(name) is not None}
    return TrainConfig(**values | paths)
