"""The flags of `pacl train`, and config.yaml in the folder of a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml

from pacl_kernels.checks import FORMS, LOSSES

from ..annotations import checked
from ..data.flags import TrainingDataFlags
from ..embedder import DEFAULT_ATTN_TEMPERATURE, DEFAULT_FORM
from ..flags import Tokens
from ..formats import printable
from ..processes import default_workers
from ..settings import Damaged, read_settings

POSITIVE = (
    "batch_size accum_freq epochs max_steps train_num_samples lr eps attn_temperature logit_scale max_logit_scale "
    "grad_clip_norm tower_lr force_image_size max_patches save_frequency keep_checkpoints log_every_n_steps "
    "max_image_pixels captions_per_image val_frequency dist_timeout"
).split()
# Flags that --align cross-attention does not take: those of φ's losses, of several texts, and of validation by φ.
PHI_ONLY = (
    "form loss learn_attn_temperature grad_tolerance coherence_loss captions_per_image duplicates max_patches "
    "text_model lock_text val_data val_segmentation"
).split()
NUMBER = re.compile(r"[-+]?\d{1,40}[eE][-+]?\d{1,4}")
NOTES = ("deviations", "left_open", "resumed")  # in config.yaml, for people: see recipe.py
NOT_NEGATIVE = (
    "wd warmup epochs_cooldown workers shuffle seed lock_image_unlocked_groups max_bad_share coherence_loss".split()
)
REPORTERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class DataFlags(TrainingDataFlags):
    """The pairs."""

    train_data: str | None = None
    """Image-caption pairs: shards (`a-{000..015}.tar::b.tar` as in open_clip) or a folder of them, in local files or at
    an address of s3://, gs://, hf:// or https://; a .csv or .tsv file, a folder of images with .txt files, an
    annotation .json of COCO captions, or synthetic."""
    features: str | None = None
    """Folder that `pacl features` wrote, or its address in a store, in place of --train-data. The run uses the
    towers of these features."""
    verify: bool = True
    """Compare the SHA-256 of all files of --features before training, at 1 to 2 GB/s; --no-verify skips it."""
    dataset_resampled: bool = False
    """Draw shards with replacement."""
    nouns: Literal["words", "nltk"] | None = None
    """Replace the caption, half of the time, by a prompt with one of its nouns.
    The package's word list (words) or NLTK's tagger (nltk) finds the nouns."""


@dataclass(frozen=True, kw_only=True)
class TowerFlags:
    """The towers, and which of them are trained."""

    model: str = "ViT-B-16"
    """Name of an open_clip model, or local-dir:FOLDER as save_pretrained and the demo write it."""
    pretrained: str | None = None
    """Weights of --model: an open_clip tag, such as openai, or a file. A named model needs it, unless it is trained
    from scratch or --random-towers is given."""
    vision_model: str | None = None
    """Name of a timm model, such as vit_base_patch16_224.dino, that replaces the vision tower of --model."""
    vision_pretrained: bool = True
    """Load timm's weights of --vision-model."""
    text_model: str | None = None
    """Folder of a text encoder of transformers or sentence-transformers that replaces the text tower of --model."""
    random_towers: bool = False
    """Use frozen towers without weights, and keep them beside the embedder."""
    force_image_size: int | None = None
    """Side of the images in pixels. Default: the vision tower's own."""
    max_patches: int | None = None
    """Most patches of an image, which then keeps its aspect ratio, for a vision tower that takes any resolution
    (timm's naflexvit_...). Default: images of one size."""
    tokens: Tokens = "plain"
    """Reading of the patch tokens that the embedder is trained on; any but plain needs a locked vision tower."""
    proxy: str | None = None
    """Second tower of proxy tokens, a timm model. Default: vit_base_patch16_224.dino."""
    lock_image: bool = True
    """Freeze the vision tower; --no-lock-image trains all of it."""
    lock_image_unlocked_groups: int = 0
    """Number of last blocks (or convolutional stages) of a locked vision tower to train, with the norm after them."""
    lock_text: bool = True
    """Freeze the text tower."""
    tower_lr: float | None = None
    """Learning rate of trained towers and of the head of --align cross-attention. Default: that of the embedder."""
    grad_checkpointing: bool = False
    """Recompute the activations of trained towers in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags:
    """The batch, the optimiser and the length of the run."""

    recipe: Literal["paper"] | None = None
    """Use the paper's values as defaults of all flags, a batch of 4,096 pairs included.
    config.yaml lists what other flags change, and what the paper leaves open."""
    batch_size: int = 256
    """Pairs that one process encodes at a time."""
    accum_freq: int | None = 1
    """Batches in one step of a process. All pairs of a step, of all processes, are contrasted with each other.
    None: as many batches as make 4,096 pairs, the paper's batch."""
    epochs: int = 10
    max_steps: int | None = None
    """Number of steps, instead of --epochs; the schedule has the same length."""
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
    """Epochs at the end in which const-cooldown lowers the learning rate linearly to 0."""
    grad_clip_norm: float | None = 1.0
    ema_decay: float | None = None
    """Decay of a running average of the weights, such as 0.999. The run then validates and exports the average."""


