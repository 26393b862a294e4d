"""A run of `pacl train`: the vision embedder on a frozen CLIP, in one process or under torchrun."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pacl_kernels import cached_step, fused_pacl_loss

from ..backbones import freeze, patch_tokens
from ..data.shards import Shards, count_samples, loader
from ..embedder import VisionEmbedder, save_embedder
from .checkpoints import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .log import Log, pair_statistics, say
from .optimiser import average_of, learning_rate, parameter_groups
from .plan import plan
from .validation import Validation

SIGMOID_BIAS = -10.0  # where SigLIP's begins


class Trainable(nn.Module):
    """What the optimiser sees: the embedder, the logit scale, and, where learned, attention temperature and bias."""

    def __init__(self, embedder: VisionEmbedder, config: TrainConfig):
        super().__init__()
        self.embedder = embedder
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        self.log_temperature = self.bias = None
        if config.learn_attn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.attn_temperature)))
        if config.loss == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Patch embeddings of tokens, the logit scale, and what is learned of attention temperature and bias."""
        temperature = () if self.log_temperature is None else (self.log_temperature.exp(),)
        bias = () if self.bias is None else (self.bias * 1.0,)
        return self.embedder(tokens), self.log_scale.exp(), *temperature, *bias


class Run:
    """One training run: its models, its data, and how far it got."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.group = _process_group()
        self.rank, self.world = (self.group.rank(), self.group.size()) if self.group else (0, 1)
        self.device = _device(config.device)
        self.amp = config.precision == "amp_bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.step, self.stopped_by = 0, None
        self.clip, self.preprocess, self.tokenize = _frozen_clip(config, self.device)
        self.data = Shards(
            config.train_data,
            transform=self.preprocess,
            shuffle=config.shuffle,
            seed=config.seed,
            repeat=True,
            max_image_pixels=config.max_image_pixels,
            rank=self.rank,
            world=self.world,
        )
        self.samples = config.train_num_samples or self._count()
        self.global_batch = config.batch_size * config.accum_freq * self.world
        self.epoch_steps = self.samples // self.global_batch
        if self.epoch_steps == 0:
            raise ValueError(f"batch_size: a step takes {self.global_batch} pairs, expected at most {self.samples}")
        self.steps = config.max_steps or config.epochs * self.epoch_steps
        torch.manual_seed(config.seed)
        self.model = Trainable(VisionEmbedder(*_widths(self.clip)), config).to(self.device)
        if config.torchcompile:
            self.model.embedder.compile()
        self.average = average_of(self.model, config.ema_decay) if config.ema_decay is not None else None
        self.wrapped = DistributedDataParallel(self.model, process_group=self.group) if self.group else self.model
        self.optimiser = torch.optim.AdamW(
            parameter_groups(self.model.parameters(), config.wd),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )
        self.validation, self.validated = Validation(self), {}

    def _count(self) -> int:
        """Counted by the first process, for all."""
        counts = [count_samples(self.data.paths) if self.rank == 0 else None]
        if self.group:
            dist.broadcast_object_list(counts, src=0, group=self.group)
        return counts[0]

    def say(self, text: str) -> None:
        """A line for the console and out.log, of the first process."""
        if self.rank == 0:
            say(text, None if self.config.dry_run else self.config)

    def plan(self) -> str:
        return plan(self)

    @property
    def result(self) -> Trainable:
        """The weights that are validated and kept: their average where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def temperature(self) -> float:
        learned = self.model.log_temperature
        return self.config.attn_temperature if learned is None else learned.exp().item()

    # Training

    def train(self) -> None:
        """From the current step to the last, with checkpoints; on a signal the step under way is finished and saved."""
        if self.step >= self.steps:
            return
        with self._signals(), Log(self) as self.log:
            for batch, waited in self._batches():
                begin = time.perf_counter()
                loss = self._step(batch)
                self.step += 1
                self.log.step(loss, batch["key"], waited, time.perf_counter() - begin)
                stop = self._anyone_stopped()
                if stop or self.due(self.config.save_frequency):
                    self.log.check()
                    self.save()
                if self.validation and not stop and self.due(self.config.val_frequency):
                    self.validated = self.log.validated(self.validation(self.result))
                    self.save_embedder()
                if stop or self.step == self.steps:
                    return

    def due(self, every: int, ahead: int = 0) -> bool:
        """Whether what is done every so many steps, and at the last one, is done at this one, or `ahead` from it."""
        step = self.step + ahead
        return step % every == 0 or step == self.steps

    def _batches(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Batches of a step of this process, and the seconds that each was waited for."""
        size, parts = self.config.batch_size, self.config.accum_freq
        batches = iter(loader(self.data, size * parts, workers=self.config.workers, drop_last=True, start=self.step))
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except RuntimeError as error:  # a worker's, with its traceback
                if "shards: no usable sample" not in str(error):
                    raise
                raise ValueError(f"train_data: no usable sample; skipped {self.data.skipped}") from error
            yield batch, time.perf_counter() - begin

    def _step(self, batch: dict[str, Any]) -> Tensor:
        config = self.config
        cooldown = config.epochs_cooldown * self.epoch_steps
        factor = learning_rate(self.step, self.steps, config.warmup, config.lr_scheduler, cooldown)
        self.lr = config.lr * factor
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr
        self.optimiser.zero_grad()
        options = {
            "form": self.config.form,
            "loss": self.config.loss,
            "group": self.group,
            "backend": self.config.backend,
        }

        def loss(patches, texts, scale, *learned):
            # A temperature that is not learned is a number, by which the loss chooses its kernel.
            temperature = learned[0] if self.config.learn_attn_temperature else self.config.attn_temperature
            bias = learned[-1] if self.config.loss == "sigmoid" else None
            if self.rank == 0 and self.due(config.log_every_n_steps, ahead=1):
                self.log.statistics = pair_statistics(patches, texts, temperature, config.form)
            return fused_pacl_loss(patches, texts, scale, attn_temperature=temperature, logit_bias=bias, **options)

        pairs = {"images": batch["image"], "texts": self.tokenize(batch["caption"])}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            modules = [self.wrapped] if self.group else []
            value = cached_step(self._encode, pairs, loss, micro_batch=self.config.batch_size, modules=modules)
        if self.config.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm)
        self.optimiser.step()
        with torch.no_grad():
            self.model.log_scale.clamp_(0, math.log(self.config.max_logit_scale))
        if self.average is not None:
            self.average.update_parameters(self.model)
        return value

    @torch.no_grad()
    def patches_of(self, images: Tensor, model: Trainable) -> Tensor:
        """Patch embeddings [B, N, D] of images by some weights of the run."""
        return model.embedder(patch_tokens(self.clip.visual, images.to(self.device, non_blocking=True)))

    @torch.no_grad()
    def texts_of(self, captions: list[str], model: Trainable) -> Tensor:
        """Text embeddings [B, D] of captions."""
        return self.clip.encode_text(self.tokenize(captions).to(self.device), normalize=True)

    def _encode(self, pairs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        images, texts = (pairs[name].to(self.device, non_blocking=True) for name in ("images", "texts"))
        with torch.no_grad():
            tokens = patch_tokens(self.clip.visual, images)
            embedded = self.clip.encode_text(texts, normalize=True)
        patches, *scalars = self.wrapped(tokens)
        return patches, embedded.to(patches.dtype), *scalars

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and Ctrl-C are remembered, and answered after the step."""

        def remember(number, frame):
            if self.stopped_by is not None:  # a second one is meant
                raise KeyboardInterrupt
            self.stopped_by = number

        old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _anyone_stopped(self) -> bool:
        """All processes stop at the same step: they ask each other at every step on a CPU, when they log on a GPU."""
        due = self.device.type == "cpu" or self.due(self.config.log_every_n_steps)
        if self.group is None or not due:
            return self.group is None and self.stopped_by is not None
        flag = torch.tensor([self.stopped_by or 0], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        self.stopped_by = int(flag) or None
        return self.stopped_by is not None

    # What stays

    def save(self) -> None:
        """The checkpoint, and the embedder alone as safetensors; by the first process."""
        if self.rank != 0:
            return
        state = {
            "step": self.step,
            "name": self.config.name,
            "state_dict": _on_cpu(self.model),
            "ema": None if self.average is None else _on_cpu(self.average),
            "optimizer": self.optimiser.state_dict(),
            "global_batch": self.global_batch,
            "world": self.world,
        }
        save_checkpoint(self.config.folder / "checkpoints", state, keep=self.config.keep_checkpoints)
        self.save_embedder()

    def save_embedder(self) -> None:
        """As safetensors, with what the last validation found; by the first process."""
        if self.rank != 0:
            return
        notes = {name: getattr(self.config, name) for name in ("model", "pretrained", "form", "loss", "ema_decay")}
        notes |= {"attn_temperature": self.temperature, "steps": self.step}
        notes |= {"global_batch": self.global_batch, "logit_scale": self.result.log_scale.exp().item()}
        notes |= {"validation": self.validated} if self.validated else {}
        save_embedder(self.result.embedder, self.config.folder / "embedder", **notes)

    def restore(self, path: Path) -> None:
        state = load_checkpoint(path)
        for name, mine in (("global_batch", self.global_batch), ("world", self.world)):
            if state.get(name) != mine:
                raise ValueError(f"resume: {path} is of a run with {name} {state.get(name)}, expected {mine}")
        if (state.get("ema") is None) != (self.average is None):
            raise ValueError(f"resume: {path} is of a run {'without' if self.average else 'with'} --ema-decay")
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.model.load_state_dict(state["state_dict"])
        self.optimiser.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().cpu() for name, x in module.state_dict().items()}


def _process_group() -> dist.ProcessGroup | None:
    """All processes that torchrun started, or None for one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.group.WORLD


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _frozen_clip(config: TrainConfig, device: torch.device):
    """The model, its deterministic image transform and its tokenizer."""
    if ":" not in config.model and config.model not in open_clip.list_models():
        close = difflib.get_close_matches(config.model, open_clip.list_models(), 3)
        raise ValueError(
            f"model: got {config.model!r}, which open_clip does not know; it knows {', '.join(close)}, ..."
        )
    model, _, preprocess = open_clip.create_model_and_transforms(config.model, pretrained=config.pretrained)
    return freeze(model).to(device), preprocess, open_clip.get_tokenizer(config.model)


@torch.no_grad()
def _widths(clip: nn.Module) -> tuple[int, int]:
    """Of patch tokens and of text embeddings."""
    device = next(clip.parameters()).device
    size = open_clip.get_model_preprocess_cfg(clip)["size"]
    height, width = (size, size) if isinstance(size, int) else size
    tokens = patch_tokens(clip.visual, torch.zeros(1, 3, height, width, device=device))
    texts = clip.encode_text(torch.zeros(1, clip.context_length, dtype=torch.long, device=device))
    return tokens.shape[2], texts.shape[1]
