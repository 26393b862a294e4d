"""A run of `pacl train`: the vision embedder on its towers, in one process or under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pacl_kernels import cached_step, fused_pacl_loss

from ..data.features import Features
from ..data.samples import BadData, loader
from ..data.sources import open_pairs
from ..data.texts import choose_text, noun_finder
from ..embedder import VisionEmbedder, save_embedder
from ..files import write_bytes
from ..sharing import describe_towers
from ..towers import load_towers
from .checkpoints import load_checkpoint, save_checkpoint
from .config import TrainConfig, command
from .log import Log
from .model import Trainable
from .optimiser import learning_rate, parameter_groups
from .recipe import recipe_notes

BAD_DATA = 1000  # above the numbers of signals
TOWERS = (
    "model pretrained vision_model vision_pretrained force_image_size lock_image lock_image_unlocked_groups lock_text "
    "grad_checkpointing"
).split()


class Run:
    """One training run: its models, its data, and how far it got."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.group = _process_group()
        self.rank, self.world = (self.group.rank(), self.group.size()) if self.group else (0, 1)
        self.device = _device(config.device)
        self.amp = config.precision == "amp_bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.step, self.stopped_by, self.described = 0, None, None
        self.nouns = noun_finder(config.nouns) if config.nouns else None
        torch.manual_seed(config.seed)  # towers without weights are the same in every process, and on resuming
        self.towers = load_towers(**{name: getattr(config, name) for name in TOWERS}, device=self.device)
        order = {"shuffle": config.shuffle, "seed": config.seed, "repeat": True, "rank": self.rank, "world": self.world}
        if config.features is not None:
            self.data = Features(config.features, nouns=config.nouns, **order)
            self.data.check(self.towers)
        else:
            transform, resampled = self.towers.transform, config.dataset_resampled
            data = {"transform": transform, "resampled": resampled} | config.data_options
            self.data = open_pairs(config.train_data, **order, **data)
        self.data_state = None
        self.samples = config.train_num_samples or self._count()
        self.global_batch = config.batch_size * config.accum_freq * self.world
        self.epoch_steps = self.samples // self.global_batch
        if self.epoch_steps == 0:
            raise ValueError(f"batch_size: a step takes {self.global_batch} pairs, expected at most {self.samples}")
        self.steps = config.max_steps or config.epochs * self.epoch_steps
        torch.manual_seed(config.seed)
        self.model = Trainable(VisionEmbedder(*self.towers.widths), config, self.towers).to(self.device)
        self.wrapped = self.model
        if self.group:  # the buffers of towers never change
            self.wrapped = DistributedDataParallel(self.model, process_group=self.group, broadcast_buffers=False)
        towers = self.model.tower_parameters()
        others = [x for name, x in self.model.named_parameters() if not name.startswith(("visual.", "text."))]
        self.optimiser = torch.optim.AdamW(
            [
                {**group, "initial_lr": rate or config.lr}
                for parameters, rate in ((others, None), (towers, config.tower_lr))
                for group in parameter_groups(parameters, config.wd)
                if group["params"]
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )

    def _count(self) -> int:
        """Counted by the first process, for all."""
        counts = [self.data.count() if self.rank == 0 else None]
        if self.group:
            dist.broadcast_object_list(counts, src=0, group=self.group)
        return counts[0]

    def plan(self) -> str:
        trained = sum(x.numel() for x in self.model.parameters() if x.requires_grad)
        towers = (x for module in (self.towers.visual, self.towers.text) for x in module.parameters())
        frozen = sum(x.numel() for x in towers if not x.requires_grad)
        return "\n".join(
            [
                f"model: {self.config.tower_names()}, {frozen:,} parameters frozen, {trained:,} trained",
                f"data: {self.samples:,} pairs in {self.data.name}",
                f"steps: {self.steps:,} of {self.global_batch:,} pairs ({self.world} process(es) x "
                f"{self.config.accum_freq} x {self.config.batch_size}), {self.epoch_steps:,} an epoch",
                f"device: {self.device}, {'bfloat16 autocast' if self.amp else 'float32'}",
                f"folder: {self.config.folder}",
                *self._recipe(),
            ]
        )

    def _recipe(self) -> list[str]:
        deviations = recipe_notes(self.config, self.global_batch).get("deviations")
        if deviations is None:
            return []
        words = [f"{name} {value['run']} for {value['paper']}" for name, value in deviations.items()]
        return [f"recipe: {self.config.recipe}" + (f", but {'; '.join(words)}" if words else "")]

    @property
    def temperature(self) -> float:
        learned = self.model.log_temperature
        return self.config.attn_temperature if learned is None else learned.exp().item()

    # Training

    def train(self) -> None:
        """From the current step to the last, with checkpoints; on a signal the step under way is finished and saved."""
        if self.step >= self.steps:
            return
        with self._signals(), Log(self) as log:
            for batch, waited in self._batches():
                begin = time.perf_counter()
                loss = self._step(batch)
                self.step += 1
                log.step(loss, batch["key"], waited, time.perf_counter() - begin)
                stop = self._anyone_stopped()
                if stop or self.step == self.steps or self.step % self.config.save_frequency == 0:
                    log.check()
                    self.save()
                if stop or self.step == self.steps:
                    return

    def _batches(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Batches of a step of this process, and the seconds that each was waited for."""
        size, parts = self.config.batch_size, self.config.accum_freq
        options = {"workers": self.config.workers, "drop_last": True, "start": self.data_state}
        batches = loader(self.data, size * parts, **options)
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(iterator)
            except BadData as error:  # a worker's message holds its traceback
                if self.group is None and self.step:
                    self.save()
                raise _bad_data([self.data.complaint()]) from error
            self.data_state = batches.state
            yield batch, time.perf_counter() - begin

    def _step(self, batch: dict[str, Any]) -> Tensor:
        config = self.config
        factor = learning_rate(self.step, self.steps, config.warmup, config.lr_scheduler)
        self.lr = config.lr * factor
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * factor
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
            return fused_pacl_loss(patches, texts, scale, attn_temperature=temperature, logit_bias=bias, **options)

        texts = self._texts(batch)
        if config.features is None:
            pairs = {"images": batch["image"], "texts": self.towers.tokenize(texts)}
        else:
            pairs = {"images": batch["tokens"], "texts": self.data.embeddings(batch, texts)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            modules = [self.wrapped] if self.group else []
            value = cached_step(self._encode, pairs, loss, micro_batch=self.config.batch_size, modules=modules)
        if self.config.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm)
        self.optimiser.step()
        with torch.no_grad():
            self.model.log_scale.clamp_(0, math.log(self.config.max_logit_scale))
        return value

    def _texts(self, batch: dict[str, Any]) -> list[str]:
        """Captions, or what choose_text makes of them; the same after a resume and for any number of workers."""
        if self.nouns is None:
            return batch["caption"]
        when = {"seed": self.config.seed, "epoch": self.step // self.epoch_steps}
        pairs = zip(batch["caption"], batch["key"], strict=True)
        return [choose_text(caption, key, nouns=self.nouns, **when) for caption, key in pairs]

    def _encode(self, pairs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        images, texts = (pairs[name].to(self.device, non_blocking=True) for name in ("images", "texts"))
        if self.config.features is not None:
            return self.wrapped(images.float(), texts)
        with torch.no_grad():
            if self.model.visual is None:
                images = self.towers.tokens(images)
            if self.model.text is None:
                texts = self.towers.encode_text(texts)
        return self.wrapped(images, texts)

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
        due = self.device.type == "cpu" or self.step % self.config.log_every_n_steps == 0 or self.step == self.steps
        if self.group is None or not due:
            return self.group is None and self.stopped_by is not None
        flag = torch.tensor([BAD_DATA if self.data.too_many else self.stopped_by or 0], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        if int(flag) == BAD_DATA:
            self.save()
            complaints = [None] * self.world
            dist.all_gather_object(complaints, self.data.complaint() if self.data.too_many else "", group=self.group)
            raise _bad_data(complaints) if self.rank == 0 else SystemExit(1)
        self.stopped_by = int(flag) or None
        return self.stopped_by is not None

    # What stays

    def save(self) -> None:
        """The checkpoint, and the embedder alone as safetensors; by the first process, called by all."""
        data = [self.data_state]
        if self.group:
            data = [None] * self.world
            dist.all_gather_object(data, self.data_state, group=self.group)
        if self.rank != 0:
            return
        state = {
            "step": self.step,
            "name": self.config.name,
            "state_dict": {name: x.detach().cpu() for name, x in self.model.state_dict().items()},
            "optimizer": self.optimiser.state_dict(),
            "global_batch": self.global_batch,
            "world": self.world,
            "data": data,
        }
        save_checkpoint(self.config.folder / "checkpoints", state, keep=self.config.keep_checkpoints)
        self.export(self.model)

    def export(self, model: Trainable) -> None:
        """The embedder's folder, as load_pacl reads it: embedder, model card, and towers that were trained."""
        folder, config = self.config.folder / "embedder", self.config
        trained = {name: getattr(model, name) for name in self.towers.trained}
        for name, tower in trained.items():
            state = {key: x.detach().cpu().contiguous() for key, x in tower.state_dict().items()}
            write_bytes(folder / f"{name}.safetensors", save(state))
        notes = {"form": config.form, "loss": config.loss, "attn_temperature": self.temperature, "steps": self.step}
        notes |= {"global_batch": self.global_batch, "logit_scale": model.log_scale.exp().item()}
        notes |= {"pairs_seen": self.step * self.global_batch, "command": command(config)}
        if trained or self.described is None:
            self.described = describe_towers(dataclasses.replace(self.towers, **trained), folder, trained)
        save_embedder(model.embedder, folder, self.described, **notes)

    def restore(self, path: Path) -> None:
        state = load_checkpoint(path)
        for name, mine in (("global_batch", self.global_batch), ("world", self.world)):
            if state.get(name) != mine:
                raise ValueError(f"resume: {path} is of a run with {name} {state.get(name)}, expected {mine}")
        self.model.load_state_dict(state["state_dict"])
        self.optimiser.load_state_dict(state["optimizer"])
        self.step, self.data_state = state["step"], state["data"][self.rank]


def _process_group() -> dist.ProcessGroup | None:
    """All processes that torchrun started, or None for one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.group.WORLD


def _bad_data(complaints: list[str]) -> ValueError:
    return ValueError(f"train_data: {'; '.join(filter(None, complaints))}; pacl data check shows which")


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