@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """The loss."""

    align: Literal["phi", "cross-attention"] = "phi"
    """How a pair is scored: phi, or a small head in which patches and the caption's words attend to each other, for
    comparison with phi. The run then writes cross_attention.safetensors and no embedder."""
    form: Literal["dot", "cosine", "max"] = DEFAULT_FORM
    loss: Literal["infonce", "sigmoid"] = "infonce"
    attn_temperature: float = DEFAULT_ATTN_TEMPERATURE
    """Temperature of the softmax over patches. The paper states none; at 1 the loss is almost a mean over patches."""
    learn_attn_temperature: bool = False
    logit_scale: float = 1 / 0.07
    """Initial value of the logit scale."""
    learn_logit_scale: bool = True
    max_logit_scale: float = 100.0
    grad_tolerance: float = 0.0
    """Share of the gradient's mass over the pairs that the backward may leave out, such as 0.002; 0 is exact."""
    coherence_loss: float = 0.0
    """Weight of a second loss, by which the cosines between an image's patches follow those between the frozen tower's
    tokens; 0 turns it off."""
    captions_per_image: int = 1
    """Most captions that an image brings to a batch, all of them its positives. An image with fewer brings all."""
    duplicates: Literal["positive", "ignore", "negative"] = "negative"
    """Equal captions of two images in a step, and captions of an image that occurs twice in it: positives of both
    images, ignored (out of the contrast), or negatives like any other."""


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """How the run uses the machine."""

    precision: Literal["auto", "fp32", "amp_bf16"] = "auto"
    """Number format of the towers and the embedder. Auto means amp_bf16 on a GPU and fp32 on a CPU."""
    workers: int = dataclasses.field(default_factory=default_workers)
    """Processes that read and decode for each training process; at most one for each shard. Default: 4, or the number
    of cores if that is less."""
    shuffle: int = 2000
    """Samples that each worker holds to shuffle shards; other sources are shuffled as a whole. 0 turns it off."""
    seed: int = 0
    device: str = "auto"
    dist_timeout: float | None = None
    """Seconds that a process waits for the others before it gives up. Default: PyTorch's, 600 on GPUs and 1800 on
    CPUs. Counting the pairs, checkpoints and validations must take less."""
    backend: str = "auto"
    """Backend of the loss; `python -m pacl_kernels` shows which ones run."""
    torchcompile: bool = False
    """Compile the embedder by torch.compile, which needs a compiler on the machine."""


@dataclass(frozen=True, kw_only=True)
class ValidationFlags:
    """Validation during the run."""

    val_data: str | None = None
    """Held-out pairs, given like --train-data, for retrieval and the loss among all of them."""
    val_segmentation: str | None = None
    """Shards with a .mask.png for each image (a label per pixel, 255 for none), for mIoU and patch accuracy."""
    val_classes: Path | None = None
    """File with the classes of --val-segmentation, one per line from label 0, synonyms separated by commas."""
    val_frequency: int = 1000
    """Steps between validations; the last step is always validated."""


@dataclass(frozen=True, kw_only=True)
class LogFlags:
    """The run's folder: its log, its checkpoints, and continuing from one."""

    log_dir: Path = Path("logs")
    name: str = "pacl"
    """Name of the run; its folder is LOG_DIR/NAME."""
    save_frequency: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    log_every_n_steps: int = 50
    report_to: str = "auto"
    """Trackers of the curves, separated by commas (tensorboard, wandb, trackio), or none.
    Auto is tensorboard if it is installed."""
    resume: str | None = None
    """Checkpoint to continue from, or latest. The data order continues too."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LogFlags, ValidationFlags, MachineFlags, LossFlags, ScheduleFlags, TowerFlags, DataFlags):
    """Train PACL's vision embedder on a frozen CLIP and image-caption pairs. Flags are named as in open_clip."""

    # A dataclass takes the fields of its last base first, so config.yaml has this order too.
    GROUPS: ClassVar[dict[str, type]] = {
        "data": DataFlags,
        "towers": TowerFlags,
        "schedule": ScheduleFlags,
        "loss": LossFlags,
        "machine": MachineFlags,
        "validation": ValidationFlags,
        "log": LogFlags,
    }

    def check(self) -> TrainConfig:
        """Return this config; raise ValueError for a value that is out of range or contradicts another."""
        for name in (*POSITIVE, *NOT_NEGATIVE):
            value = getattr(self, name)
            if value is not None and not (value > 0 or value == 0 and name in NOT_NEGATIVE):
                least = "at least 0" if name in NOT_NEGATIVE else "above 0"
                raise ValueError(f"{name}: got {value!r}, expected a number {least}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a number from 0 to below 1")
        folder = Path(self.name)
        if self.name != printable(self.name) or folder.is_absolute() or ".." in folder.parts or not folder.parts:
            raise ValueError(f"name: got {self.name!r}, expected the name of a folder inside LOG_DIR")
        if (self.train_data is None) == (self.features is None):
            got = "neither" if self.features is None else "both"
            raise ValueError(f"train_data: got {got}, expected exactly one of --train-data and --features")
        choices = {
            "align": ("phi", "cross-attention"),
            "form": FORMS,
            "loss": LOSSES,
            "duplicates": ("positive", "ignore", "negative"),
            "nouns": (None, "words", "nltk"),
            "recipe": (None, "paper"),
            "tokens": get_args(Tokens),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(str, values))}")
        locked = self.lock_image and self.lock_text and not self.lock_image_unlocked_groups
        if self.features is not None and not locked:
            raise ValueError(
                "features: got stored features and a tower to train, expected locked towers; trained towers need "
                "--train-data"
            )
        for name in ("tower_lr", "grad_checkpointing"):
            if getattr(self, name) and locked and (name == "grad_checkpointing" or self.align == "phi"):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a tower to train, but all are locked")
        if self.coherence_loss and not (self.lock_image and not self.lock_image_unlocked_groups):
            raise ValueError(
                f"coherence_loss: got {self.coherence_loss:g} and a vision tower to train, expected a locked one, "
                "because the patches follow its tokens"
            )
        if self.align == "cross-attention":
            for name in PHI_ONLY:
                default = getattr(TrainConfig, name)
                if getattr(self, name) != default:
                    got = f"{getattr(self, name)!r} with align cross-attention"
                    raise ValueError(f"{name}: got {got}, expected {default!r}, the default")
        if not 0 <= self.grad_tolerance < 1:
            raise ValueError(f"grad_tolerance: got {self.grad_tolerance:g}, expected a number from 0 to below 1")
        if not 1 <= self.logit_scale <= self.max_logit_scale:
            most = self.max_logit_scale
            raise ValueError(f"logit_scale: got {self.logit_scale!r}, expected 1 to {most!r} (--max-logit-scale)")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay!r}, expected a number between 0 and 1")
        if (self.val_segmentation is None) != (self.val_classes is None):
            got = "--val-classes" if self.val_segmentation is None else "--val-segmentation"
            raise ValueError(f"val_segmentation: got {got} alone, expected --val-segmentation and --val-classes")
        reporters(self.report_to)
        return self

    def tower_names(self) -> str:
        """Return the names of the towers and of their weights, for the plan."""
        weights = self.pretrained or ("from a folder" if ":" in self.model else "RANDOM, no --pretrained")
        vision = "" if self.vision_pretrained else " (RANDOM)"
        others = [f"{self.vision_model}{vision}"] if self.vision_model else []
        others += [self.text_model] if self.text_model else []
        tokens = "" if self.tokens == "plain" else f", {self.tokens} tokens"
        return " with ".join([f"{self.model} ({weights})"] * (len(others) < 2) + others) + tokens

    @property
    def locked(self) -> list[str]:
        """The names, "visual" and "text", of the towers that are frozen, wholly or in part."""
        return [name for name, locked in (("visual", self.lock_image), ("text", self.lock_text)) if locked]

    @property
    def local_batch(self) -> int:
        """Pairs in one step of a process. Raises ValueError while accum_freq is None; see fill_batch."""
        if self.accum_freq is None:
            raise ValueError("accum_freq: got None, expected a number; fill_batch gives one")
        return self.batch_size * self.accum_freq

    @property
    def folder(self) -> Path:
        return self.log_dir / self.name


def reporters(names: str) -> list[str]:
    """Return the trackers that `report_to` names; raise ValueError for one that is unknown or not installed."""
    if names == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    chosen = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    for name in chosen:
        if name not in REPORTERS:
            raise ValueError(f"report_to: got {name!r}, expected auto, none, or some of {', '.join(REPORTERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: got {name!r}, which is not installed (pip install {name})")
    return chosen


def dump_config(config: TrainConfig, notes: dict[str, Any]) -> str:
    """Return `config` and `notes` as YAML. `--config` reads it back, except for the notes."""
    values = {name: str(x) if isinstance(x, Path) else x for name, x in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values | notes, sort_keys=False, width=120)


def read_config(path: Path) -> TrainConfig:
    """Read a config that dump_config wrote; raise ValueError for any other file and for values of another type."""
    values = {name: value for name, value in read_settings(path).items() if name not in NOTES}
    for item in dataclasses.fields(TrainConfig):
        value = values.get(item.name)
        if "float" in str(item.type) and isinstance(value, str) and NUMBER.fullmatch(value):
            values[item.name] = float(value)  # YAML reads 1e-3, which has no point, as a string
    if "train_data" not in values:
        raise Damaged(path, "train_data is missing, expected the config.yaml of a run")
    return checked(values, TrainConfig, path)
